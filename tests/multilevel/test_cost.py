"""What a hypergradient costs, in evaluations and products."""

import itertools

import pytest
import torch

from diffopt import random
from diffopt.linalg import CG
from diffopt.multilevel import Edge, Implicit, Level, graph
from diffopt.optimizers import sgd

PRODUCTS = 5


def chain(count: int, size: int, response: str, solver: CG):
    """A chain of levels that each read their neighbours, the top all, and a list that grows with every evaluation."""
    calls: list[str] = []
    A = random.normal(random.key(0), (size, size), dtype=torch.float64) / size**0.5
    curvature = torch.linspace(2, 3, size, dtype=torch.float64)  # no solver ends early
    names = [f"{i}" for i in range(count)]

    def loss(name):
        def value(own, *rest):
            calls.append(name)
            return own @ (curvature * own) + sum((own @ A) @ other for other in rest[:-1])

        return value

    levels = {
        name: Level(loss(name), sgd(0.1), reads=(*names[max(i - 1, 0) : i], *names[i + 1 : i + 2 if i else count]))
        for i, name in enumerate(names)
    }
    program = graph(levels, [Edge(a, b, Implicit(solver), response=response) for a, b in itertools.pairwise(names)])
    starts = {n: random.normal(random.key(i), (size,), dtype=torch.float64) for i, n in enumerate(names)}
    return program, program.init(random.key(0), starts), calls


def cost(count: int, response: str, size: int = 6) -> tuple[int, int]:
    solver = CG(max_steps=PRODUCTS, rtol=0.0) if response == "partial" else CG(rtol=1e-12)
    program, state, calls = chain(count, size, response, solver)
    _, reports = program.hypergrad("0")(state)
    return len(calls), sum(int(report.steps) for report in reports.values())


def test_partial_responses_cost_one_solve_a_level():
    costs = [cost(count, "partial") for count in (2, 3, 4, 5)]
    assert [products for _, products in costs] == [PRODUCTS * levels for levels in (1, 2, 3, 4)]
    evaluations = [calls for calls, _ in costs]
    assert len({b - a for a, b in itertools.pairwise(evaluations)}) == 1


def test_total_responses_cost_a_product_of_solves():
    """The middle level's Hessian holds the lowest level's response: exact, and dearer."""
    two, three, four = (cost(count, "total")[0] for count in (2, 3, 4))
    assert four - three > 2 * (three - two) > 0


@pytest.mark.parametrize("size", [4, 40])
def test_the_cost_does_not_depend_on_the_dimension(size):
    assert cost(3, "partial", size) == cost(3, "partial", 6)
