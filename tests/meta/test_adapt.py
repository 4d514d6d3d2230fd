import pytest
import torch
from torch.func import jacrev, vmap

import diffopt
from diffopt import random, tree
from diffopt.meta import adapt
from diffopt.optimizers import adam, sam, sgd
from meta.problems import (
    START,
    A,
    assert_trees_close,
    check_slope,
    end_of_descent,
    f64,
    network_params,
    quadratic,
    quadratic_tasks,
    regression,
    regression_tasks,
    task,
)

RATE, CENTRE = f64(0.3), quadratic_tasks()[0][0]
DATA = task(regression_tasks()[0], 0)
HEAD = {"body": False, "head": True}


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_on_a_quadratic_is_the_closed_form_in_all_it_uses(steps):
    ours = lambda w, c, r: adapt(quadratic, w, c, sgd(r), steps).params  # noqa: E731
    theirs = lambda w, c, r: end_of_descent(w, c, r, steps)  # noqa: E731
    got, want = (jacrev(fn, argnums=(0, 1, 2))(START, CENTRE, RATE) for fn in (ours, theirs))
    assert_trees_close(got, want)
    losses = adapt(quadratic, START, CENTRE, sgd(RATE), steps).losses
    assert losses.shape == (steps,)
    for t in range(steps):
        torch.testing.assert_close(losses[t], quadratic(end_of_descent(START, CENTRE, RATE, t), CENTRE))


def test_goes_on_from_a_state():
    params, optimizer = network_params(), adam(0.05)
    whole = adapt(regression, params, DATA, optimizer, 5)
    first = adapt(regression, params, DATA, optimizer, 2)
    second = adapt(regression, first.params, DATA, optimizer, 3, state=first.state)
    assert_trees_close((second.params, second.state), (whole.params, whole.state), rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([first.losses, second.losses]), whole.losses, rtol=0, atol=0)


def test_a_mask_keeps_the_rest_and_holds_no_state_for_it():
    params = network_params()
    adapted = adapt(regression, params, DATA, adam(0.05), 3, mask=HEAD)
    assert adapted.params["body"]["w"] is params["body"]["w"]
    assert not torch.equal(adapted.params["head"]["w"], params["head"]["w"])
    moments = [leaf for leaf in tree.leaves(adapted.state) if leaf.is_floating_point()]
    assert sum(leaf.numel() for leaf in moments) == 2 * 5
    check_slope(lambda p: regression(adapt(regression, p, DATA, sgd(0.2), 3, mask=HEAD).params, DATA), params)


@pytest.mark.parametrize("checkpoint", ["sqrt", "log", 2])
@pytest.mark.parametrize("mask", [None, HEAD])
def test_checkpoints_change_nothing(checkpoint, mask):
    def end(checkpoint):
        def loss(params, rate, scale):
            inner = lambda p, d: scale * regression(p, d)  # noqa: E731
            adapted = adapt(inner, params, DATA, adam(rate), 5, mask=mask, checkpoint=checkpoint)
            return regression(adapted.params, DATA) + adapted.losses.sum()

        return diffopt.grad(loss, argnums=(0, 1, 2))(network_params(), f64(0.05), f64(1.3))

    assert_trees_close(end(checkpoint), end(None))


def test_truncation_is_the_gradient_of_the_last_steps():
    def end(rate, steps, start, **options):
        return adapt(quadratic, start, CENTRE, sgd(rate), steps, **options).params

    slope = jacrev(lambda r: end(r, 5, START, truncate=2))(RATE)
    middle = end(RATE, 3, START)
    torch.testing.assert_close(slope, jacrev(lambda r: end(r, 2, middle))(RATE))
    assert (jacrev(lambda w: end(RATE, 5, w, truncate=2))(START) == 0).all()


