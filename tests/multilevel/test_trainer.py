"""Training runs: what the loop adds to `Graph.update`, files that outlive a kill, and updates that are not finite."""

import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from diffopt import random
from diffopt.multilevel import (
    Edge,
    FiniteDifference,
    Level,
    NotFiniteError,
    PerStep,
    graph,
    load,
    log_to_tensorboard,
    minibatches,
    train,
)
from diffopt.optimizers import adam, sgd
from multilevel.small_runs import DATA, poisoned, program, same


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_is_the_updates_one_by_one(accumulate):
    two, state = program(accumulate=accumulate)
    batch = minibatches(random.key(2), DATA, 4)
    want = state
    for update in range(5):
        rows = torch.stack([batch(3 * accumulate * update + i) for i in range(3 * accumulate)])
        rows = rows.reshape(3, accumulate, 4, 2) if accumulate > 1 else rows
        want, _ = two.update(want, {"b": PerStep(rows), "a": DATA[update]})
    sources = {"b": batch, "a": lambda i: DATA[i]}
    assert same(train(two, state, sources, updates=5, quiet=True).state, want)
    assert state.updates == 0


def test_averages_follow_the_parameters():
    two, state = program()
    want = state.params["b"]
    for update in range(1, 6):
        want = 0.8 * want + 0.2 * train(two, state, poisoned(()), updates=update, quiet=True).state.params["b"]
    found = train(two, state, poisoned(()), updates=5, average={"b": 0.8}, quiet=True)
    assert_close(found.average, {"b": want})


def test_validation_keeps_the_best_and_stops():
    two, state = program()
    scores = iter([3.0, 1.0, 2.0, torch.tensor(1.5), 0.5])
    seen, logged = [], []

    def validate(trained):
        seen.append(trained.state.params)
        return next(scores)

    found = train(
        two, state, poisoned(()), updates=100, validate=validate, validate_every=2, patience=2, quiet=True,
        log=lambda update, values: logged.append((update, values["validation"])), log_every=2,
    )  # fmt: skip
    assert found.state.updates == 8
    assert found.score == 1.0
    assert same(found.best, seen[1])
    assert logged == [(2, 3.0), (4, 1.0), (6, 2.0), (8, 1.5)]


def test_what_is_logged():
    two, state = program()
    _, metrics = two.update(train(two, state, poisoned(()), updates=3, quiet=True).state, poisoned(())(3))
    logged = {}
    train(two, state, poisoned(()), updates=6, log=logged.__setitem__, log_every=2, quiet=True)
    assert set(logged) == {2, 4, 6}
    assert set(logged[4]) == {
        "a/loss", "a/gradient_norm", "a/b/residual", "a/b/error", "b/loss", "b/gradient_norm",
    }  # fmt: skip
    assert logged[4]["a/loss"] == metrics["a"].loss.item()
    two, state = program(FiniteDifference())
    train(two, state, poisoned(()), updates=1, log=logged.__setitem__, log_every=1, quiet=True)
    assert "a/b/residual" not in logged[1]  # no system is solved


def test_progress_is_shown_or_not(capsys):
    two, state = program()
    train(two, state, poisoned(()), updates=10, quiet=True)
    assert capsys.readouterr().err == ""
    train(two, state, poisoned(()), updates=10)
    assert "10/10" in (said := capsys.readouterr().err)
    assert "a/loss" in said


