"""Rows of the composition matrix: nested minimizers, and the hypergradients of graphs, against explicit inverses."""

import torch
from torch.func import grad, jacrev

from diffopt import random
from diffopt.implicit import Implicit
from diffopt.linalg import Dense
from diffopt.multilevel import Edge, Level, graph
from diffopt.optimizers import sgd
from diffopt.solvers import NewtonCG, minimize

__all__ = ["MULTILEVEL_ROWS"]

COMPILED = ("compile", "compile(grad)", "compile(grad(grad))", "compile(vmap(grad))")
RAISES = dict.fromkeys(COMPILED, r"depends on data[^'\")]*|cannot be compiled[^'\")]*")


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


MIX = f64([[0.8, -0.5], [0.3, 0.6]])
TURN = f64([[0.4, 0.7], [-0.6, 0.2]])
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def lowest(c, b, a):
    return ((c - MIX @ b - a.sin()) ** 2).sum() / 2 + 0.3 * (c**2).sum()


def nested():
    """Three levels: the middle one is minimized over the response of the lowest, the row is both responses."""

    def below(b, a):
        return minimize(lowest, torch.ones_like(b), (b, a), solver=NewtonCG(), **TIGHT).value

    def middle(b, a):
        return ((below(b, a) - 2 * a) ** 2).sum() / 2 + ((b - TURN @ a) ** 2).sum() / 2

    def operator(a):
        b = minimize(middle, torch.ones_like(a), (a,), solver=NewtonCG(), **TIGHT).value
        return torch.cat([b, below(b, a)]).tanh()

    def reference(a):
        M, eye = MIX / 1.6, torch.eye(2, dtype=a.dtype)  # c = (M b + sin a) / 1.6
        b = torch.linalg.inv(M.mT @ M + eye) @ (M.mT @ (2 * a - a.sin() / 1.6) + TURN @ a)
        return torch.cat([b, M @ b + a.sin() / 1.6]).tanh()

    return operator, (f64([0.7, -0.4]),), reference, RAISES


def hypergrad():
    """The hypergradient as a function of both levels' parameters and of a constant in the lower loss."""

    def upper(a, b, batch):
        return torch.cosh(b).sum() + (a * b).sum() + (a**2).sum()

    def lower(b, a, strength):
        return ((b - MIX @ a.tanh()) ** 2).sum() / 2 + strength.exp() * (b**4).sum() + (b**2).sum() * (a**2).sum() / 4

    def operator(a, b, strength):
        levels = {
            "a": Level(upper, sgd(0.1), reads=("b",)),
            "b": Level(lower, sgd(0.1), reads=("a",)),
        }
        program = graph(levels, [Edge("a", "b", Implicit(Dense()))])
        state = program.init(random.key(0), {"a": a, "b": b})
        return program.hypergrad("a")(state, {"b": strength})[0]

    def reference(a, b, strength):
        H = jacrev(grad(lower))(b, a, strength)
        u = torch.linalg.inv(H) @ grad(upper, argnums=1)(a, b, None)
        return grad(upper)(a, b, None) - jacrev(grad(lower), argnums=1)(b, a, strength).mT @ u

    return operator, (f64([0.7, -0.4]), f64([0.5, 0.8]), f64(-0.6)), reference, None


MULTILEVEL_ROWS = {"minimize, nested": nested, "graph.hypergrad": hypergrad}
