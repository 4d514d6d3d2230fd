"""diffopt.solvers.fixed_point_iteration: the rate of the damped iteration."""

import torch

from diffopt.solvers import FixedPointIteration, fixed_point


def test_the_rate_is_that_of_the_damped_map():
    start = torch.ones(1, dtype=torch.float64)
    for damping in (1.0, 0.5, 1.2):
        history = fixed_point(
            lambda x: -0.5 * x + 3, start, solver=FixedPointIteration(damping), history=True, rtol=0.0, atol=1e-9
        ).stats.history
        ratios = history[1:9] / history[:8]
        torch.testing.assert_close(ratios, torch.full_like(ratios, abs(1 - 1.5 * damping)), rtol=1e-6, atol=0)
