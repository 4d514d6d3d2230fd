"""examples/strokes.py: many characters, like themselves and unlike each other, and tasks made of them."""

import pytest
import strokes
import torch
from torch.func import vmap

from diffopt import random


@pytest.fixture(scope="module")
def images():
    return strokes.draw_script(random.key(0), classes=200, examples=6)


def test_script_is_ink_on_paper(images):
    assert images.shape == (200, 6, 1, strokes.SIZE, strokes.SIZE)
    assert images.min() >= 0
    assert images.max() <= 1
    assert (images > 0.5).flatten(2).sum(2).min() >= 10
    assert images.mean() < 0.25


def test_script_is_a_function_of_the_key(images):
    again = strokes.draw_script(random.key(0), classes=200, examples=6)
    torch.testing.assert_close(again, images, rtol=0, atol=0)
    assert not torch.equal(strokes.draw_script(random.key(1), classes=200, examples=6), images)


def test_examples_are_nearest_to_their_own_class_far_above_chance(images):
    blurred = torch.nn.functional.avg_pool2d(images.flatten(0, 1), 3, stride=1).flatten(1)
    first, second = blurred.unflatten(0, (200, 6))[:, 0], blurred.unflatten(0, (200, 6))[:, 1]
    hits = torch.cdist(second, first).argmin(1) == torch.arange(200)
    assert 0.1 < hits.float().mean() < 0.9  # chance is 0.005
    assert torch.cdist(second, first).diag().min() > 0.1


def test_characters_have_two_to_four_strokes_in_the_frame():
    controls, present = vmap(strokes.draw_character)(random.split(random.key(2), 100))
    assert set(present.sum(1).tolist()) == {2, 3, 4}
    paths = vmap(strokes.bezier)(controls)
    inside = torch.where(present[:, :, None, None], paths, 0.5)
    assert inside.min() > 0.1
    assert inside.max() < 0.9


def test_tasks_hold_each_class_and_no_image_twice(images):
    tasks = strokes.draw_tasks(random.key(3), images, 4, 2, ways=5, queries=3)
    assert tasks.support.shape == (4, 10, 1, strokes.SIZE, strokes.SIZE)
    assert tasks.query_labels.tolist() == [[k for k in range(5) for _ in range(3)]] * 4
    everything = torch.cat([tasks.support, tasks.query], 1).flatten(2)
    distances = vmap(torch.cdist)(everything, everything) + 10 * torch.eye(25)
    assert distances.min() > 1e-3
    where = (everything[:, :, None] == images.flatten(0, 1).flatten(1)).all(-1).float().argmax(-1) // 6
    labels = torch.cat([tasks.support_labels, tasks.query_labels], 1)
    for classes, names in zip(where, labels, strict=True):
        assert len({(c.item(), k.item()) for c, k in zip(classes, names, strict=True)}) == 5
