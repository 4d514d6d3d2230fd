"""diffopt.nn.implicit_module: implicit gradients of modules that solve for their parameters."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

import diffopt
from diffopt.linalg import CG, GMRES, Dense, NormalCG
from diffopt.nn import ImplicitModule, MetaOptimizer, extract_state, recover_state, stop_gradient

F64 = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SLOPES = {"rtol": 1e-6, "atol": 1e-8}  # central differences of width 1e-5, of solves to 1e-12


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X, Y = numbers(6, 3), numbers(6, seed=1)
EYE = torch.eye(3, dtype=F64)


def closed_form(x, y, penalty):
    return torch.linalg.solve(x.T @ x + penalty * EYE, x.T @ y)


class Ridge(ImplicitModule):
    def __init__(self, penalty, start=1.0):
        super().__init__()
        self.penalty = penalty
        self.w = nn.Parameter(torch.full((3,), start, dtype=F64))

    def objective(self, x, y):
        return ((x @ self.w - y) ** 2).sum() + self.penalty * (self.w**2).sum()

    def solve(self, x, y):
        with torch.no_grad():
            self.w.copy_(closed_form(x, y, self.penalty))
        return self


class RidgeEquation(Ridge):
    objective = ImplicitModule.objective

    def optimality(self, x, y):
        return (x.T @ (x @ self.w - y) + self.penalty * self.w,)


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


class ByAdam(Ridge):
    def solve(self, x, y):
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0)

        def closure():
            optimizer.zero_grad()
            loss = self.objective(x, y)
            loss.backward()
            return loss

        optimizer.step(closure)


KINDS = [Ridge, RidgeEquation, NamedEquation, TensorEquation, ByCG, ByGMRES, ByNormalCG, ByDense, ByAdam]


def leaf(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


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
    penalty = leaf(0.7)
    inner, starts = Ridge(penalty), []

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


class Adapted(ImplicitModule):
    """Implicit MAML, as TorchOpt's documentation shows it: a copy of a net that stays close to it."""

    def __init__(self, meta_net, strength=2.0, steps=80, rate=0.2):
        super().__init__()
        self.meta_net = meta_net
        self.net = copy.deepcopy(meta_net)
        self.strength, self.steps, self.rate = strength, steps, rate

    def forward(self, x):
        return self.net(x)

    def objective(self, x, y):
        pairs = zip(self.parameters(), self.meta_parameters(), strict=True)
        return (self(x)[:, 0] - y).square().mean() + self.strength / 2 * sum((p - q).square().sum() for p, q in pairs)

    def solve(self, x, y):
        params = tuple(self.parameters())
        optimizer = torch.optim.SGD(params, lr=self.rate)
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.objective(x, y).backward(inputs=params)
            optimizer.step()
        return self


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()


def outer(meta_net):
    inner = Adapted(meta_net)
    return (inner.solve(X, Y)(2 * X)[:, 0] - Y).square().mean()


def test_imaml_agrees_with_finite_differences():
    meta_net = mlp()
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


def test_imaml_equals_the_functional_path():
    meta_net = mlp()
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
    meta_net = mlp()
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
    meta_net = mlp().train(training)
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
            self.norm = nn.BatchNorm1d(1, affine=False).double()

        def forward(self, x):
            return self.norm(self.net(x))

    meta_net = mlp()
    inner = Normed(meta_net)
    inner.solve(X, Y)
    count = int(inner.norm.num_batches_tracked)
    inner(X).square().sum().backward()
    assert int(inner.norm.num_batches_tracked) == count + 1 == inner.steps + 1
    assert all(p.grad.isfinite().all() for p in meta_net.parameters())


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


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_left_behind(backward):
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


def test_no_graph_is_left_behind():
    class Hook:
        def __call__(self, *_):
            pass

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


@settings(max_examples=15, deadline=None)
@given(value=st.floats(0.1, 5.0), seed=st.integers(0, 100))
def test_slopes_of_random_problems(value, seed):
    x, y, penalty = numbers(4, 3, seed=seed), numbers(4, seed=seed + 1), leaf(value)
    expected = torch.func.grad(lambda p: closed_form(x, y, p).sum())(penalty.detach())
    (slope,) = torch.autograd.grad(Ridge(penalty).solve(x, y).w.sum(), penalty)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)


def subclass(base=Ridge, **methods):
    return type("Kind", (base,), methods)


