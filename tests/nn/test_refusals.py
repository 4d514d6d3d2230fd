"""diffopt.nn: what ImplicitModule and MetaOptimizer refuse, and by which words."""

import pytest
import torch
from torch import nn
from torch.func import vmap

import diffopt
from diffopt.linalg import CG
from diffopt.nn import ImplicitModule, MetaOptimizer
from nn.problems import Adapted, Ridge, RidgeEquation, X, Y, leaf, mlp, numbers


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
        ({"objective": lambda self, x, y: self.w}, TypeError, r"0-d .* got shape \(3,\)"),
        ({"objective": lambda self, x, y: 1.0}, TypeError, "got float"),
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
        Holder(mlp(2), mlp(2))
    inner = Ridge(leaf(0.7))
    inner.w.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters of its own"):
        inner.solve(X, Y)

    class Mixed(Ridge):
        def __init__(self, net):
            super().__init__(1.0)
            self.net = nn.Sequential(net, nn.Linear(1, 1))

    with pytest.raises(ValueError, match="and others too"):
        Mixed(mlp(2))

    class Late(Ridge):
        def __init__(self, net):
            super().__init__(1.0)
            self.net = nn.Sequential()
            self.net.append(net)

    with pytest.raises(ValueError, match=r"'net.0.0.weight'.* were given"):
        Late(mlp(2)).solve(X, Y)


def test_refuses_random_objectives():
    class Dropped(Adapted):
        def forward(self, x):
            return torch.nn.functional.dropout(self.net(x), 0.5, self.training)

    meta_net = mlp(2)
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


@pytest.mark.parametrize(
    ("params", "optimizer", "error", "match"),
    [
        (lambda: mlp().parameters(), diffopt.sgd(0.1), TypeError, "Give the module itself"),
        (mlp, diffopt.sgd, TypeError, "call the factory"),
        (mlp, torch.optim.SGD(mlp().parameters()), TypeError, "GradientTransformation"),
        (nn.Tanh, diffopt.sgd(0.1), ValueError, "requires grad"),
        (dict, diffopt.sgd(0.1), ValueError, "empty tree"),
        (lambda: {"w": torch.ones(2)}, diffopt.sgd(0.1), ValueError, r"params\['w'\]"),
        (lambda: (lambda w: [w, w])(torch.ones(2, requires_grad=True)), diffopt.sgd(0.1), ValueError, "nowhere else"),
        (lambda: (lambda m: [m, m])(mlp()), diffopt.sgd(0.1), ValueError, r"params\[1\]"),
    ],
)
def test_refuses_what_it_cannot_step(params, optimizer, error, match):
    with pytest.raises(error, match=match):
        MetaOptimizer(params(), optimizer)


def test_refuses_losses_that_have_no_gradient():
    net = mlp()
    inner = MetaOptimizer(net, diffopt.sgd(0.1))
    with pytest.raises(TypeError, match="tensor"):
        inner.step(1.0)
    with pytest.raises(ValueError, match="number"):
        inner.step(net(X))
    with pytest.raises(ValueError, match="requires_grad=False"):
        inner.step(torch.ones(()))
    loss = (net(X)[:, 0] - Y).square().mean()
    with pytest.raises(TypeError, match=r"real .* got torch.complex"):
        inner.step(loss + 0j)
    with torch.no_grad(), pytest.raises(RuntimeError, match="grad mode"):
        inner.step(loss)
    with pytest.raises(RuntimeError, match=r"diffopt\.step"):
        vmap(lambda x: inner.step(net(x).sum()))(X)
    net[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"params\['0.*no longer require grad"):
        inner.step(net(X).sum())
    net[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"no parameter '0\.\w+' any more"):
        inner.step(net(numbers(2, 4)).sum())
