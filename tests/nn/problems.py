"""Modules that several tests share: a small network, ridge regressions that solve for their weights, implicit MAML."""

import copy

import torch
from torch import nn

from diffopt.nn import ImplicitModule

F64 = torch.float64


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def leaf(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


def mlp(width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()


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
