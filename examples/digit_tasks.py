"""Few-shot tasks made of digits: each shows them in a way of its own and gives the ten classes names of its own."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import vmap

from diffopt import random, tree

TURNS = [torch.rot90(torch.arange(64).reshape(8, 8), k) for k in range(4)]
VIEWS = torch.stack([view.flatten() for turn in TURNS for view in (turn, turn.flip(0))])


class Tasks(NamedTuple):
    """A batch of tasks: images (tasks, 10 n, 64), the task's names and the true labels (tasks, 10 n)."""

    support: Tensor
    support_names: Tensor
    query: Tensor
    query_names: Tensor
    query_labels: Tensor


def split(seed: int) -> tuple[Tensor, Tensor]:
    """Training and test images by class, (10, n, 64); the two share none."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = random.permutation(random.key(seed), len(images))
    images, labels = images[order].float() / 16 - 0.3, labels[order]
    by_class = torch.stack([images[labels == c][:174] for c in range(10)])
    return by_class[:, :120], by_class[:, 120:]


def draw_tasks(key: Tensor, images: Tensor, count: int, queries: int) -> Tasks:
    """Draw tasks with one support image and some query images a class."""
    where, naming, looks = random.split(key, 3)
    n = images.shape[1]
    first, *moves = (n * random.uniform(where, (1 + queries, count, 10))).long()
    # A query is the support image moved on by 1 to n - 1 places, hence another one.
    places = torch.stack([first, *((first + 1 + move % (n - 1)) % n for move in moves)], -1)
    turn, sign = random.uniform(looks, (2, count))
    pixels = VIEWS[(8 * turn).long()][:, None, None, :]
    chosen = images[torch.arange(10)[:, None, None], places[..., None], pixels]
    chosen = torch.where(sign < 0.5, -1.0, 1.0)[:, None, None, None] * chosen
    names = random.uniform(naming, (count, 10)).argsort(-1)[:, :, None].expand(places.shape)
    labels = torch.arange(10)[:, None].expand(places.shape)
    parts = chosen[:, :, :1], names[:, :, :1], chosen[:, :, 1:], names[:, :, 1:], labels[:, :, 1:]
    return Tasks(*(part.flatten(1, 2) for part in parts))


def batches(keys: Tensor, images: Tensor, tasks: int) -> Iterator[Tasks]:
    """Draw batches of tasks for all seeds for ever, 50 batches at a time, which is quicker."""
    draw = vmap(functools.partial(draw_tasks, count=50 * tasks, queries=5))
    for i in itertools.count():
        pool = draw(vmap(random.fold_in, (0, None))(keys, i), images)
        for j in range(50):
            yield tree.map(lambda x, j=j: x[:, j::50], pool)