def test_first_order_stops_the_inner_gradients_alone():
    ours = lambda w, r: adapt(quadratic, w, CENTRE, sgd(r), 3, first_order=True).params  # noqa: E731
    by_start, by_rate = jacrev(ours, argnums=(0, 1))(START, RATE)
    torch.testing.assert_close(by_start, torch.eye(3, dtype=torch.float64))
    passed = [A @ (end_of_descent(START, CENTRE, RATE, t) - CENTRE) for t in range(3)]
    torch.testing.assert_close(by_rate, -torch.stack(passed).sum(0))
    w = START.clone().requires_grad_()
    assert not adapt(quadratic, w, CENTRE, sgd(0.3), 3, first_order=True).losses.requires_grad


def test_buffers_come_out_and_carry_gradient():
    def loss(w, buffers, centre):
        mean = 0.9 * buffers["mean"] + 0.1 * w
        return quadratic(w, centre) + mean.square().sum(), {"mean": mean, "count": buffers["count"] + 1}

    buffers = {"mean": START.cos(), "count": torch.tensor(0)}
    adapted = adapt(loss, START, CENTRE, sgd(0.1), 3, buffers=buffers)
    assert adapted.buffers["count"] == 3
    end = lambda w: adapt(loss, w, CENTRE, sgd(0.1), 3, buffers=buffers).buffers["mean"].sin().sum()  # noqa: E731
    check_slope(end, START)
    through = lambda m: adapt(  # noqa: E731
        loss, START, CENTRE, sgd(0.1), 3, buffers={**buffers, "mean": m}, checkpoint="sqrt"
    ).params.sum()
    check_slope(through, buffers["mean"])


def test_each_step_draws_by_a_key_of_its_own():
    draws = []

    def loss(w, centre, *, key):
        draws.append(key.tolist())
        return quadratic(w, centre + 0.1 * random.normal(key, (3,), dtype=torch.float64))

    first = adapt(loss, START, CENTRE, sgd(0.1), 3, key=random.key(7)).params
    assert draws == random.split(random.key(7), 3).tolist()
    torch.testing.assert_close(adapt(loss, START, CENTRE, sgd(0.1), 3, key=random.key(7)).params, first)
    draws.clear()
    adapt(loss, START, CENTRE, sam(sgd(0.1)), 1, key=random.key(7))
    assert draws == [draws[0]] * 2  # both gradients of a step see one mask


def test_vmap_over_starts_and_data():
    params, tasks = network_params(), regression_tasks()[0]
    end = lambda p, d: adapt(regression, p, d, adam(0.05), 2)  # noqa: E731
    starts = tree.map(lambda p: torch.stack([p * (1 + 0.1 * i) for i in range(5)]), params)
    got = vmap(end)(starts, tasks)
    for i in range(5):
        want = end(task(starts, i), task(tasks, i))
        assert_trees_close(tree.map(lambda leaf, i=i: leaf[i], got), want)


def test_bad_arguments_raise_early():
    with pytest.raises(ValueError, match="at least 0; got -1"):
        adapt(quadratic, START, CENTRE, sgd(0.1), -1)
    with pytest.raises(TypeError, match=r"`params\['a'\]` must be a floating-point tensor"):
        adapt(quadratic, {"a": torch.tensor([1])}, CENTRE, sgd(0.1), 1)
    with pytest.raises(ValueError, match="at least one leaf"):
        adapt(quadratic, {}, CENTRE, sgd(0.1), 1)
    with pytest.raises(TypeError, match=r"got shape \(3,\)"):
        adapt(lambda w, c: w - c, START, CENTRE, sgd(0.1), 1)
    with pytest.raises(TypeError, match="`loss` must be a function"):
        adapt(START, START, CENTRE, sgd(0.1), 1)
    with pytest.raises(ValueError, match="holds for none"):
        adapt(quadratic, START, CENTRE, sgd(0.1), 1, mask=False)
    with pytest.raises(ValueError, match="`state` must have the structure"):
        adapt(quadratic, START, CENTRE, adam(0.1), 1, state=sgd(0.1, momentum=0.9).init(START))
    with pytest.raises(ValueError, match=r"`state.* must have shape"):
        adapt(quadratic, START, CENTRE, adam(0.1), 1, state=adam(0.1).init(START[:1]))
    with pytest.raises(ValueError, match="checkpoint must be"):
        adapt(quadratic, START, CENTRE, sgd(0.1), 1, checkpoint="all")
