"""diffopt.nn.implicit_module: implicit gradients of modules that solve for their parameters."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffopt
from diffopt.linalg import CG, GMRES, Dense, NormalCG
from diffopt.nn import MetaOptimizer, extract_state, recover_state, stop_gradient
from nn.problems import F64, Adapted, Ridge, RidgeEquation, X, Y, closed_form, leaf, mlp, numbers

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # solves to 1e-12, of problems with condition numbers of some tens
SLOPES = {"rtol": 1e-6, "atol": 1e-8}  # central differences of width 1e-5, of solves to 1e-12


class NamedEquation(RidgeEquation):
    def optimality(self, x, y):
        return {"w": super().optimality(x, y)[0]}


class TensorEquation(RidgeEquation):
    def optimality(self, x, y):
        return super().optimality(x, y)[0]


class ByCG(Ridge, linear_solver=CG(rtol=1e-13)):
    pass


class ByGMRES(RidgeEquation, linear_solver=GMRES(rtol=1e-13)):
    pass


class ByNormalCG(RidgeEquation, linear_solver=NormalCG(rtol=1e-13)):
    pass


class ByDense(Ridge, linear_solver=Dense(), symmetric=False):
    pass


class ByLBFGS(Ridge):
    def solve(self, x, y):
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0)

        def closure():
            optimizer.zero_grad()
            loss = self.objective(x, y)
            loss.backward()
            return loss

        optimizer.step(closure)


KINDS = [Ridge, RidgeEquation, NamedEquation, TensorEquation, ByCG, ByGMRES, ByNormalCG, ByDense, ByLBFGS]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_closed_form(kind):
    penalty, x, y = leaf(0.7), X.clone().requires_grad_(), Y.clone().requires_grad_()
    expected = torch.autograd.grad(closed_form(x, y, penalty).sin().sum(), (penalty, x, y))
    inner = kind(penalty)
    assert inner.solve(x, y) is inner
    torch.testing.assert_close(inner.w, closed_form(x, y, penalty), **EXACT)
    torch.testing.assert_close(torch.autograd.grad(inner.w.sin().sum(), (penalty, x, y)), expected, **EXACT)


def test_second_derivatives():
    penalty = leaf(0.7)
    inner = Ridge(penalty)
    (first,) = torch.autograd.grad(inner.solve(X, Y).w.sin().sum(), penalty, create_graph=True)
    (second,) = torch.autograd.grad(first, penalty)
    value = lambda p: closed_form(X, Y, p).sin().sum()  # noqa: E731
    torch.testing.assert_close(second, torch.func.hessian(value)(penalty.detach()), **EXACT)


def test_solves_again_from_where_it_is():
    penalty, starts = leaf(0.7), []

    class Watched(Ridge):
        def solve(self, x, y):
            starts.append((self.w.detach().clone(), self.w.is_leaf, self.penalty.requires_grad))
            return super().solve(x, y)

    inner = Watched(penalty)
    slopes = [torch.autograd.grad(inner.solve(X, Y).w.sum(), penalty)[0] for _ in range(3)]
    torch.testing.assert_close(slopes[0], slopes[2], **EXACT)
    assert [entry[1:] for entry in starts] == [(True, False)] * 3
    torch.testing.assert_close(starts[0][0], torch.ones(3, dtype=F64))
    torch.testing.assert_close(starts[1][0], closed_form(X, Y, 0.7), **EXACT)
    with torch.no_grad():
        penalty.fill_(2.0)
    (slope,) = torch.autograd.grad(inner.solve(X, Y).w.sum(), penalty)
    expected = torch.func.grad(lambda p: closed_form(X, Y, p).sum())(penalty.detach())
    torch.testing.assert_close(slope, expected, **EXACT)
    assert penalty.grad is None


def test_an_earlier_graph_outlives_a_later_solve():
    penalty = leaf(0.7)
    inner = Ridge(penalty)
    loss = inner.solve(X, Y).w.sum()
    inner.solve(2 * X, Y)
    inner.penalty = leaf(5.0)
    expected = torch.func.grad(lambda p: closed_form(X, Y, p).sum())(penalty.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, penalty)[0], expected, **EXACT)


def outer(meta_net):
    inner = Adapted(meta_net)
    return (inner.solve(X, Y)(2 * X)[:, 0] - Y).square().mean()


def check_slopes(outer, meta_net):
    """Hold the gradient in an entry of each parameter against central differences."""
    outer(meta_net).backward()
    h = 1e-5
    for parameter in meta_net.parameters():
        flat, found = parameter.data.view(-1), parameter.grad.view(-1)
        values = []
        for move in (h, -2 * h):
            flat[0] += move
            values.append(outer(meta_net).item())
        flat[0] += h
        torch.testing.assert_close(found[0].item(), (values[0] - values[1]) / (2 * h), **SLOPES)


def test_imaml_agrees_with_finite_differences():
    check_slopes(outer, mlp(2))


def test_imaml_equals_the_functional_path():
    meta_net = mlp(2)
    outer(meta_net).backward()
    function, start, _ = diffopt.tree.from_module(meta_net)

    def objective(p, start):
        close = sum((p[n] - start[n]).square().sum() for n in p)
        return (function(p, {}, X)[0][:, 0] - Y).square().mean() + close

    def functional(start):
        solved = diffopt.minimize(objective, start, (start,), rtol=0.0, atol=1e-13).value
        return (function(solved, {}, 2 * X)[0][:, 0] - Y).square().mean()

    expected = torch.func.grad(functional)(start)
    torch.testing.assert_close({n: p.grad for n, p in meta_net.named_parameters()}, expected, **EXACT)


def test_imaml_loop_trains():
    meta_net = mlp(2)
    optimizer = torch.optim.Adam(meta_net.parameters(), lr=0.1)
    inner, losses = Adapted(meta_net, steps=15), []
    for _ in range(15):
        total = torch.zeros((), dtype=F64)
        for seed in range(2):
            x = numbers(6, 3, seed=seed)
            y = x @ numbers(3, seed=9)
            with torch.no_grad():
                for p, q in zip(inner.parameters(), inner.meta_parameters(), strict=True):
                    p.data.copy_(q.data)
                    p.detach_().requires_grad_()
            inner.solve(x, y)
            total = total + (inner(x)[:, 0] - y).square().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("training", [True, False])
def test_meta_parameters_are_found_in_both_modes(training):
    meta_net = mlp(2).train(training)
    inner = Adapted(meta_net)
    inner.train(training)
    names = [name for name, _ in inner.named_meta_parameters()]
    assert names == [f"meta_net.{name}" for name, _ in meta_net.named_parameters()]
    assert [id(p) for p in inner.meta_parameters()] == [id(p) for p in meta_net.parameters()]
    assert [name for name, _ in inner.named_parameters()] == [f"net.{name}" for name, _ in meta_net.named_parameters()]
    inner.train(not training)
    assert meta_net.training == training
    inner.solve(X, Y)(X).sum().backward()
    assert all(p.grad.norm() > 0 for p in meta_net.parameters())


def test_meta_parameters_in_containers_and_attributes():
    class Several(Ridge):
        def __init__(self, first, second, third):
            super().__init__(first)
            self.others = nn.ParameterList([second])
            self.late = third * 1.0

        def objective(self, x, y):
            return super().objective(x, y) + (self.others[0] + self.late) * (self.w**2).sum()

        def solve(self, x, y):
            with torch.no_grad():
                self.w.copy_(closed_form(x, y, self.penalty + self.others[0] + self.late))

    first, second, third = leaf(0.2), nn.Parameter(torch.tensor(0.4, dtype=F64)), leaf(0.1)
    inner = Several(first, second, third)
    assert [name for name, _ in inner.named_parameters()] == ["w"]
    assert [name for name, _ in inner.named_meta_parameters()] == ["penalty", "others.0"]
    expected = torch.func.grad(lambda p: closed_form(X, Y, p).sum())(torch.tensor(0.7, dtype=F64))
    found = torch.autograd.grad(inner.solve(X, Y).w.sum(), (first, second, third))
    torch.testing.assert_close(found, (expected,) * 3, **EXACT)


def test_deep_copies_work_before_and_after_a_solve():
    penalty = leaf(0.5) * 1.0
    inner = Ridge(penalty)
    for _ in range(2):
        twin = copy.deepcopy(inner)
        assert twin.w.is_leaf
        assert twin.w is not inner.w
        assert twin.penalty is not penalty
        torch.testing.assert_close(twin.w, inner.w)
        shared = copy.deepcopy(inner, {id(penalty): penalty})
        (slope,) = torch.autograd.grad(shared.solve(X, Y).w.sum(), penalty, retain_graph=True)
        (own,) = torch.autograd.grad(twin.solve(X, Y).w.sum(), twin.penalty)
        torch.testing.assert_close(slope, own, **EXACT)
        inner.solve(X, Y)
    again = pickle.loads(pickle.dumps(Ridge(leaf(0.5))))
    torch.testing.assert_close(again.solve(X, Y).w, inner.w, **EXACT)


def test_rolls_back_and_stops():
    penalty = leaf(0.5)
    inner = Ridge(penalty)
    start, w = extract_state(inner), inner.w
    inner.solve(X, Y)
    solved = extract_state(inner)
    recover_state(inner, start)
    assert inner.w is w
    torch.testing.assert_close(w, torch.ones_like(w))
    recover_state(inner, solved)
    assert torch.autograd.grad(inner.w.sum(), penalty, retain_graph=True)[0] != 0
    stop_gradient(inner)
    assert inner.w.is_leaf
    assert set(inner.state_dict()) == {"w"}
    inner.solve(X, Y)


def test_what_the_module_is_at_the_solve_counts():
    class Moded(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.register_buffer("scale", torch.tensor(1.0, dtype=F64))
            self.factor, self.calls = 1.0, []

        def objective(self, x, y):
            weight = self.factor * self.scale * (1.0 if self.training else 5.0)
            return ((x @ self.w - y) ** 2).sum() + weight * self.penalty * (self.w**2).sum()

        def solve(self, x, y):
            self.calls.append(1)
            self.scale.add_(0.5)
            with torch.no_grad():
                self.w.copy_(closed_form(x, y, self.factor * self.scale * self.penalty))

    penalty = leaf(0.6)
    inner = Moded(penalty)
    loss = inner.solve(X, Y).w.sum()
    assert inner.calls == [1]
    assert inner.scale == 1.5
    inner.eval()
    inner.factor = 7.0
    inner.scale.fill_(100.0)
    expected = torch.func.grad(lambda p: closed_form(X, Y, 1.5 * p).sum())(penalty.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, penalty)[0], expected, **EXACT)


def test_batch_norm_inside():
    class Normed(Adapted, symmetric=False):
        def __init__(self, meta_net):
            super().__init__(meta_net)
            self.norm = nn.BatchNorm1d(1, affine=False, eps=1.0).double()  # a smaller one needs smaller steps

        def forward(self, x):
            return self.norm(self.net(x))

    def outer(meta_net):
        inner = Normed(meta_net)
        count = inner.norm.num_batches_tracked
        inner.solve(X, Y)
        assert count == inner.steps
        loss = (inner(2 * X)[:, 0] - Y).square().mean()
        assert count == inner.steps + 1
        return loss

    check_slopes(outer, mlp(2))


def test_solves_by_a_meta_optimizer():
    class Stepped(Ridge):
        def solve(self, x, y):
            inner = MetaOptimizer(self, diffopt.sgd(0.04))
            for _ in range(600):
                inner.step(self.objective(x, y))
                stop_gradient(self)

    penalty = leaf(0.7)
    expected = torch.func.grad(lambda p: closed_form(X, Y, p).sum())(penalty.detach())
    (slope,) = torch.autograd.grad(Stepped(penalty).solve(X, Y).w.sum(), penalty)
    torch.testing.assert_close(slope, expected, **EXACT)


def test_without_grad_mode_parameters_are_leaves():
    inner = Ridge(leaf(0.7))
    with torch.no_grad():
        inner.solve(X, Y)
    assert isinstance(inner.w, nn.Parameter)
    torch.testing.assert_close(inner.w, closed_form(X, Y, 0.7), **EXACT)


def test_frozen_parameters_stay():
    class Offset(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    inner = Offset(leaf(0.7))
    fixed = inner.fixed
    inner.solve(X, Y)
    assert inner.fixed is fixed


@settings(max_examples=15)
@given(value=st.floats(0.1, 5.0), seed=st.integers(0, 100))
def test_slopes_of_random_problems(value, seed):
    x, y, penalty = numbers(4, 3, seed=seed), numbers(4, seed=seed + 1), leaf(value)
    expected = torch.func.grad(lambda p: closed_form(x, y, p).sum())(penalty.detach())
    (slope,) = torch.autograd.grad(Ridge(penalty).solve(x, y).w.sum(), penalty)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)


def test_tied_parameters_are_one_unknown():
    class Tied(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.again = self.w
            self.listed = [self.w]

        def objective(self, x, y):
            first, second, third = self.w, self.again, self.listed[0]
            return ((x @ first - y) ** 2).sum() + self.penalty * (second * third).sum()

    penalty = leaf(0.7)
    inner = Tied(penalty).solve(X, Y)
    assert inner.w is inner.again is inner.listed[0]
    expected = torch.func.grad(lambda p: closed_form(X, Y, p).sum())(penalty.detach())
    torch.testing.assert_close(torch.autograd.grad(inner.again.sum(), penalty)[0], expected, **EXACT)
