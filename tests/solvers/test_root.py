"""diffopt.solvers.root: solutions, derivatives by every adjoint, lanes, and how failures are told."""

import pytest
import scipy.optimize
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from diffopt.implicit import Detached, Implicit, OneStep, Unrolled
from diffopt.linalg import GMRES
from diffopt.solvers import Broyden, Chord, Newton, SciPyRoot, SolverError, root
from diffopt.solvers.solution import CONVERGED, MAX_STEPS, NONFINITE, STALLED
from problems import equation, reference_root, root_args

A, B = root_args()
X0 = torch.zeros(3, dtype=torch.float64)
SOLVERS = {
    "newton": Newton(), "newton, gmres": Newton(GMRES(rtol=1e-12)), "chord": Chord(), "broyden": Broyden(),
    "broyden, identity": Broyden("identity", 0.5), "scipy": SciPyRoot(), "scipy lm": SciPyRoot("lm"),
}  # fmt: skip
TORCH = [name for name in SOLVERS if "scipy" not in name]
TIGHT = {"rtol": 0.0, "atol": 1e-12}
CLOSE = {"rtol": 1e-8, "atol": 1e-10}  # linear convergence leaves about 10 atol in derivatives


def solved(name, a, b, adjoint=None):
    return root(equation, X0, (a, b), solver=SOLVERS[name], adjoint=adjoint, **TIGHT).value


def assert_close(found, expected, **tolerances):
    torch.testing.assert_close(found, expected, **(CLOSE | tolerances))


@pytest.mark.parametrize("name", SOLVERS)
def test_root_is_the_reference_and_sparse_in_steps(name):
    solution = root(equation, X0, (A, B), solver=SOLVERS[name], **TIGHT)
    assert_close(solution.value, reference_root(A, B))
    assert solution.result == CONVERGED
    assert solution.stats.steps <= 40
    assert solution.stats.error <= 1e-12


@pytest.mark.parametrize("name", SOLVERS)
def test_implicit_derivatives_of_every_solver(name):
    def f(a, b):
        return solved(name, a, b)

    for transform in (jacrev, jacfwd):
        for found, expected in zip(
            transform(f, argnums=(0, 1))(A, B), jacrev(reference_root, argnums=(0, 1))(A, B), strict=True
        ):
            assert_close(found, expected)
    curvature = hessian(lambda b: reference_root(A, b).sum())(B)
    assert_close(hessian(lambda b: f(A, b).sum())(B), curvature)


@pytest.mark.parametrize("name", TORCH)
def test_unrolled_derivatives_of_every_solver(name):
    def f(b):
        return solved(name, A, b, Unrolled()).sum()

    slope, curvature = grad(lambda b: reference_root(A, b).sum())(B), hessian(lambda b: reference_root(A, b).sum())(B)
    assert_close(grad(f)(B), slope)
    assert_close(jvp(f, (B,), (torch.ones_like(B),))[1], slope)
    assert_close(grad(grad(f))(B), curvature, rtol=1e-6)  # second derivatives lag behind the iterates
    leaf = B.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf)
    assert_close(first.detach(), slope)
    assert_close(second, curvature, rtol=1e-6)


