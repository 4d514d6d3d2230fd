"""diffopt.solvers.broyden: the update, and its options."""

import pytest
import torch
from torch.func import grad

from diffopt.implicit import Unrolled
from diffopt.solvers import Broyden, root

M = torch.tensor([[3.0, 1.0, 0.2], [-1.0, 2.0, 0.5], [0.3, -0.4, 2.5]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def fn(x):
    return M @ x + 0.1 * x**3 - B


@pytest.mark.parametrize("start", ["jacobian", "identity"])
def test_update_meets_the_secant_equation_and_is_broydens(start):
    solver = Broyden(start, 0.3)
    state = solver.init(fn, torch.ones(3, dtype=torch.float64))
    for _ in range(4):
        new = solver.step(fn, state)
        s, y = new.x - state.x, new.residual - state.residual
        torch.testing.assert_close(new.inverse @ y, s)
        J = torch.linalg.inv(state.inverse)
        direct = J + torch.outer(y - J @ s, s) / (s @ s)
        torch.testing.assert_close(torch.linalg.inv(new.inverse), direct)
        state = new


def test_affine_equations_end_in_twice_their_size():
    solution = root(lambda x: M @ x - B, torch.ones(3, dtype=torch.float64), solver=Broyden("identity", 0.3),
                    rtol=0.0, atol=1e-12)  # fmt: skip
    assert solution.stats.steps <= 7  # Gay's theorem, and one for rounding


def test_scale_is_differentiated_when_unrolled():
    def f(scale):
        return root(fn, torch.ones(3, dtype=torch.float64), solver=Broyden("identity", scale), adjoint=Unrolled(),
                    throw=False, max_steps=2, rtol=0.0, atol=0.0).value.sum()  # fmt: skip

    scale, h = torch.tensor(0.3, dtype=torch.float64), 1e-6
    torch.testing.assert_close(grad(f)(scale), (f(scale + h) - f(scale - h)) / (2 * h), rtol=1e-7, atol=1e-8)


def test_options_are_checked():
    with pytest.raises(ValueError, match="start must be"):
        Broyden("exact")
