"""examples/digit_tasks.py: tasks are what they claim to be."""

import digit_tasks
import torch

from diffopt import random


def test_tasks_name_classes_and_never_repeat_the_support_image():
    images = torch.arange(10.0)[:, None, None] + torch.linspace(0, 0.9, 20)[None, :, None] + torch.zeros(10, 20, 64)
    tasks = digit_tasks.draw_tasks(random.key(0), images, 30, 4)
    assert tasks.support.shape == (30, 10, 64)
    assert tasks.query.shape == (30, 40, 64)
    # Inverted images are negative; whole parts are the classes.
    assert torch.equal(tasks.query[..., 0].abs().floor().long(), tasks.query_labels)
    assert torch.equal(tasks.support_names.sort(-1).values, torch.arange(10).expand(30, 10))
    assert torch.equal(tasks.query_names.reshape(30, 10, 4), tasks.support_names[..., None].expand(30, 10, 4))
    assert (tasks.query.reshape(30, 10, 4, 64) != tasks.support[:, :, None]).all()
    assert 0 < (tasks.query < 0).float().mean() < 1


def test_training_and_test_images_are_apart():
    train, test = digit_tasks.split(0)
    assert train.shape == (10, 120, 64)
    assert test.shape == (10, 54, 64)
    assert torch.cdist(train.flatten(0, 1), test.flatten(0, 1)).min() > 0
