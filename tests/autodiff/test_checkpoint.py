"""diffopt.autodiff.checkpoint: the same value and derivatives in less memory, and truncation."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vmap

from diffopt.autodiff import checkpoint, unroll

F64 = torch.float64
X = torch.tensor([0.5, -0.3, 0.8], dtype=F64)
THETA = torch.tensor(0.9, dtype=F64)
TOL = 1e-12
STRATEGIES = [None, "sqrt", "log", 1, 2, 5, 100]


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


def make_step(theta):
    return lambda c, x: (torch.sin(c * theta) + x, {"y": c * theta, "none": None})


def hand_loop(theta, xs, truncate=None):
    """The unroll by hand, with the carry detached before the last k steps, and every k steps before that."""
    carry, ys, size = 0.5 * theta, [], len(xs)
    for t in range(size):
        if truncate is not None and t > 0 and (size - t) % truncate == 0:
            carry = carry.detach()
        carry, y = make_step(theta)(carry, xs[t])
        ys.append(y["y"])
    return carry, torch.stack(ys) if ys else torch.zeros(0, dtype=F64)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("truncate", [None, 1, 2, 3, 7, 20])
def test_unroll_equals_the_hand_written_loop(strategy, truncate):
    for size in (1, 2, 3, 7, 8):
        xs = torch.linspace(0.3, 1, size, dtype=F64)

        def ours(theta):
            carry, ys = unroll(make_step(theta), 0.5 * theta, xs, checkpoint=strategy, truncate=truncate)  # noqa: B023
            assert ys["none"] is None
            return carry + (ys["y"] ** 2).sum()

        def theirs(theta):
            carry, ys = hand_loop(theta, xs, truncate)  # noqa: B023
            return carry + (ys**2).sum()

        theta = THETA.clone().requires_grad_()
        value = theirs(theta)
        (expected,) = torch.autograd.grad(value, theta)
        assert close(ours(THETA), value)
        assert close(grad(ours)(THETA), expected), size
        assert close(torch.autograd.grad(ours(theta), theta)[0], expected)
        assert close(jvp(ours, (THETA,), (torch.ones_like(THETA),))[1], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_higher_orders_and_batches_do_not_depend_on_the_strategy(strategy):
    xs = torch.linspace(0.3, 1, 6, dtype=F64)

    def end(theta, strategy):
        return unroll(make_step(theta), 0.5 * theta, xs, checkpoint=strategy)[0]

    batch = torch.stack([THETA, 1.1 * THETA])
    assert close(hessian(end)(THETA, strategy), hessian(end)(THETA, None))
    by_batch = vmap(grad(lambda t: end(t, strategy)))(batch)
    assert close(by_batch, torch.stack([grad(lambda t: end(t, None))(t) for t in batch]))


@pytest.mark.parametrize("truncate", [None, 1, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_steps_and_one_step(strategy, truncate):
    carry, ys = unroll(lambda c, _: (2 * c, c), X, length=0, checkpoint=strategy, truncate=truncate)
    assert close(carry, X)
    assert ys is None
    assert close(grad(lambda x: unroll(lambda c, _: (2 * c, c), x, length=0, truncate=truncate)[0].sum())(X), 0 * X + 1)
    carry, ys = unroll(lambda c, _: (2 * c, c), X, length=1, checkpoint=strategy, truncate=truncate)
    assert close(carry, 2 * X)
    assert close(ys, X[None])


def test_integer_carries_and_arguments_pass_through():
    def end(theta, strategy):
        return unroll(
            lambda c, _: ((c[0] * theta, c[1] + 1), c[1]), (torch.ones((), dtype=F64), torch.tensor(0)),
            length=5, checkpoint=strategy,
        )  # fmt: skip

    for strategy in STRATEGIES:
        assert torch.equal(end(THETA, strategy)[1], torch.arange(5))
        assert close(grad(lambda t: end(t, strategy)[0][0])(THETA), 5 * THETA**4)  # noqa: B023
    assert close(grad(checkpoint(lambda x, *, k, mode: (x**k).sum()))(X, k=2, mode="sum"), 2 * X)


BAD = {
    "checkpoint": ({"length": 3, "checkpoint": "cube"}, 'checkpoint must be None, "sqrt", "log" or a positive int'),
    "checkpoint 0": ({"length": 3, "checkpoint": 0}, "checkpoint must be None.*got 0"),
    "checkpoint True": ({"length": 3, "checkpoint": True}, "checkpoint must be None.*got True"),
    "truncate 0": ({"length": 3, "truncate": 0}, "truncate must be None or a positive int; got 0"),
    "truncate float": ({"length": 3, "truncate": 1.5}, "truncate must be None or a positive int; got 1.5"),
    "no length": ({}, "give xs or a non-negative length that agrees"),
    "negative": ({"length": -1}, "give xs or a non-negative length that agrees"),
    "both": ({"xs": torch.ones(3), "length": 4}, "got 3 rows and length=4"),
    "rows differ": ({"xs": (torch.ones(3), torch.ones(2))}, "share their first dimension"),
    "no rows": ({"xs": torch.ones(())}, "share their first dimension"),
    "not tensors": ({"xs": [1.0, 2.0]}, "share their first dimension"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_raise(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        unroll(lambda c, _: (c, None), X, **options)


def test_outputs_that_are_not_tensors_raise():
    with pytest.raises(TypeError, match="a checkpointed function must return tensors; found int"):
        checkpoint(lambda x: (x, 3))(X)


def test_checkpoint_of_modules_identities_and_no_tensors():
    net = torch.nn.Linear(3, 2).double()
    found = torch.autograd.grad(checkpoint(net)(X).sin().sum(), list(net.parameters()))
    expected = torch.autograd.grad(net(X).sin().sum(), list(net.parameters()))
    assert all(close(f, e) for f, e in zip(found, expected, strict=True))
    x = X.clone().requires_grad_()
    y = checkpoint(lambda x: x)(x)
    assert y is not x
    assert close(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(X))
    w = THETA.clone().requires_grad_()
    assert close(torch.autograd.grad(checkpoint(lambda n: w * n)(3), w)[0], torch.tensor(3.0, dtype=F64))


def test_checkpoint_keeps_detach_and_in_place_work_inside():
    assert close(grad(checkpoint(lambda x: (x.detach() * x).sum()))(X), X)

    def scaled(x):
        x = x * 1
        x.mul_(2)
        return x.sin()

    assert close(jacrev(checkpoint(scaled))(X), torch.diag(2 * torch.cos(2 * X)))


def test_a_hidden_tensor_raises_where_autograd_tracks_the_inputs():
    class Slotted:
        __slots__ = ("t",)

        def __call__(self, x):
            return self.t * x

    hidden = Slotted()
    hidden.t = THETA.clone().requires_grad_()
    with pytest.raises(ValueError, match="Its gradient would be lost: pass it as an argument"):
        checkpoint(hidden)(X.clone().requires_grad_())


def saved_and_steps(strategy, size):
    """How many tensors the graph of an unroll saves, and how often each step runs, forward and backward."""
    saved, steps = [], []

    def step(carry, _):
        steps.append(1)
        return torch.sin(carry), None

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(1), t)[1], lambda t: t):
        y = unroll(step, x, length=size, checkpoint=strategy)[0]
    forward = len(saved)
    torch.autograd.grad(y.sum(), x)
    return forward, len(steps) / size


@pytest.mark.parametrize("size", [16, 64, 256])
def test_memory_and_work_are_as_promised(size):
    assert saved_and_steps(None, size) == (size, 1)
    # a checkpoint saves its input carry and its output, at each end of a block
    assert saved_and_steps("sqrt", size) == (2 * math.isqrt(size), 2)
    assert saved_and_steps(4, size) == (2 * size // 4, 2)
    saved, work = saved_and_steps("log", size)
    assert saved == 4
    assert work <= math.log2(size) + 1


def test_peak_of_live_carries_is_logarithmic():
    """Counts carries alive at once over forward and backward, as garbage collection sees them."""
    import weakref

    def peak(strategy, size):
        alive, most = set(), [0]

        def step(carry, _):
            new = torch.sin(carry)
            alive.add(id(new))
            weakref.finalize(new, alive.discard, id(new))
            most[0] = max(most[0], len(alive))
            return new, None

        x = X.clone().requires_grad_()
        y = unroll(step, x, length=size, checkpoint=strategy)[0]
        torch.autograd.grad(y.sum(), x)
        return most[0]

    assert peak("log", 256) <= peak("log", 16) + 2 * 4 + 4  # at most two more for each doubling


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_unrolls_are_right(strategy):
    def end(theta):
        return unroll(lambda c, _: (torch.sin(c * theta), None), 0.5 * theta, length=5, checkpoint=strategy)[0]

    found = torch.compile(grad(end), fullgraph=True, backend="eager")(THETA)
    assert close(found, grad(end)(THETA))


def test_autocast_holds_in_the_backward_pass():
    net, outer = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    x = torch.tensor([[1.0, -2.0]])

    def slope(block):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(outer(x)).float().pow(2).sum()
        return torch.autograd.grad(out, [*outer.parameters(), *net.parameters()])

    torch.testing.assert_close(slope(checkpoint(net)), slope(net))
    seen = []
    out = checkpoint(lambda x: seen.append(net(x).dtype) or net(x))(x).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # nor is it on where it was off
        torch.autograd.grad(out, net.weight)
    assert len(seen) > 1
    assert set(seen) == {torch.float32}
