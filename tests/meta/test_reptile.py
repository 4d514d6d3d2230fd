import pytest
import torch

from diffopt import random, step, tree
from diffopt.meta import reptile
from diffopt.optimizers import adam, sgd
from meta.problems import (
    START,
    assert_trees_close,
    end_of_descent,
    f64,
    network_params,
    quadratic,
    quadratic_tasks,
    regression,
    regression_tasks,
)

RATE = f64(0.3)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_is_the_start_minus_the_mean_of_the_ends(steps):
    centres = quadratic_tasks()[0]
    want = START - torch.stack([end_of_descent(START, c, RATE, steps) for c in centres]).mean(0)
    torch.testing.assert_close(reptile(quadratic, sgd(RATE), steps)(START, centres), want)


def test_of_one_step_is_the_mean_gradient():
    centres = quadratic_tasks()[0]
    want = 0.2 * torch.stack([torch.func.grad(quadratic)(START, c) for c in centres]).mean(0)
    torch.testing.assert_close(reptile(quadratic, sgd(0.2), 1)(START, centres), want)


def test_trees_chunks_and_an_outer_optimizer():
    tasks, params = regression_tasks()[0], network_params()
    meta_grad = reptile(regression, adam(0.05), 3)
    got = meta_grad(params, tasks)
    assert_trees_close(reptile(regression, adam(0.05), 3, chunk_size=2)(params, tasks), got)
    alone = [meta_grad(params, tree.map(lambda x, i=i: x[i : i + 1], tasks)) for i in range(5)]
    assert_trees_close(got, tree.map(lambda *moves: torch.stack(moves).mean(0), *alone))
    outer = sgd(0.5)
    moved, _ = step(outer, got, outer.init(params), params)
    assert_trees_close(moved, tree.axpy(-0.5, got, params))


def test_buffers_and_keys():
    def loss(params, buffers, data, *, key):
        noisy = {**data, "x": data["x"] + 0.1 * random.normal(key, data["x"].shape, dtype=torch.float64)}
        return regression(params, noisy), {"count": buffers["count"] + 1, "mean": buffers["mean"] + data["x"].mean()}

    tasks, params = regression_tasks()[0], network_params()
    buffers = {"count": torch.tensor(1), "mean": f64(0.5)}
    meta_grad = reptile(loss, sgd(0.1), 3)
    got, new = meta_grad(params, tasks, buffers=buffers, key=random.key(3))
    assert new["count"] == 4
    torch.testing.assert_close(new["mean"], 0.5 + 3 * tasks["x"].mean())
    assert_trees_close(meta_grad(params, tasks, buffers=buffers, key=random.key(3))[0], got, rtol=0, atol=0)
    other = meta_grad(params, tasks, buffers=buffers, key=random.key(4))[0]
    assert not torch.equal(other["body"]["w"], got["body"]["w"])


def test_bad_arguments_raise_early():
    with pytest.raises(ValueError, match="at least 0"):
        reptile(quadratic, sgd(0.1), -2)
    with pytest.raises(ValueError, match="`in_dims` must be a pair"):
        reptile(quadratic, sgd(0.1), 1, in_dims=0)
    with pytest.raises(ValueError, match="empty"):
        reptile(quadratic, sgd(0.1), 1)(START, torch.zeros(0, 3))
    tasks = regression_tasks()[0]
    with pytest.raises(ValueError, match=r"`tasks\['x'\]` has 5, `tasks\['y'\]` has 4"):
        reptile(regression, sgd(0.1), 1)(network_params(), {**tasks, "y": tasks["y"][:4]})
    with pytest.raises(TypeError, match="0-d"):
        reptile(lambda p, d: p, sgd(0.1), 1)(START, quadratic_tasks()[0])
