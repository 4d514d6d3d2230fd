"""What every solver of `minimize` is held to; each test file says for which of its options."""

import gc
import weakref

import torch

from diffopt.implicit.adjoints import Implicit, Unrolled
from diffopt.solvers import minimize
from solvers.standard_problems import PROBLEMS, batch_of_starts, finite_difference, quartic, rosenbrock

__all__ = ["check_by_hand", "check_derivatives", "check_lanes", "check_memory", "check_minimizer"]

THETA = torch.tensor([0.7, -0.5], dtype=torch.float64)
START = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64)
TIGHT = {"rtol": 0.0, "atol": 1e-10}


def check_minimizer(solver, name, *, within=1e-5, **options):
    """A known minimizer is found, `within` so much of its size; more is right where the Hessian is singular."""
    problem = PROBLEMS[name]
    found = minimize(problem.fn, problem.start, solver=solver, **options)
    assert bool(found.converged)
    scale = problem.minimizers.abs().clamp(min=1.0)
    distance = ((found.value - problem.minimizers).abs() / scale).amax(-1).min()
    assert distance < within, (name, found.value, found.stats)
    assert abs(float(problem.fn(found.value)) - problem.least) <= 1e-8 * max(1.0, problem.least)


def check_by_hand(solver, steps=5):
    """Stepping by hand is what `minimize` does."""
    start = PROBLEMS["rosenbrock_2"].start
    state = solver.init(rosenbrock, start)
    for _ in range(steps):
        state = solver.step(rosenbrock, state)
    end = minimize(rosenbrock, start, solver=solver, max_steps=steps, throw=False).state
    torch.testing.assert_close(end, state, rtol=0, atol=0)


def check_lanes(solver, count=6, every=1, **options):
    """vmap over starts equals the loop over them, or every so many, in values and in numbers of steps."""
    starts = batch_of_starts(count, 2)

    def solve(start):
        found = minimize(rosenbrock, start, solver=solver, throw=False, **options)
        return found.value, found.result, found.stats.steps

    values, results, steps = (x[::every] for x in torch.func.vmap(solve)(starts))
    loop = [solve(start) for start in starts[::every]]
    assert results.tolist() == [int(r) for _, r, _ in loop]
    # sums may be taken in another order in a batch, and steps amplify that
    assert (steps - torch.stack([s for _, _, s in loop])).abs().max() <= max(2, 0.1 * float(steps.max()))
    torch.testing.assert_close(values, torch.stack([v for v, _, _ in loop]), rtol=0, atol=1e-5)
    return steps


def check_derivatives(solver, *, unrolled=True, within=1e-6, **options):
    """The implicit derivative against finite differences and, where there is one, that of the steps."""
    options = {**TIGHT, **options}

    def solution(theta, adjoint):
        return minimize(quartic, START, (theta,), solver=solver, adjoint=adjoint, **options).value

    def jacobian(adjoint):
        return torch.autograd.functional.jacobian(lambda theta: solution(theta, adjoint), THETA)

    implicit = jacobian(Implicit())
    expected = finite_difference(lambda theta: solution(theta, Implicit()), THETA)
    torch.testing.assert_close(implicit, expected, rtol=0, atol=within)
    if unrolled:
        torch.testing.assert_close(jacobian(Unrolled()), implicit, rtol=0, atol=10 * within)


class _Saved:
    """A tensor that a graph holds."""

    def __init__(self, tensor):
        self.tensor = tensor


def check_memory(solver, few=3, many=20, **options):
    """The graph behind the implicit gradient does not grow with the steps."""

    def held(max_steps):
        alive = weakref.WeakSet()

        def pack(tensor):
            saved = _Saved(tensor)
            alive.add(saved)
            return saved

        theta = THETA.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            found = minimize(
                quartic, START, (theta,), solver=solver, rtol=0.0, atol=0.0, max_steps=max_steps, throw=False, **options
            )
        gc.collect()
        assert int(found.stats.steps) > few or max_steps == few
        return len(alive)

    assert held(few) == held(many) > 0
