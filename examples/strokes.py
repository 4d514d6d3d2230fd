"""Characters of an invented script: random pen strokes, a class each, written anew by a shaky hand for each example.

A character is 2 to 4 strokes, each a cubic Bezier curve. Its examples share the curves, but every one moves their
control points a little, and turns, scales, slants and shifts the whole. The ink of a pixel falls off with its distance
from the pen's path. Like Omniglot (Lake, Salakhutdinov and Tenenbaum 2015) there are many classes and few examples of
each; unlike it, nothing has to be downloaded.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from diffopt import random

SIZE, STROKES, POINTS = 20, 4, 24


class Tasks(NamedTuple):
    """Tasks of few classes: images (tasks, ways * n, 1, size, size) and their labels in the task (tasks, ways * n)."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


def draw_character(key: Tensor) -> tuple[Tensor, Tensor]:
    """Control points (strokes, 4, 2), centred and 0.7 wide or high, and which strokes there are, 2 to 4 of them."""
    of_starts, of_bends, of_count = random.split(key, 3)
    starts = random.uniform(of_starts, (STROKES, 1, 2))
    bends = 0.35 * random.normal(of_bends, (STROKES, 3, 2))
    controls = torch.cat([starts, starts + bends.cumsum(1)], 1)
    present = torch.arange(STROKES) < 2 + (3 * random.uniform(of_count)).long()
    path = torch.where(present[:, None, None], bezier(controls), starts[0]).flatten(0, 1)
    low, high = path.amin(0), path.amax(0)
    return 0.5 + 0.7 * (controls - (low + high) / 2) / (high - low).amax(), present


def bezier(controls: Tensor) -> Tensor:
    """Points (strokes, points, 2) along the curves of control points (strokes, 4, 2)."""
    t = torch.linspace(0, 1, POINTS)[:, None]
    return torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1) @ controls


def write(key: Tensor, controls: Tensor, shake: float = 0.04) -> Tensor:
    """The control points of one example: each moved on its own, and all turned, scaled, slanted and shifted."""
    of_points, of_whole = random.split(key)
    angle, slant, grow, stretch, right, down = random.normal(of_whole, (6,)).unbind()
    cos, sin = torch.cos(0.25 * angle), torch.sin(0.25 * angle)
    turn = torch.stack([cos, -sin, sin, cos]).unflatten(0, (2, 2))
    shape = torch.stack([1 + 0.1 * grow, 0.15 * slant, 0 * slant, 1 + 0.1 * stretch]).unflatten(0, (2, 2))
    moved = controls + shake * random.normal(of_points, controls.shape)
    return 0.5 + (moved - 0.5) @ (turn @ shape) + 0.05 * torch.stack([right, down])


def render(controls: Tensor, present: Tensor) -> Tensor:
    """The image (size, size) of a character, ink 1 on paper 0."""
    path = torch.where(present[:, None, None], bezier(controls), 10.0).flatten(0, 1)
    centres = (torch.arange(SIZE) + 0.5) / SIZE
    across, down = ((centres[:, None] - path[:, i]) ** 2 for i in (0, 1))
    distance = (down[:, None] + across[None]).amin(-1).sqrt()
    return torch.sigmoid((0.045 - distance) / 0.012)


def draw_script(key: Tensor, classes: int = 300, examples: int = 20) -> Tensor:
    """Images of all characters, (classes, examples, 1, size, size)."""
    of_classes, of_examples = random.split(key)

    def of_class(key: Tensor, keys: Tensor) -> Tensor:
        controls, present = draw_character(key)
        return vmap(lambda key: render(write(key, controls), present))(keys)

    keys = random.split(of_classes, classes), random.split(of_examples, classes * examples)
    return vmap(of_class, chunk_size=20)(keys[0], keys[1].unflatten(0, (classes, examples)))[:, :, None]


def draw_tasks(key: Tensor, images: Tensor, count: int, shots: int, *, ways: int = 5, queries: int = 3) -> Tasks:
    """Draw tasks: some classes of the images, and of each some examples to learn from and others to name."""
    of_classes, of_examples = random.split(key)
    chosen = random.uniform(of_classes, (count, images.shape[0])).argsort(1)[:, :ways]
    places = random.uniform(of_examples, (count, ways, images.shape[1])).argsort(2)[:, :, : shots + queries]
    found = images[chosen[:, :, None], places]
    labels = torch.arange(ways)[:, None].expand(count, ways, shots + queries)
    parts = found[:, :, :shots], labels[:, :, :shots], found[:, :, shots:], labels[:, :, shots:]
    return Tasks(*(part.flatten(1, 2) for part in parts))
