"""diffopt.transforms.fusion.inner_loop: steps in place are the same steps, and refused where they would not be."""

import pytest
import torch
from torch.testing import assert_close

from diffopt import tree
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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_step(name, dtype):
    optimizer, params = OPTIMIZERS[name], draw(0, dtype)
    state = optimizer.init(params)
    loop = inner_loop(optimizer, tree.map(torch.clone, params), optimizer.init(params))
    assert loop is not None
    for seed in range(1, 6):
        loop.step(draw(seed, dtype))
        params, state = step(optimizer, draw(seed, dtype), state, params)
        assert_close((loop.params, loop.state), (params, state), rtol=0, atol=0)


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
    assert inner_loop(optimizer, params, optimizer.init(params)) is None


def test_there_is_none_under_transforms():
    optimizer, seen = sgd(0.1), []
    torch.func.vmap(lambda x: seen.append(inner_loop(optimizer, x, optimizer.init(x))) or x)(torch.ones(2, 3))
    torch.func.grad(lambda x: seen.append(inner_loop(optimizer, x, optimizer.init(x))) or x.sum())(torch.ones(3))
    assert seen == [None, None]


@pytest.mark.parametrize(
    "of", [lambda p: p, lambda p: p.flip(0), lambda p: p[:1].expand(4), lambda p: torch.cat([p[1:], p[:1]])]
)
def test_gradients_may_share_memory_with_what_is_written(of):
    optimizer, whole = sgd(0.5, momentum=0.9), torch.tensor([1.0, -2.0, 3.0, 0.5])
    loop = inner_loop(optimizer, whole.clone(), optimizer.init(whole))
    assert loop is not None
    params, state = whole, optimizer.init(whole)
    for _ in range(3):
        loop.step(of(loop.params))
        params, state = step(optimizer, of(params), state, params)
        assert_close(loop.params, params, rtol=0, atol=0)


def test_overlapping_views_of_the_parameters_are_read_before_they_are_written():
    memory = torch.arange(1.0, 6.0)
    loop = inner_loop(sgd(1.0), memory[1:], sgd(1.0).init(memory[1:]))
    assert loop is not None
    loop.step(memory[:-1])
    assert_close(memory, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]))