@pytest.mark.parametrize("name", ["newton", "chord", "broyden"])
@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=["implicit", "unrolled"])
def test_captured_tensors_are_differentiated(name, adjoint):
    def captured(b):
        return root(lambda x: equation(x, A, b), X0, solver=SOLVERS[name], adjoint=adjoint, **TIGHT).value.sum()

    slope = grad(lambda b: reference_root(A, b).sum())(B)
    assert_close(grad(captured)(B), slope)
    leaf = B.clone().requires_grad_()
    captured(leaf).backward()
    assert_close(leaf.grad, slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(B, torch.ones_like(B))
        assert_close(torch.autograd.forward_ad.unpack_dual(captured(dual)).tangent, slope)


def test_derivatives_agree_with_finite_differences():
    def f(b):
        return solved("newton", A, b)

    step = 1e-6
    assert_close(jacrev(f)(B), (f(B + step) - f(B - step)) / (2 * step), rtol=1e-7, atol=1e-9)


def test_other_adjoints():
    assert solved("newton", A, B.clone().requires_grad_(), Detached()).requires_grad is False
    found = jacrev(lambda a: solved("newton", a, B, OneStep(0.5)))(A)
    assert_close(found, 0.5 * torch.eye(3, dtype=torch.float64))  # dF/da = -I
    last = jacrev(lambda b: solved("newton", A, b, Unrolled(truncate=2)))(B)
    assert_close(last, jacrev(reference_root, argnums=1)(A, B))
    with pytest.raises(ValueError, match="learns the curvature"):
        solved("broyden", A, B, Unrolled(truncate=2))
    with pytest.raises(ValueError, match="cannot be unrolled"):
        solved("scipy", A, B, Unrolled())


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_is_the_loop_and_lanes_stop_on_their_own(name):
    rows = torch.stack([A, 0.1 * A, 1.3 * A, torch.zeros_like(A) + 1e-3])

    def run(a):
        solution = root(equation, X0, (a, B), solver=SOLVERS[name], **TIGHT)
        return solution.value, solution.stats.steps

    values, steps = vmap(run)(rows)
    singles = [run(a) for a in rows]
    torch.testing.assert_close(values, torch.stack([v for v, _ in singles]), rtol=1e-9, atol=1e-11)
    assert steps.tolist() == [s.item() for _, s in singles]
    assert name.startswith("scipy") or len(set(steps.tolist())) > 1
    slopes = vmap(jacrev(lambda a: run(a)[0]))(rows)
    assert_close(slopes, torch.stack([jacrev(reference_root)(a, B) for a in rows]))


def test_nested_vmap_over_mixed_axes():
    strengths = torch.tensor([0.1, 0.3], dtype=torch.float64)
    rows = torch.stack([A, -A, 2 * A])
    grid = vmap(vmap(lambda a, b: solved("newton", a, b), in_dims=(0, None)), in_dims=(None, 0))(rows, strengths)
    for i, b in enumerate(strengths):
        for j, a in enumerate(rows):
            assert_close(grid[i, j], reference_root(a, b))


def test_a_lane_without_derivative_in_a_tracked_solve_is_the_untracked_one():
    rows = torch.stack([A, -A])
    plain = vmap(lambda a: solved("newton", a, B))(rows)
    tracked = vmap(lambda a: solved("newton", a, B, Unrolled()))(rows.clone().requires_grad_())
    assert tracked.requires_grad
    torch.testing.assert_close(tracked.detach(), plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", TORCH)
def test_stepping_by_hand_is_the_verb(name):
    def fn(x):
        return equation(x, A, B)

    solution = root(equation, X0, (A, B), solver=SOLVERS[name], **TIGHT)
    state = SOLVERS[name].init(fn, X0)
    for _ in range(int(solution.stats.steps)):
        state = SOLVERS[name].step(fn, state)
    for mine, verbs in zip(state, solution.state, strict=True):
        torch.testing.assert_close(mine, verbs, rtol=1e-12, atol=1e-14)


def test_trees_history_and_callback():
    seen = []
    start = {"u": torch.zeros(2, dtype=torch.float64), "v": torch.zeros((), dtype=torch.float64)}

    def fn(x):
        value = equation(torch.cat([x["u"], x["v"][None]]), A, B)
        return {"u": value[:2], "v": value[2]}

    solution = root(fn, start, history=True, callback=seen.append, **TIGHT)
    expected = reference_root(A, B)
    assert_close(solution.value["u"], expected[:2])
    assert_close(solution.value["v"], expected[2])
    steps = int(solution.stats.steps)
    assert len(seen) == steps
    assert solution.stats.history[: steps + 1].isfinite().all()
    assert solution.stats.history[steps + 1 :].isnan().all()
    assert solution.stats.history[steps] == solution.stats.error


STANDARD = {  # start, equations
    "rosenbrock": ([-1.2, 1.0], lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])),
    "freudenstein-roth": (
        [6.0, 3.0],
        lambda x: torch.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
                               -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]]),
    ),
    "broyden tridiagonal": (
        [-1.0] * 8,
        lambda x: (3 - 2 * x) * x - torch.cat([x.new_zeros(1), x[:-1]]) - 2 * torch.cat([x[1:], x.new_zeros(1)]) + 1,
    ),
    "discrete boundary value": (
        [-0.1] * 8,
        lambda x: 2 * x - torch.cat([x.new_zeros(1), x[:-1]]) - torch.cat([x[1:], x.new_zeros(1)])
        + (x + torch.arange(1, 9) / 9 + 1) ** 3 / 162,
    ),
    "trigonometric": (
        [0.125] * 8,
        lambda x: 8 - x.cos().sum() + torch.arange(1, 9) * (1 - x.cos()) - x.sin(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("solver", [Newton(), Broyden()], ids=["newton", "broyden"])
@pytest.mark.parametrize("problem", STANDARD)
def test_standard_problems_against_scipy(problem, solver):
    start, fn = STANDARD[problem]
    x0 = torch.tensor(start, dtype=torch.float64)
    solution = root(fn, x0, solver=solver, throw=False, **TIGHT)
    if problem == "trigonometric" and isinstance(solver, Broyden):
        pytest.skip("Broyden's method has no safeguard and wanders off here")
    theirs = scipy.optimize.root(lambda x: fn(torch.as_tensor(x)).numpy(), x0.numpy(), tol=1e-13)
    assert solution.result == CONVERGED
    assert fn(solution.value).abs().max() <= 1e-12
    if theirs.success and problem != "trigonometric":  # which has many roots
        assert_close(solution.value, torch.as_tensor(theirs.x), rtol=1e-7)


def failure(fn, start, **options):
    with pytest.raises(SolverError) as error:
        root(fn, start, **options)
    return root(fn, start, throw=False, **options), str(error.value)


def test_a_singular_jacobian_stalls():
    for solver in (Newton(), Chord(), Broyden()):
        solution, message = failure(lambda x: x**2 + 1, torch.zeros(2, dtype=torch.float64), solver=solver)
        assert solution.result == STALLED
        assert "Jacobian is singular" in message
        assert "throw=False" in message
        assert solution.value.isfinite().all()


def test_nan_is_told():
    solution, message = failure(lambda x: (x - 3).sqrt(), torch.ones(2, dtype=torch.float64))
    assert solution.result == NONFINITE
    assert "outside of the domain" in message
    solution, _ = failure(
        lambda x: x.log() + 20, torch.full((1,), 3.0, dtype=torch.float64)
    )  # a step leaves the domain
    assert solution.result == NONFINITE
    assert solution.value.isfinite().all()


def test_too_few_steps_are_told_and_the_best_is_returned():
    solution, message = failure(lambda x: x**2 - 2, torch.full((1,), 1e3, dtype=torch.float64), max_steps=3)
    assert solution.result == MAX_STEPS
    assert "max_steps is too small" in message
    assert solution.stats.steps == 3
    solution, _ = failure(lambda x: x**2 + 1, torch.full((1,), 0.3, dtype=torch.float64), max_steps=30)  # no root
    assert solution.result == MAX_STEPS
    assert solution.value.square() + 1 <= 1.09 + 1e-12


def test_one_failed_lane_is_told():
    def run(a):
        return root(lambda x: x**2 - a, torch.ones(1, dtype=torch.float64), throw=False, max_steps=40).result

    assert vmap(run)(torch.tensor([2.0, -1.0, 4.0], dtype=torch.float64)).tolist()[::2] == [CONVERGED, CONVERGED]
    with pytest.raises(SolverError, match="in every lane"):
        vmap(lambda a: root(lambda x: x**2 - a, torch.ones(1, dtype=torch.float64)).value)(
            torch.tensor([2.0, -1.0], dtype=torch.float64)
        )


def test_wrong_shapes_and_arguments_say_what_to_do():
    x = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got \(3,\) for x \(4,\).*least_squares"):
        root(lambda y: y[:3], x)
    with pytest.raises(ValueError, match="`root` needs fn"):
        root(lambda y: {"a": y}, x)
    with pytest.raises(ValueError, match="least_squares"):
        grad(lambda a: root(lambda y: a * y[:3], x).value.sum())(torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(TypeError, match="args as a tuple"):
        root(lambda y, a: y - a, x, x)
    with pytest.raises(TypeError, match="solver with init and step"):
        root(lambda y: y, x, solver=Newton)
    with pytest.raises(ValueError, match="rtol"):
        root(lambda y: y, x, rtol=-1.0)
    with pytest.raises(TypeError, match="floating-point"):
        root(lambda y: y, torch.ones(2, dtype=torch.int64))


def test_an_infinite_residual_is_no_solution():
    found = root(lambda x: 1 / x - 2, torch.zeros(1, dtype=torch.float64), throw=False)
    assert found.result == NONFINITE
    with pytest.raises(SolverError):
        root(lambda x: 1 / x - 2, torch.zeros(1, dtype=torch.float64))


def test_tolerances_are_numbers_and_callbacks_functions():
    x = torch.ones(1)
    with pytest.raises(ValueError, match="rtol must be a non-negative number; got True"):
        root(torch.sin, x, rtol=True)
    with pytest.raises(TypeError, match="callback must be a function"):
        root(torch.sin, x, callback=3)
