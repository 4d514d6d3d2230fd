"""diffopt.solvers.bracketing: what the states promise at every step."""

import pytest
import torch

from diffopt.solvers import Bisection, Brent, ScalarEquation

FUNCTIONS = {
    "cubic": (lambda x: x**3 - 2 * x - 5, 2.0945514815423265),
    "flat": (lambda x: (x - 1) ** 5, 1.0),
    "kink": (lambda x: x.sign() * x.abs().sqrt(), 0.0),
}
ENDS = torch.tensor([-3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)


@pytest.mark.parametrize("solver", [Bisection(), Brent(), Brent(1e-6)], ids=["bisection", "brent", "brent, coarse"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_residual_bounds_the_error_at_every_step(name, solver):
    fn, exact = FUNCTIONS[name]
    problem = ScalarEquation(fn, *ENDS)
    state = solver.init(problem, ENDS[0])
    for k in range(60):
        assert not state.refused
        assert (state.x - exact).abs() <= state.residual * (1 + 1e-12) + 1e-15
        if isinstance(solver, Bisection):
            assert state.residual <= 3.5 * 2.0**-k + 1e-15
        state = solver.step(problem, state)
        if state.failed or state.residual == 0:
            break


def test_bisection_keeps_the_root_between_its_ends():
    fn, exact = FUNCTIONS["cubic"]
    problem = ScalarEquation(fn, *ENDS)
    state = Bisection().init(problem, ENDS[0])
    for _ in range(30):
        assert state.lower <= exact <= state.upper
        torch.testing.assert_close(fn(state.lower), state.lower_value)
        state = Bisection().step(problem, state)


def test_a_bracketing_solver_without_ends_says_what_to_do():
    with pytest.raises(ValueError, match="call root_scalar with bracket="):
        Brent().init(ScalarEquation(lambda x: x), ENDS[0])
