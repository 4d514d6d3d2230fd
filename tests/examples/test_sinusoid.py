"""examples/sinusoid.py: waves as they are said to be, every method learns, runs go on, and the stored figures."""

import functools
import json
import math

import pytest
import sinusoid as example
import torch
from torch.func import vmap

import diffopt
from diffopt import random, tree


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(example, "BLOCK", 2)


def test_waves_have_their_amplitudes_and_phases():
    support, query = example.draw_tasks(random.key(0), 1000, 5)
    assert support.x.shape == support.y.shape == (1000, 5, 1)
    assert query.x.shape == (1000, example.QUERIES, 1)
    assert -5 <= support.x.min() < -4.9
    assert 4.9 < support.x.max() <= 5
    points = example.both((support, query))
    basis = torch.cat([points.x.sin(), points.x.cos()], 2)
    found = torch.linalg.lstsq(basis.double(), points.y.double()).solution[..., 0]
    amplitude, phase = found.norm(dim=1), torch.atan2(-found[:, 1], found[:, 0])
    torch.testing.assert_close((basis.double() @ found[..., None]), points.y.double(), rtol=1e-4, atol=1e-4)
    assert 0.1 <= amplitude.min() < 0.2
    assert 4.9 < amplitude.max() <= 5.001
    assert phase.min() > -1e-2
    assert phase.max() < math.pi + 1e-2
    assert abs(amplitude.mean() - 2.55) < 0.1


@pytest.mark.parametrize("method", [name for name in example.METHODS if name != "imaml"])
def test_every_method_learns(method):
    progress, seeds = example.begin(method, (0, 1)), (0, 1)
    advance = example.outer_step(method)
    before = example.judge(method, progress.values, seeds, 10, count=10)
    for _ in range(5):
        progress = example.advance_block(advance, progress, seeds, 10)
    after = example.judge(method, progress.values, seeds, 10, count=10)
    assert after.shape == (2, 11)
    assert int(progress.iteration) == 10
    assert (after[:, 1] < before[:, 1]).all()


def test_imaml_has_a_gradient():
    values = tree.map(lambda x: x[0], example.begin("imaml", (0,)).values)
    tasks = example.draw_tasks(random.key(1), 2, 5)
    slope = example.meta_gradient("imaml")(values, tasks)
    assert 0 < tree.norm(slope) < 1e3


def test_maml_is_the_gradient_of_the_loss_after_a_step():
    values = tree.map(lambda x: x[0], example.begin("maml", (0,)).values)
    tasks = example.draw_tasks(random.key(2), 3, 5)

    def by_hand(params, support, query):
        slopes = torch.func.grad(example.loss)(params, support)
        return example.loss(tree.axpy(-example.INNER_RATE, slopes, params), query)

    expected = torch.func.grad(lambda p: vmap(by_hand, (None, 0, 0))(p, *tasks).mean())(values["params"])
    found = example.meta_gradient("maml")(values, tasks)["params"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    options = {"seeds": (0,), "every": 2, "compiled": False, "quiet": True}
    monkeypatch.setattr(example, "judge", functools.partial(example.judge, count=10))
    whole, record = example.train("fomaml", 5, 4, **options)
    example.train("fomaml", 5, 2, folder=tmp_path, **options)
    parts, again = example.train("fomaml", 5, 4, folder=tmp_path, **options)
    assert again == record
    assert record["iterations"] == [2, 4]
    torch.testing.assert_close(tree.leaves(parts), tree.leaves(whole), rtol=0, atol=0)


def test_average_of_iterates():
    progress = example.begin("plain", (0,))
    advance, leaves = example.outer_step("plain"), []
    for _ in range(3):
        progress = example.advance_block(advance, progress, (0,), 5)
        leaves.append(progress)
    assert not torch.equal(progress.average["params"][0]["weight"], progress.values["params"][0]["weight"])


def stored(shots, method, step):
    """The errors after a number of steps at the end of training, a value a seed."""
    figures = json.loads(example.FIGURES.read_text())[f"{shots} shots"][method]
    return torch.tensor(figures["errors"][-1])[:, step]


@pytest.mark.parametrize(("shots", "factor"), [(5, 4.0), (10, 6.0)])
def test_stored_figures_of_maml_against_the_pretrained_network(shots, factor):
    assert len(stored(shots, "maml", 1)) == 3
    assert (stored(shots, "plain", 1) / stored(shots, "maml", 1)).min() >= factor


def test_stored_networks_have_the_stored_errors():
    networks = torch.load(example.NETWORKS)
    for shots in (5, 10):
        values = {"params": networks[f"maml, {shots} shots"], "rates": []}
        tasks = example.draw_tasks(random.key(99), 400, shots, 100)
        found = example.errors(values, tasks, diffopt.sgd(example.INNER_RATE), 1)[1]
        torch.testing.assert_close(found, stored(shots, "maml", 1)[0], rtol=0.2, atol=0)
