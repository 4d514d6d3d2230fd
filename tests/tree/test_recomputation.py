"""torch.utils.checkpoint in modules that are called with values: it computes again with those, or raises."""

import functools

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.testing import assert_close

import diffopt
from diffopt import tree
from diffopt.autodiff import grad, value_and_grad

non_reentrant = functools.partial(torch_checkpoint.checkpoint, use_reentrant=False)


class Blocks(nn.Module):
    """Blocks that are computed again, or not; the first and the last share their weights."""

    def __init__(self, call, *, norm=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout), *([nn.BatchNorm1d(4)] if norm else [])]
        block = nn.Sequential(*layers)
        self.blocks, self.call = nn.ModuleList([block, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), block]), call
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return x


def plainly(block, x):
    return block(x)


def ours(block, x):
    return diffopt.checkpoint(block)(x)


def setting(call, **options):
    function, params, buffers = tree.from_module(Blocks(call, **options))
    generator = torch.Generator().manual_seed(1)
    params = tree.map(lambda p: p + torch.randn(p.shape, generator=generator, dtype=p.dtype), params)  # not the own
    return function, params, buffers, torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


def slope(call, **options):
    function, params, buffers, x = setting(call, **options)

    def loss(params):
        out, new = function(params, buffers, x)
        return out.pow(2).sum(), new

    torch.manual_seed(2)
    (value, new), gradient = value_and_grad(loss, has_aux=True)(params)
    return value, gradient, new


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"dropout": 0.5}], ids=str)
def test_gradients_are_those_of_the_values_given(options):
    assert_close(slope(non_reentrant, **options), slope(plainly, **options))


def test_blocks_are_really_computed_again():
    calls = []

    def counted(block, x):
        return non_reentrant(lambda x: calls.append(1) or block(x), x)

    slope(counted)
    assert len(calls) == 6


def test_second_derivatives_and_graphs_that_are_kept():
    def squared_slope(call):
        function, params, buffers, x = setting(call)
        inner = grad(lambda params: function(params, buffers, x)[0].pow(2).sum())
        return grad(lambda params: sum(g.pow(2).sum() for g in inner(params).values()))(params)

    assert_close(squared_slope(non_reentrant), squared_slope(plainly))
    function, params, buffers, x = setting(non_reentrant)
    leaves = [p.requires_grad_() for p in params.values()]
    out = function(params, buffers, x)[0].pow(2).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    assert_close(torch.autograd.grad(out, leaves), first)
    assert_close(dict(zip(params, first, strict=True)), slope(plainly)[1])


def test_a_module_within_a_module_with_values_of_its_own():
    inner, inner_params, inner_buffers, x = setting(non_reentrant)

    class Outer(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.scale, self.call = nn.Parameter(torch.ones((), dtype=torch.float64)), call

        def forward(self, inner_params, x):
            through = lambda x: self.scale * inner(inner_params, inner_buffers, x)[0]  # noqa: E731
            return self.call(through, x).pow(2).sum()

    def slopes(call):
        outer, params, buffers = tree.from_module(Outer(call))
        return grad(lambda p, q: outer(tree.map(lambda v: 3 * v, p), buffers, q, x)[0], argnums=(0, 1))(
            params, inner_params
        )

    assert_close(slopes(non_reentrant), slopes(lambda fn, x: fn(x)))


def test_reentrant_checkpoints_raise():
    with pytest.raises(RuntimeError, match="take use_reentrant=False"):
        slope(functools.partial(torch_checkpoint.checkpoint, use_reentrant=True))
    net = Blocks(functools.partial(torch_checkpoint.checkpoint, use_reentrant=True))  # elsewhere as ever
    assert net(torch.ones(3, 4, dtype=torch.float64, requires_grad=True)).shape == (3, 4)


def test_transforms_take_ours_and_refuse_the_other():
    want = slope(plainly)[1]
    for call in (ours, non_reentrant):
        function, params, buffers, x = setting(call)
        loss = lambda params, f=function, b=buffers, x=x: f(params, b, x)[0].pow(2).sum()  # noqa: E731
        if call is ours:
            assert_close(torch.func.grad(loss)(params), want)
        else:
            with pytest.raises(RuntimeError, match="saved tensor hooks"):
                torch.func.grad(loss)(params)


def test_torch_is_left_as_it_was():
    kept = torch_checkpoint._checkpoint_without_reentrant_generator, torch_checkpoint.CheckpointFunction
    slope(non_reentrant)
    function, params, buffers, _ = setting(non_reentrant)
    with pytest.raises(RuntimeError):
        function(params, buffers, torch.ones(3, 5, dtype=torch.float64))
    assert (torch_checkpoint._checkpoint_without_reentrant_generator, torch_checkpoint.CheckpointFunction) == kept