def test_refuses_classes_that_define_no_problem():
    with pytest.raises(TypeError, match="one of `objective` and `optimality`; it defines none"):
        subclass(ImplicitModule, solve=lambda self: None)()
    with pytest.raises(TypeError, match="objective and optimality"):
        subclass(optimality=lambda self, x, y: self.w)(leaf(0.7))
    with pytest.raises(TypeError, match="must define `solve`"):
        subclass(ImplicitModule, objective=lambda self: None)()
    with pytest.raises(TypeError, match="linear_solver"):
        type("Kind", (Ridge,), {}, linear_solver=CG)


@pytest.mark.parametrize(
    ("methods", "error", "match"),
    [
        ({"solve": lambda self, x, y: 3.0}, TypeError, "return self or nothing; got float"),
        ({"objective": lambda self, x, y: self.w}, ValueError, r"0-d tensor\); got \(3,\)"),
        ({"objective": lambda self, x, y: 1.0}, ValueError, "got float"),
        ({"solve": lambda self, x, y: setattr(self, "w", nn.Parameter(torch.ones(2)))}, ValueError, r"shape \(3,\)"),
    ],
)
def test_refuses_what_subclasses_return(methods, error, match):
    inner = subclass(**methods)(leaf(0.7))
    w = inner.w
    with pytest.raises(error, match=match):
        inner.solve(X, Y)
    if "solve" in methods:
        assert inner.w is w
    assert inner.penalty.requires_grad


def test_refuses_an_optimality_unlike_the_parameters():
    def inner(found):
        return subclass(RidgeEquation, optimality=lambda self, x, y: found(self))(leaf(0.7))

    with pytest.raises(ValueError, match=r"name the parameters \['w'\]; got \['v'\]"):
        inner(lambda self: {"v": self.w}).solve(X, Y)
    with pytest.raises(ValueError, match="one equation for each unknown"):
        inner(lambda self: (self.w, self.w)).solve(X, Y)
    with pytest.raises(ValueError, match="one equation for each unknown"):
        inner(lambda self: self.w[:2]).solve(X, Y)
    for found in (None, 3.0):
        with pytest.raises(ValueError, match=r"a dict from the names \['w'\], or a tuple"):
            inner(lambda self, found=found: found).solve(X, Y)


def test_refuses_problems_without_parameters():
    class Holder(Ridge):
        def __init__(self, *parts, name="extra"):
            super().__init__(1.0)
            setattr(self, name, parts[0] if len(parts) == 1 else list(parts))

    with pytest.raises(ValueError, match="nothing to have a gradient"):
        Ridge(0.7).solve(X, Y)
    with pytest.raises(ValueError, match=r"`extra` holds .* in a list"):
        Holder(leaf(1.0), leaf(2.0))
    with pytest.raises(ValueError, match=r"`extra` holds .* in a list"):
        Holder(mlp(), mlp())
    inner = Ridge(leaf(0.7))
    inner.w.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters of its own"):
        inner.solve(X, Y)

    class Mixed(Ridge):
        def __init__(self, net):
            super().__init__(1.0)
            self.net = nn.Sequential(net, nn.Linear(1, 1))

    with pytest.raises(ValueError, match="and others too"):
        Mixed(mlp())

    class Late(Ridge):
        def __init__(self, net):
            super().__init__(1.0)
            self.net = nn.Sequential()
            self.net.append(net)

    with pytest.raises(ValueError, match=r"'net.0.0.weight'.* were given"):
        Late(mlp()).solve(X, Y)


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


def test_refuses_random_objectives():
    class Dropped(Adapted):
        def forward(self, x):
            return torch.nn.functional.dropout(self.net(x), 0.5, self.training)

    meta_net = mlp()
    inner = Dropped(meta_net, steps=2)
    with pytest.raises(ValueError, match="`objective` draws random numbers"):
        inner.solve(X, Y)
    inner.eval().solve(X, Y)(X).sum().backward()
    assert meta_net[0].weight.grad.norm() > 0


def test_refuses_hidden_modules():
    class Hiding(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.hidden = [nn.Linear(3, 1, bias=False).double()]

        def objective(self, x, y):
            return super().objective(x, y) + (self.hidden[0](x) * self.w.sum()).sum()

    with pytest.raises(ValueError, match="Its gradient would be lost"):
        Hiding(leaf(0.7)).solve(X, Y)


def test_refuses_hidden_tensors_and_transforms():
    hidden = leaf(0.7)
    kind = subclass(objective=lambda self, x, y: ((x @ self.w - y) ** 2).sum() + hidden * (self.w**2).sum())
    with pytest.raises(ValueError, match="Its gradient would be lost"):
        kind(leaf(0.7)).solve(X, Y)
    with pytest.raises(RuntimeError, match=r"custom_root"):
        vmap(lambda y: Ridge(leaf(0.7)).solve(X, y).w)(Y.expand(2, 6))
