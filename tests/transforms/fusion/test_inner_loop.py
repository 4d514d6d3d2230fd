"""diffopt.transforms.fusion.inner_loop: steps in place are the same steps, and refused where they would not be."""

import pytest
import torch
from torch.testing import assert_close

from diffopt import tree
from diffopt.autodiff import grad, value_and_grad
from diffopt.optimizers import adam, adamw, lion, rmsprop, sgd
from diffopt.transforms import masked, step
from diffopt.transforms.fusion import inner_loop

OPTIMIZERS = {
    "sgd": sgd(0.1),
    "momentum": sgd(0.1, momentum=0.9),
    "nesterov": sgd(0.1, momentum=0.9, nesterov=True),
    "adam": adam(0.1),
    "adamw": adamw(0.1, weight_decay=0.01),
}


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 2, generator=generator, dtype=dtype),
        "b": [torch.randn((), generator=generator).to(dtype)],
    }


def bowl(params, target):
    """Not quadratic, with other slopes for each leaf and target."""
    return sum(((p - t) ** 2 + (p * t).cos()).sum() for p, t in zip(*map(tree.leaves, (params, target)), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_step(name, dtype):
    optimizer, params = OPTIMIZERS[name], draw(0, dtype)
    state = optimizer.init(params)
    loop = inner_loop(bowl, optimizer, tree.map(torch.clone, params), optimizer.init(params))
    assert loop is not None
    for seed in range(1, 6):
        target = draw(seed, dtype)
        assert loop.step(target)
        _, gradient = value_and_grad(bowl)(params, target)
        params, state = step(optimizer, gradient, state, params)
        assert_close((loop.params, loop.state), (params, state), rtol=0, atol=0)
        assert not any(leaf.requires_grad for leaf in tree.leaves((loop.params, loop.state)))


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (sgd(torch.tensor(0.1)), torch.ones),
        (sgd(lambda count: 0.1), torch.ones),
        (adam(0.1, eps_root=1e-8), torch.ones),
        (adamw(0.1, mask=True), torch.ones),
        (masked(sgd(0.1), True), torch.ones),
        (lion(0.1), torch.ones),
        (rmsprop(0.1), torch.ones),
        (sgd(0.1), lambda n: torch.ones(n, dtype=torch.bfloat16)),
        (sgd(0.1), lambda n: torch.ones(n, n).mT[:1]),
        (sgd(0.1), lambda n: torch.ones(n).requires_grad_()),
        (sgd(0.1), lambda n: torch.nn.Parameter(torch.ones(n))),
        (sgd(0.1), lambda n: [torch.ones(n) for _ in range(17)]),
        (sgd(0.1), lambda n: [torch.ones(n), torch.ones(n, dtype=torch.float64)]),
        (sgd(0.1), lambda n: ()),
    ],
)
def test_what_does_not_suit_is_left_to_step(optimizer, make):
    params = make(3)
    assert inner_loop(bowl, optimizer, params, optimizer.init(params)) is None


def test_there_is_none_under_transforms():
    optimizer, seen = sgd(0.1), []

    def look(x):
        seen.append(inner_loop(bowl, optimizer, x, optimizer.init(x)))
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    assert seen == [None, None]


def test_a_derivative_that_rides_on_the_gradient_stops_the_loop_before_the_step():
    optimizer, start = sgd(0.5), torch.ones(3)
    loop = inner_loop(lambda x, a: (a * x).sum(), optimizer, start, optimizer.init(start))
    rate = torch.tensor(2.0, requires_grad=True)
    assert loop is not None
    assert loop.step(torch.tensor(2.0))
    assert not loop.step(rate)
    assert not loop.step((3 * rate).view_as(rate))
    assert_close(loop.params, torch.zeros(3), rtol=0, atol=0)
    with torch.no_grad():  # where nobody can ask for it
        assert loop.step(rate)
    assert_close(loop.params, -torch.ones(3), rtol=0, atol=0)
    assert_close(start, torch.ones(3), rtol=0, atol=0)


def test_losses_may_take_derivatives_of_their_own():
    optimizer, start = sgd(0.1), torch.tensor([1.0, 2.0])
    steep = lambda x: (grad(lambda y: (x * y**3).sum())(x) ** 2).sum()  # noqa: E731
    loop = inner_loop(steep, optimizer, start.clone(), optimizer.init(start))
    assert loop is not None
    assert loop.step()
    assert_close(loop.params, start - 0.1 * torch.func.grad(lambda x: 9 * (x**6).sum())(start))


def test_parameters_without_a_slope_stay():
    optimizer, start = sgd(0.1, momentum=0.9), {"used": torch.ones(2), "not": torch.ones(2)}
    loop = inner_loop(
        lambda p, use: p["used"].sum() if use else torch.ones(()), optimizer, start, optimizer.init(start)
    )
    assert loop is not None
    assert loop.step(True)
    assert loop.step(False)
    assert_close(loop.params, {"used": torch.full((2,), 0.81), "not": torch.ones(2)})


class Handed(torch.autograd.Function):
    """A scalar whose gradient is a tensor of the caller's, not a copy of it."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient(x)
        return x.sum()

    @staticmethod
    def backward(ctx, *weights):
        return ctx.gradient, None


@pytest.mark.parametrize(
    "of", [lambda p: p, lambda p: p.flip(0), lambda p: p[:1].expand(4), lambda p: torch.cat([p[1:], p[:1]])]
)
def test_gradients_may_share_memory_with_the_parameters(of):
    optimizer, whole = sgd(0.5, momentum=0.9), torch.tensor([1.0, -2.0, 3.0, 0.5])
    loop = inner_loop(Handed.apply, optimizer, whole, optimizer.init(whole))
    assert loop is not None
    params, state = whole, optimizer.init(whole)
    for _ in range(3):
        assert loop.step(of)
        params, state = step(optimizer, of(params), state, params)
        assert_close(loop.params, params, rtol=0, atol=0)


def as_by_step(loss, start, steps=5):
    """The parameters after some steps of the loop, which have to be those of steps one by one."""
    optimizer = sgd(0.1)
    loop = inner_loop(loss, optimizer, tree.map(torch.clone, start), optimizer.init(start))
    assert loop is not None
    for _ in range(steps):
        assert loop.step()
    params, state = start, optimizer.init(start)
    for _ in range(steps):
        params, state = step(optimizer, value_and_grad(loss)(params)[1], state, params)
    assert_close(loop.params, params)
    return loop.params


def test_losses_see_new_leaves_at_each_step():
    """Autocast remembers casts by leaf, and hooks stay on one; both as if each step were a call of its own."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        as_by_step(lambda w: torch.nn.functional.linear(torch.ones(1, 3), w).pow(2).sum(), torch.ones(2, 3))

    def hooked(w):
        w.register_hook(lambda g: 0.5 * g)
        return (w**2).sum()

    assert_close(as_by_step(hooked, torch.ones(2)), torch.full((2,), 0.9**5))


def test_losses_may_change_the_tree_that_they_are_given():
    def moved(p):
        p["w"] = p["w"] + 1
        return (p["w"] ** 2).sum() + p.pop("b").sum()

    as_by_step(moved, {"w": torch.zeros(2), "b": torch.ones(())})


def test_what_a_loss_keeps_does_not_change():
    seen = []

    def kept(w):
        seen.append(w.detach())
        return (w**2).sum()

    as_by_step(kept, torch.ones(1), steps=4)
    assert_close(torch.cat(seen), torch.tensor([1.0, 0.8, 0.64, 0.512] * 2))
