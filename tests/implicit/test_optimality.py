"""diffopt.implicit.optimality: each map vanishes at the solution, on trees, and gives its derivative."""

import pytest
import torch
from torch.func import jacrev

from diffopt.implicit import (
    KKT,
    custom_root,
    fixed_point_map,
    kkt_map,
    projected_map,
    proximal_map,
    root_jvp,
    root_vjp,
    stationarity_map,
)
from diffopt.solvers import minimize

F64 = torch.float64


def f64(*values):
    return torch.tensor(values, dtype=F64)


def soft(x, scaling):
    return x.sign() * (x.abs() - scaling).clamp(min=0)


def loss(x, a):
    return 1.5 * (x["p"] ** 2).sum() + (x["q"] - a) ** 2 + x["p"].sum() * x["q"] / 4


POINT = {"p": f64(0.3, -0.7), "q": f64(1.2)[0]}
SCALE = f64(0.5)[0]


def test_stationarity_is_the_gradient_of_a_tree():
    found = stationarity_map(loss)(POINT, SCALE)
    assert torch.allclose(found["p"], 3 * POINT["p"] + POINT["q"] / 4)
    assert torch.allclose(found["q"], 2 * (POINT["q"] - SCALE) + POINT["p"].sum() / 4)


def test_fixed_points():
    found = fixed_point_map(lambda x, a: {"p": a * x["p"], "q": torch.cos(x["q"])})(POINT, SCALE)
    assert torch.allclose(found["p"], POINT["p"] / 2)
    assert torch.allclose(found["q"], POINT["q"] - torch.cos(POINT["q"]))


@pytest.mark.parametrize("step_size", [1.0, 0.2, torch.tensor(0.05, dtype=F64)])
def test_proximal_and_projected_maps_vanish_at_the_minimizer_for_any_step_size(step_size):
    fn, a = lambda x, a: ((x - a) ** 2).sum(), f64(3.0, 0.2, -1.0)
    lasso = proximal_map(fn, soft, step_size)
    x = f64(2.5, 0.0, -0.5)
    assert torch.allclose(lasso(x, a), torch.zeros(3, dtype=F64), atol=1e-12)
    box = projected_map(fn, lambda x: x.clamp(0, 1), step_size)
    y = f64(1.0, 0.2, 0.0)
    assert torch.allclose(box(y, a), torch.zeros(3, dtype=F64), atol=1e-12)
    for equation, point, slopes in ((lasso, x, f64(1, 0, 1)), (box, y, f64(0, 1, 0))):
        assert torch.allclose(root_vjp(equation, point, (a,), torch.ones(3, dtype=F64))[0], slopes)
        assert torch.allclose(root_jvp(equation, point, (a,), (torch.ones(3, dtype=F64),)), slopes)


def kkt_problem():
    equality = lambda x, a: {"e": x["p"].sum() + x["q"] - a}  # noqa: E731
    inequality = lambda x, a: (x["p"] - 0.1, -x["q"][None])  # noqa: E731
    return equality, inequality


def test_kkt_map_of_trees_vanishes_where_minimize_ends():
    equality, inequality = kkt_problem()
    start = {"p": torch.zeros(2, dtype=F64), "q": torch.zeros((), dtype=F64)}
    found = minimize(loss, start, (SCALE,), equality=equality, inequality=inequality, rtol=0.0, atol=1e-10)
    point = KKT(found.value, *found.dual)
    residual = kkt_map(loss, equality, inequality)(point, SCALE)
    assert isinstance(residual, KKT)
    for part in (residual.primal["p"], residual.primal["q"], residual.equality["e"], *residual.inequality):
        assert part.abs().max() < 1e-9
    solve = custom_root(kkt_map(loss, equality, inequality))(lambda init, a: point)
    by_map = jacrev(lambda a: solve(None, a).primal["p"])(SCALE)
    by_verb = jacrev(
        lambda a: minimize(loss, start, (a,), equality=equality, inequality=inequality).value["p"]
    )(SCALE)  # fmt: skip
    assert torch.allclose(by_map, by_verb, atol=1e-8)


def test_kkt_map_says_all_conditions_at_once():
    F = kkt_map(lambda x: (x**2).sum(), inequality=lambda x: 1 - x)
    assert torch.equal(F(KKT(f64(1.0), (), f64(2.0))).inequality, f64(0.0))
    assert torch.equal(F(KKT(f64(3.0), (), f64(0.0))).inequality, f64(0.0)), "slack, and no multiplier"
    assert F(KKT(f64(0.0), (), f64(0.0))).inequality == -1.0, "violated"
    assert F(KKT(f64(1.0), (), f64(-1.0))).inequality == -1.0, "a negative multiplier"
    assert F(KKT(f64(3.0), (), f64(1.0))).inequality == 1.0, "not complementary"
    only = kkt_map(lambda x: (x**2).sum())(KKT(f64(1.0)))
    assert (only.equality, only.inequality) == ((), ())
