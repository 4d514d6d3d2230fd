"""diffopt.nn: neither modules nor graphs outlive their last use."""

import gc
import itertools
import weakref

import pytest

import diffopt
from diffopt import tree
from diffopt.nn import MetaOptimizer, stop_gradient
from nn.problems import Ridge, X, Y, leaf, mlp


class Hook:
    """A hook of a graph's node, which lives as long as that does."""

    def __call__(self, *_):
        pass


@pytest.mark.parametrize("backward", [True, False])
def test_no_module_that_solved_is_left_behind(backward):
    penalty, gone = leaf(0.7), []
    for _ in range(10):
        inner = Ridge(penalty)
        inner.solve(X, Y)
        loss = inner.solve(X, Y).w.sum()
        if backward:
            loss.backward()
        gone += [weakref.ref(inner)]
        del inner, loss
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_no_graph_of_a_solve_is_left_behind():
    alive, penalty = weakref.WeakSet(), leaf(0.7)
    inner = Ridge(penalty)
    for _ in range(100):
        inner.solve(X, Y)
        hook = Hook()
        inner.w.grad_fn.register_hook(hook)
        alive.add(hook)
        del hook
        assert len(alive) == 1
        stop_gradient(inner)
        assert not alive


def test_no_graph_of_a_step_is_left_behind():
    """Each graph holds hooks, which live as long as it does; graphs die without a backward pass."""

    def watch(*tensors):
        for t in tensors:
            hook = Hook()
            t.grad_fn.register_hook(hook)
            alive.add(hook)

    alive, counts, net = weakref.WeakSet(), [], mlp()
    inner = MetaOptimizer(net, diffopt.adam(0.01))
    for _ in range(100):
        for _ in range(2):
            loss = (net(X)[:, 0] - Y).square().mean()
            watch(loss)
            inner.step(loss)
            watch(*net.parameters(), *(t for t in tree.leaves(inner.state) if t.grad_fn is not None))
        del loss
        during = len(alive)
        stop_gradient(net)
        stop_gradient(inner)
        counts.append((during, len(alive)))
    assert counts[0][0] > 20
    assert counts == [(counts[0][0], 0)] * 100
    assert all(t.grad_fn is None for t in itertools.chain(net.parameters(), tree.leaves(inner.state)))
