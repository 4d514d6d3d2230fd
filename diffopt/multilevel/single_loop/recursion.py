r"""The step that MRBO and SUSTAIN share: along recursive means of gradients, the hypergradient by a series.

.. math::
    u_t &= g_t(z_t, x_t) + (1 - \beta_t) \big(u_{t-1} - g_t(z_{t-1}, x_{t-1})\big), & z_{t+1} &= z_t - \lambda_t u_t \\
    w_t &= \hat h_t(z_t, x_t) + (1 - \alpha_t) \big(w_{t-1} - \hat h_t(z_{t-1}, x_{t-1})\big), &
    x_{t+1} &= x_t - \gamma_t w_t
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from diffopt import tree
from diffopt.multilevel.single_loop.problem import BilevelProblem, Products, products_of
from diffopt.multilevel.single_loop.protocol import check_step_sizes, check_weight, current, open_batches
from diffopt.multilevel.single_loop.series import recursive_mean, series_gradient
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Numeric

__all__ = ["check_recursion", "recursive_step"]

Solution: TypeAlias = Callable[[Products, Tensor, Tensor, Tensor, Numeric, list[Tensor]], Tensor]


def check_recursion(method: Any) -> None:
    """Check the hyperparameters of a method that steps along recursive means."""
    check_step_sizes(
        inner_step_size=method.inner_step_size,
        outer_step_size=method.outer_step_size,
        linear_step_size=method.linear_step_size,
    )
    check_weight("inner_weight", method.inner_weight)
    check_weight("outer_weight", method.outer_weight)
    check_count("series_steps", method.series_steps)


def recursive_step(
    method: Any, problem: BilevelProblem, state: Any, inner_batch: Tensor, outer_batch: Tensor, solution: Solution
) -> Any:
    """The state after one step.

    Args:
        method: Has the step sizes and the weights.
        problem: The problem.
        state: The method's state, a named tuple of `z, x, last_z, last_x, inner_mean, outer_mean, count`.
        inner_batch: Indices of inner samples.
        outer_batch: Indices of outer samples.
        solution: `(products, z, x, slope, factor, batches) -> v`, the solution of the linear system by a series.

    Returns:
        A state of the same type.
    """
    (first, *others), (j,) = open_batches(problem, method.draws, inner_batch, outer_batch)
    products, z, x = products_of(problem, state.z, state.x)
    last = tree.ravel(state.last_z)[0], tree.ravel(state.last_x)[0]
    count = state.count
    eta = current(method.linear_step_size, count, z, "linear_step_size")

    def hypergradient(z: Tensor, x: Tensor) -> Tensor:
        outer_z, outer_x = products.outer(z, x, j)
        v = solution(products, z, x, outer_z, eta, others[:-1])
        return series_gradient(products, z, x, v, outer_x, others[-1])

    u, w = tree.ravel(state.inner_mean)[0], tree.ravel(state.outer_mean)[0]
    weight = current(method.inner_weight, count, z, "inner_weight")
    u = recursive_mean(products.inner_z(z, x, first), products.inner_z(*last, first), u, weight, count)
    weight = current(method.outer_weight, count, x, "outer_weight")
    w = recursive_mean(hypergradient(z, x), hypergradient(*last), w, weight, count)
    z = z - current(method.inner_step_size, count, z, "inner_step_size") * u
    x = x - current(method.outer_step_size, count, x, "outer_step_size") * w
    now, means = (products.unravel_z(z), products.unravel_x(x)), (products.unravel_z(u), products.unravel_x(w))
    return type(state)(*now, state.z, state.x, *means, count + 1)