def test_tensorboard(monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    log_to_tensorboard(tmp_path)(3, {"a/loss": 0.5})
    assert written == [str(tmp_path), ("a/loss", 0.5, 3)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        log_to_tensorboard(tmp_path)


@pytest.mark.parametrize("level", ["a", "b"])
def test_raise_keeps_the_last_state(level, tmp_path):
    """NaN in the batch of either level: the state before is in the error and in the file."""
    two, state = program()
    if level == "a":
        levels = dict(two.program.levels)
        levels["a"] = Level(lambda a, b, x: ((b - x) ** 2).mean(), adam(0.1), reads=("b",))
        two = graph(levels, [Edge("a", "b")])
        state = two.init(random.key(0), state.params)
    before = train(two, state, poisoned({4}, level), updates=4, average={"b": 0.5}, quiet=True)
    file = tmp_path / "run.pt"
    options = {"average": {"b": 0.5}, "checkpoint": file, "quiet": True}
    with pytest.raises(NotFiniteError, match=f"update 4 gave numbers that are not finite in .*'{level}'") as caught:
        train(two, state, poisoned({4}, level), updates=9, **options)
    assert same(caught.value.trained, before)
    assert same(load(file, before)[0], before)
    assert same(pickle.loads(pickle.dumps(caught.value)).trained, before)
    on = train(two, state, poisoned({4}, level), updates=9, resume=True, on_nan="skip", **options)
    assert same(on, train(two, state, poisoned({4}, level), updates=9, average={"b": 0.5}, on_nan="skip", quiet=True))


def test_skip_leaves_the_update_out():
    two, state = program()
    found = train(two, state, poisoned({2, 5}), updates=8, on_nan="skip", quiet=True)
    want = state
    for update in (0, 1, 3, 4, 6, 7):
        want, _ = two.update(want, poisoned(())(update))
    assert same(found.state, want._replace(updates=found.state.updates))
    assert (found.faults, found.state.updates, found.faults_in_a_row) == (2, 8, 0)


@pytest.mark.parametrize("file", [None, "run.pt"])
def test_rollback_goes_to_the_last_save_and_on_with_the_next_batches(file, tmp_path):
    two, state = program()
    checkpoint = file and tmp_path / file
    found = train(two, state, poisoned({5}), updates=8, on_nan="rollback", save_every=3, checkpoint=checkpoint,
                  quiet=True)  # fmt: skip
    want = state
    for update in (0, 1, 2, 6, 7):
        want, _ = two.update(want, poisoned(())(update))
    assert same(found.state, want._replace(updates=found.state.updates))
    assert (found.faults, found.state.updates) == (1, 8)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_that_is_never_finite_raises(policy):
    two, state = program()
    with pytest.raises(NotFiniteError, match="update 12 "):
        train(two, state, poisoned(set(range(3, 99))), updates=99, on_nan=policy, quiet=True)


def test_a_level_that_waits_is_no_fault():
    two, state = program(warmup=2)
    assert train(two, state, poisoned(()), updates=4, quiet=True).faults == 0


def test_a_gradient_that_the_scale_skips_is_no_fault():
    alone = graph({"w": Level(lambda w, batch: 1e34 * (w**2).sum(), sgd(1e-40), precision=torch.float16)})
    state = alone.init(random.key(0), {"w": torch.full((3,), 2.0)})
    found = train(alone, state, updates=3, quiet=True)
    assert found.faults == 0
    assert found.state.scales["w"].scale < state.scales["w"].scale


def test_a_run_goes_on_where_it_was(tmp_path):
    two, state = program()
    file, batch = tmp_path / "run.pt", minibatches(random.key(2), DATA, 4)
    options = {"checkpoint": file, "quiet": True, "average": {"b": 0.5}}
    sources = {"b": batch, "a": lambda i: DATA[i % 12]}
    train(two, state, sources, updates=4, **options)
    with pytest.raises(FileExistsError, match="go on with it by resume=True"):
        train(two, state, sources, updates=9, **options)
    found = train(two, state, sources, updates=9, resume=True, **options)
    assert same(found, train(two, state, sources, updates=9, average={"b": 0.5}, quiet=True))
    assert same(train(two, state, sources, updates=9, resume=True, **options), found)  # done already
    with pytest.raises(ValueError, match="another program"):
        train(two, state, sources, updates=9, checkpoint=file, resume=True, quiet=True)


def test_an_interrupt_saves(tmp_path):
    two, state = program()
    file = tmp_path / "run.pt"

    def batches(update):
        if update == 5:
            raise KeyboardInterrupt
        return poisoned(())(update)

    with pytest.raises(KeyboardInterrupt):
        train(two, state, batches, updates=9, checkpoint=file, quiet=True)
    found = train(two, state, poisoned(()), updates=9, checkpoint=file, resume=True, quiet=True)
    assert same(found, train(two, state, poisoned(()), updates=9, quiet=True))


def killed(folder, kills):
    script = Path(__file__).with_name("killed_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), str(kills)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[0]) == kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_run_that_is_killed_twice_ends_the_same_bit_by_bit(tmp_path):
    killed(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_run_that_is_killed_20_times_ends_the_same_bit_by_bit(tmp_path):
    killed(tmp_path, 20)


def test_options_are_checked():
    two, state = program()
    cases = [
        ({"validate_every": 0}, "validate_every must be a positive int"),
        ({"save_every": 1.5}, "save_every must be a positive int"),
        ({"patience": 2}, "needs validate"),
        ({"on_nan": "ignore"}, "on_nan must be"),
        ({"average": {"c": 0.5}}, "no level 'c' to average"),
        ({"average": {"a": 1.0}}, r"in \[0, 1\)"),
        ({"batches": {"c": list(DATA)}}, "batches for 'c', which is no level"),
        ({"validate": lambda trained: DATA, "validate_every": 1}, "validate must give one number"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            train(two, state, **{"batches": poisoned(()), "updates": 2, "quiet": True} | options)
    for batches, message in [
        ({"b": DATA}, "batches=lambda update"),
        ({"b": dict}, "are a class"),
        (3, "a function of the update, or a mapping"),
        ({"b": [1, 2]}, "a batch of a level with several steps"),
    ]:
        with pytest.raises(TypeError, match=message):
            train(two, state, batches, updates=2, quiet=True)
    with pytest.raises(TypeError, match="must be a GraphState"):
        train(two, {}, updates=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": 2.5}, "updates must be an int"),
        ({"updates": -2}, "updates must be an int"),
        ({"patience": 1.5, "validate": lambda trained: 1.0}, "patience must be a positive int"),
        ({"average": {"w": "0.9"}}, "decay of an average"),
    ],
)
def test_numbers_have_types(options, message):
    alone = graph({"w": Level(lambda w, batch: (w**2).sum(), sgd(0.1))})
    state = alone.init(random.key(0), {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=message):
        train(alone, state, quiet=True, **{"updates": 2, **options})


def test_a_run_keeps_no_graph():
    alone = graph({"w": Level(lambda w, batch: (w**2).sum(), sgd(0.1))})
    state = alone.init(random.key(0), {"w": torch.ones(2, requires_grad=True)})
    with pytest.raises(ValueError, match="memory would grow with each update"):
        train(alone, state, updates=2, quiet=True)
    with torch.no_grad():
        assert not train(alone, state, updates=2, quiet=True).state.params["w"].requires_grad


def test_what_a_loss_captures_leaves_no_graph():
    scale = torch.tensor(2.0, requires_grad=True)
    alone = graph({"w": Level(lambda w, batch: (scale * w**2).sum(), sgd(0.1), steps=4)})
    state = alone.init(random.key(0), {"w": torch.ones(2)})
    assert alone.update(state)[0].params["w"].requires_grad
    found = train(alone, state, updates=2, quiet=True).state.params["w"]
    assert not found.requires_grad
    assert_close(found, torch.full((2,), 0.6**8))


def test_a_run_that_would_validate_nothing_raises():
    two, state = program()
    with pytest.raises(ValueError, match="nothing would be validated"):
        train(two, state, poisoned(()), updates=60, validate=lambda trained: 1.0, quiet=True)
    with pytest.raises(ValueError, match="resume=True goes on from a file"):
        train(two, state, poisoned(()), updates=2, resume=True, quiet=True)
    with pytest.raises(TypeError, match="average must be a dict"):
        train(two, state, poisoned(()), updates=2, average=0.9, quiet=True)
