"""examples/few_shot_strokes.py: the plain loop's gradients, both learners side by side, and the stored figures."""

import json

import few_shot_strokes as example
import pytest
import torch
from strokes import draw_script, draw_tasks

import diffopt
from diffopt import random, tree


@pytest.fixture(scope="module")
def images():
    return draw_script(random.key(0), classes=12, examples=8)


def test_meta_gradient_is_that_of_the_loop(images):
    tasks = tree.map(lambda x: x.double() if x.is_floating_point() else x, draw_tasks(random.key(1), images, 2, 1))
    params = tree.map(torch.Tensor.double, example.init_params(random.key(2), width=4))
    params[-1]["weight"] = 0.1 * random.normal(random.key(3), params[-1]["weight"].shape, dtype=torch.float64)
    support, query = example.halves(tasks)
    ours = diffopt.grad(example.maml(example.loss, diffopt.sgd(example.INNER_RATE), 3))(params, (support, query))

    leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
    start = tree.unflatten(tree.flatten(params)[1], leaves)
    each = [
        example.reference_loss(
            start, example.Labelled(*(x[i] for x in support)), example.Labelled(*(x[i] for x in query))
        )
        for i in range(2)
    ]
    theirs = torch.autograd.grad(torch.stack(each).mean(), leaves)
    torch.testing.assert_close(tuple(tree.leaves(ours)), theirs, rtol=1e-9, atol=1e-12)


def test_both_learn_the_same():
    results, others = example.run(1, 3, test_tasks=20, quiet=True)
    ours, plain = results["diffopt"], results["plain loop"]
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-4, atol=1e-5)
    assert ours.accuracy.shape == (example.INNER_STEPS + 1,)
    assert (ours.accuracy - plain.accuracy).abs().max() < 0.01
    assert 0.2 < others["nearest image"] < 1


@pytest.mark.parametrize("shots", [1, 5])
def test_stored_figures_agree_within_a_point_and_beat_pixels(shots):
    stored = json.loads(example.RESULTS.read_text())[f"{shots} shots, seed 0"]
    ours, plain = (stored[name]["accuracy"][-1] for name in ("diffopt", "plain loop"))
    assert abs(ours - plain) <= 0.01
    assert ours > stored["nearest image"] + 0.05
    assert ours > stored["untrained start"] + 0.05
