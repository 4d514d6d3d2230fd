"""torch.utils.checkpoint in modules that are called with values: it computes again with those, or raises."""

import functools
import threading

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.testing import assert_close

import diffopt
from diffopt import tree
from diffopt.autodiff import grad, value_and_grad
from diffopt.nn import MetaOptimizer
from diffopt.optimizers import sgd

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


def test_buffers_that_a_block_reads_and_changes():
    class Normed(nn.Module):
        def __init__(self, call):
            super().__init__()
            torch.manual_seed(0)
            norm = nn.utils.parametrizations.spectral_norm
            self.blocks = nn.ModuleList(norm(nn.Linear(4, 4)) for _ in range(2)).double()
            self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
            self.call = call

        def centred(self, block, x):
            y = (block(x) - self.mean).tanh()
            self.mean = 0.5 * self.mean + y.detach().mean(0)
            return y

        def forward(self, x):
            for block in (*self.blocks, self.blocks[0]):
                x = self.call(functools.partial(self.centred, block), x)
            return x

    def slope(call):
        function, params, buffers = tree.from_module(Normed(call))
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)

        def loss(params):
            out, new = function(params, buffers, x)
            return out.pow(2).sum(), new

        return value_and_grad(loss, has_aux=True)(tree.map(lambda p: p + 0.3, params))

    assert_close(slope(non_reentrant), slope(plainly))


def test_modules_that_an_optimizer_moves():
    def slopes(call):
        net = Blocks(call)
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        start, inner = list(net.parameters()), MetaOptimizer(net, sgd(rate))
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
        for _ in range(3):
            inner.step(net(x).pow(2).sum())
        return torch.autograd.grad(net(2 * x).pow(2).sum(), [rate, *start])

    assert_close(slopes(non_reentrant), slopes(plainly))


def test_blocks_that_torch_wraps():
    wrap = pytest.importorskip("torch.distributed._composable").checkpoint

    def slope(wrapped):
        net = Blocks(plainly)
        for block in net.blocks[:2] if wrapped else ():
            wrap(block)
        function, params, buffers = tree.from_module(net)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
        return grad(lambda params: function(params, buffers, x)[0].pow(2).sum())(tree.map(lambda p: 2 * p, params))

    assert_close(slope(True), slope(False))


def test_threads_and_failures_leave_other_modules_alone():
    inside, leave = threading.Event(), threading.Event()

    def waiting(block, x):
        inside.set()
        assert leave.wait(20)
        return non_reentrant(block, x)

    function, params, buffers, x = setting(waiting)
    thread = threading.Thread(target=function, args=(params, buffers, x))
    thread.start()
    assert inside.wait(20)
    function, params, buffers, _ = setting(non_reentrant)
    with pytest.raises(RuntimeError):
        function(params, buffers, torch.ones(3, 5, dtype=torch.float64))
    leaf = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    plain = Blocks(functools.partial(torch_checkpoint.checkpoint, use_reentrant=True))
    assert_close(plain(leaf), Blocks(plainly)(leaf))
    leave.set()
    thread.join()
