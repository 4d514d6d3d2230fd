"""examples/multilevel: short runs, and data cleaning through the graph."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "multilevel"))

import architecture_search
import data_cleaning
import data_cleaning_graph
import dataset_distillation
import gan
import hpo_logistic
import reweighting
import trilevel

from diffopt import random


def test_data_cleaning_begins_well():
    auc, trained = data_cleaning_graph.run(updates=25, quiet=True)
    assert auc > 0.8
    assert trained.faults == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_data_cleaning_finds_the_wrong_labels(seed):
    assert data_cleaning_graph.run(seed, quiet=True)[0] > 0.9


def test_penalties_fall_where_features_matter():
    program, (training, valid, _) = hpo_logistic.program(20), hpo_logistic.draw(0)
    start = {"penalty": torch.full((100,), -4.0), "weights": torch.zeros(100)}
    state, before = program.init(random.key(0), start), None
    for _ in range(12):
        state, metrics = program.update(state, {"penalty": valid, "weights": training})
        before = metrics["penalty"].loss if before is None else before
    assert metrics["penalty"].loss < before
    assert state.params["penalty"][:10].mean() < state.params["penalty"][10:].mean()


def test_distilled_images_teach():
    errors = dataset_distillation.run(updates=20, quiet=True)
    assert errors["ten distilled images"] < errors["ten real images"]


def test_the_generator_learns():
    found = gan.run(updates=60, quiet=True)
    assert found["generator"] < found["start"]
    assert found["another real sample"] < found["one Gaussian"]


def test_reweighting_runs():
    training, meta, _, wrong = reweighting.split(0)
    assert 0.3 < wrong.float().mean() < 0.5
    assert len(meta[1]) == 50
    assert len(training[1]) == 600
    errors, weights = reweighting.run(updates=10, quiet=True)
    assert set(errors) == {"learned weights", "training set", "training and meta set"}
    assert all(0 < value < 1 for value in weights.values())


def test_weights_tell_wrong_labels_and_beat_training_without_them_but_not_on_both_sets():
    errors, weights = reweighting.run(quiet=True)
    assert weights["right"] > 1.5 * weights["wrong"]
    assert errors["training and meta set"] < errors["learned weights"] < errors["training set"]


@pytest.mark.slow
def test_the_order_of_weights_and_rivals_over_seeds():
    errors, weights = zip(*(reweighting.run(seed, quiet=True) for seed in range(4)), strict=True)
    mean = {name: sum(share[name] for share in errors) / 4 for name in errors[0]}
    assert mean["training and meta set"] < mean["learned weights"] - 0.01
    assert mean["learned weights"] < mean["training set"] - 0.02
    assert all(value["right"] > 1.5 * value["wrong"] for value in weights)


def test_a_search_runs():
    name, errors = architecture_search.run(updates=25, rivals=1, quiet=True)
    assert set(name.split(", ")) <= set(architecture_search.OPERATIONS)
    assert errors["the cell found"] < 0.9


@pytest.mark.slow
def test_the_median_of_the_cells_tried_is_no_worse_than_the_one_found():
    _, errors = architecture_search.run(quiet=True)
    assert errors["the median of all tried"] <= errors["the cell found"]


@pytest.mark.slow
def test_three_levels_tell_wrong_labels_and_lose_to_the_rival():
    result = trilevel.run(quiet=True)
    assert result.auc > 0.85
    assert result.errors["all sets together"] < result.errors["three levels"] - 0.05


def test_the_strength_has_another_gradient_where_responses_of_responses_are_left_out():
    data = data_cleaning.split(0)
    start = {"strength": torch.tensor(0.5), "weights": torch.zeros(trilevel.NOISY), "classifier": torch.zeros(65, 10)}
    sizes = {}
    for response in ("total", "partial"):
        three = trilevel.program(data, response)
        state = three.init(random.key(0), start)
        state = state._replace(params={**start, "weights": torch.linspace(-1, 1, trilevel.NOISY)})
        sizes[response] = abs(three.hypergrad("strength")(state)[0].item())
    assert sizes["total"] > 2 * sizes["partial"] > 0
