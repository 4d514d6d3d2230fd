"""diffopt.solvers.fixed_point: fixed points by every solver, their derivatives, and maps that do not contract."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt.implicit import Implicit, OneStep, Unrolled
from diffopt.linalg import Neumann
from diffopt.solvers import SQUAREM, Aitken, Anderson, FixedPointIteration, SolverError, fixed_point
from diffopt.solvers.solution import CONVERGED, MAX_STEPS, NONFINITE

DOTTIE = 0.7390851332151607
EXACT = {"rtol": 0.0, "atol": 1e-13}
SOLVERS = {
    "picard": FixedPointIteration(), "damped": FixedPointIteration(0.7), "anderson": Anderson(),
    "anderson, damped": Anderson(2, 0.9), "squarem": SQUAREM(), "aitken": Aitken(),
}  # fmt: skip
VECTOR = [name for name in SOLVERS if name != "aitken"]


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def dottie(theta, solver, adjoint=None):
    def fn(x, t):
        return torch.cos(x) + t

    return fixed_point(fn, number(0.5), (theta,), solver=solver, adjoint=adjoint, **EXACT).value


def affine(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, generator=generator, dtype=torch.float64)
    M = 0.45 * M / torch.linalg.eigvals(M).abs().max()
    return M, torch.randn(n, generator=generator, dtype=torch.float64)


def rotation(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@pytest.mark.parametrize("name", SOLVERS)
def test_cosine_and_its_derivatives_by_both_adjoints(name):
    solver = SOLVERS[name]
    theta = torch.tensor([0.0, 0.6], dtype=torch.float64)
    values = vmap(lambda t: dottie(t, solver))(theta)
    assert abs(values[0].item() - DOTTIE) < 2e-13
    slope, curvature = 1 / (1 + values.sin()), -values.cos() / (1 + values.sin()) ** 3
    torch.testing.assert_close(vmap(grad(lambda t: dottie(t, solver)))(theta), slope, rtol=1e-11, atol=0)
    torch.testing.assert_close(vmap(hessian(lambda t: dottie(t, solver)))(theta), curvature, rtol=1e-10, atol=0)
    unrolled = vmap(grad(lambda t: dottie(t, solver, Unrolled())))(theta)
    torch.testing.assert_close(unrolled, slope, rtol=1e-9, atol=0)  # lags behind the iterates by about k ulps
    step = 1e-6
    differences = (dottie(theta[0] + step, solver) - dottie(theta[0] - step, solver)) / (2 * step)
    torch.testing.assert_close(slope[0], differences, rtol=1e-6, atol=0)


def test_cosine_at_its_other_end():
    value = dottie(number(math.pi / 2), Anderson())
    torch.testing.assert_close(value, number(math.pi / 2), rtol=1e-7, atol=0)  # a double root of T(T(x)) - x
    torch.testing.assert_close(
        grad(lambda t: dottie(t, Anderson()))(number(math.pi / 2)), number(0.5), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", VECTOR)
def test_affine_maps_of_200_unknowns(name):
    M, b = affine()
    exact = torch.linalg.solve(torch.eye(200, dtype=torch.float64) - M, b)

    def f(b):
        return fixed_point(lambda x, b: M @ x + b, torch.zeros_like(b), (b,), solver=SOLVERS[name], **EXACT).value

    torch.testing.assert_close(f(b), exact, rtol=0, atol=1e-11)
    weight = torch.linspace(-1, 1, 200, dtype=torch.float64)
    expected = torch.linalg.solve(torch.eye(200, dtype=torch.float64) - M.mT, weight)
    torch.testing.assert_close(grad(lambda b: weight @ f(b))(b), expected, rtol=0, atol=1e-11)


def test_the_whole_jacobian_of_an_affine_map():
    M, b = affine()

    def f(b, adjoint=None):
        return fixed_point(lambda x: M @ x + b, torch.zeros_like(b), adjoint=adjoint, **EXACT).value

    inverse = torch.linalg.inv(torch.eye(200, dtype=torch.float64) - M)
    torch.testing.assert_close(jacrev(f)(b), inverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacfwd(f)(b), inverse, rtol=0, atol=1e-12)
    series = jacrev(lambda b: f(b, Implicit(Neumann(60))))(b)
    torch.testing.assert_close(series, inverse, rtol=0, atol=1e-11)


def test_one_step_is_the_derivative_of_the_map():
    M, b = affine(5)
    found = jacrev(lambda b: fixed_point(lambda x: M @ x + b, torch.zeros_like(b), adjoint=OneStep(), **EXACT).value)(b)
    torch.testing.assert_close(found, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("angle", [0.3, 1.0, math.pi / 2, 3.0])
def test_anderson_finds_the_centre_of_a_rotation(angle):
    R, centre = rotation(angle), torch.tensor([1.0, 2.0], dtype=torch.float64)
    start = torch.tensor([5.0, -3.0], dtype=torch.float64)

    def f(c, adjoint=None):
        return fixed_point(lambda x, c: R @ (x - c) + c, start, (c,), solver=Anderson(), adjoint=adjoint, **EXACT)

    solution = f(centre)
    torch.testing.assert_close(solution.value, centre, rtol=1e-11, atol=0)
    assert solution.stats.steps <= 6
    for adjoint in (Implicit(), Unrolled()):
        found = jacrev(lambda c: f(c, adjoint).value)(centre)  # noqa: B023
        torch.testing.assert_close(found, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    with pytest.raises(SolverError):
        fixed_point(lambda x: R @ (x - centre) + centre, start, solver=FixedPointIteration(), max_steps=50)


def test_aitken_converges_where_the_map_repels():
    solution = fixed_point(lambda x: x**2 - 1, torch.tensor([1.4, -0.5], dtype=torch.float64), solver=Aitken(), **EXACT)
    golden = (1 + math.sqrt(5)) / 2
    expected = torch.tensor([golden, 1 - golden], dtype=torch.float64)
    torch.testing.assert_close(solution.value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_is_the_loop_and_lanes_stop_on_their_own(name):
    weights = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    start = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def run(w):
        solution = fixed_point(lambda x: w * torch.cos(x) + 0.1 * w * x.sum(), start, solver=SOLVERS[name], **EXACT)
        return solution.value, solution.stats.steps

    values, steps = vmap(run)(weights)
    singles = [run(w) for w in weights]
    torch.testing.assert_close(values, torch.stack([v for v, _ in singles]), rtol=1e-12, atol=1e-13)
    assert steps.tolist() == [s.item() for _, s in singles]
    assert len(set(steps.tolist())) > 1


@pytest.mark.parametrize("name", SOLVERS)
def test_stepping_by_hand_is_the_verb(name):
    start = torch.tensor([0.3, 0.8], dtype=torch.float64)
    solution = fixed_point(torch.cos, start, solver=SOLVERS[name], **EXACT)
    state = SOLVERS[name].init(torch.cos, start)
    for _ in range(int(solution.stats.steps)):
        state = SOLVERS[name].step(torch.cos, state)
    assert all(torch.equal(x, y) for x, y in zip(state, solution.state, strict=True))


MAKERS = {
    "picard": FixedPointIteration,
    "anderson": lambda d: Anderson(2, damping=d),
    "ridge": lambda d: Anderson(2, ridge=0.1 * d),
}


@pytest.mark.parametrize("name", MAKERS)
def test_hyperparameters_are_differentiated_when_unrolled(name):
    start = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def f(d):
        return fixed_point(lambda x: torch.cos(x) + 0.1 * x.prod(), start, solver=MAKERS[name](d), adjoint=Unrolled(),
                           throw=False, max_steps=4, rtol=0.0, atol=0.0).value.sum()  # fmt: skip

    d, h = number(0.6), 1e-6
    torch.testing.assert_close(grad(f)(d), (f(d + h) - f(d - h)) / (2 * h), rtol=1e-6, atol=1e-9)
    assert grad(f)(d) != 0


def test_trees_and_failures():
    start = {"u": torch.ones(2, dtype=torch.float64), "v": number(0.5)}
    solution = fixed_point(lambda x: {"u": torch.cos(x["u"]), "v": torch.cos(x["v"])}, start, **EXACT)
    torch.testing.assert_close(solution.value["u"], torch.full((2,), DOTTIE, dtype=torch.float64))
    with pytest.raises(SolverError, match="max_steps is too small"):
        fixed_point(lambda x: 2 * x + 1, start["u"], solver=FixedPointIteration(), max_steps=20)
    diverged = fixed_point(lambda x: 2 * x + 1, start["u"], solver=FixedPointIteration(), throw=False, max_steps=20)
    assert diverged.result == MAX_STEPS
    assert torch.equal(diverged.value, start["u"])  # the best it saw
    assert fixed_point(lambda x: (x - 2).sqrt(), start["u"], throw=False).result == NONFINITE
    assert fixed_point(lambda x: x.clamp(max=1.0), 3 * start["u"]).result == CONVERGED


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="For equations use `root`"):
        fixed_point(lambda x: x[:2], torch.ones(3))
    with pytest.raises(ValueError, match="memory"):
        Anderson(0)
