r"""What `least_squares` minimizes: half the squared length of a vector function, possibly in a box.

.. math:: \min_{l \le x \le u} \tfrac12 \|r(x)\|^2, \qquad \nabla = J^\top r, \quad J = \partial r(x)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import linearize
from diffopt.linalg import LinearOperator, gauss_newton_operator
from diffopt.solvers.newton import rows

__all__ = ["Linearized", "Residuals"]


class Linearized(NamedTuple):
    """A function at a point, to first order, with what it says of half its square.

    Attributes:
        errors: The residuals `r`, shape `(m,)`.
        slope: The gradient, `J^T r`, shape `(n,)`.
        value: Half the squared length, a 0-d tensor.
        jacobian: `J`, shape `(m, n)`; of shape `(0, n)` where it is not wanted.
    """

    errors: Tensor
    slope: Tensor
    value: Tensor
    jacobian: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """A problem of least squares on flat vectors. A plain function is one without bounds.

    Args:
        fn: The residuals, a vector of a vector.
        lower: The lower bounds, a vector, or None.
        upper: The upper bounds, a vector, or None.

    Example:
        >>> r = Residuals(lambda x: x - 1, upper=torch.zeros(2))
        >>> at = r.linearized(torch.zeros(2), True)
        >>> at.value, at.slope, r.optimality(torch.zeros(2), at.slope)
        (tensor(1.), tensor([-1., -1.]), tensor([0., 0.]))
    """

    fn: Callable[[Tensor], Tensor]
    lower: Tensor | None = None
    upper: Tensor | None = None

    @staticmethod
    def of(problem: "Residuals | Callable[[Tensor], Tensor]") -> "Residuals":
        """The problem, or a plain function as one."""
        return problem if isinstance(problem, Residuals) else Residuals(problem)

    def __call__(self, x: Tensor) -> Tensor:
        """The residuals."""
        return self.fn(x)

    def value(self, x: Tensor) -> Tensor:
        """Half their squared length."""
        return _half_square(self.fn(x))

    def clip(self, x: Tensor) -> Tensor:
        """The nearest point within the bounds."""
        x = x if self.lower is None else torch.maximum(x, self.lower)
        return x if self.upper is None else torch.minimum(x, self.upper)

    def optimality(self, x: Tensor, slope: Tensor) -> Tensor:
        """What vanishes at a solution, given the gradient."""
        return slope if self.lower is None and self.upper is None else x - self.clip(x - slope)

    def free(self, x: Tensor, slope: Tensor) -> Tensor | None:
        """1 for the unknowns that a step of descent can move, 0 for those it would press against a bound."""
        if self.lower is None and self.upper is None:
            return None
        held = torch.zeros_like(x, dtype=torch.bool)
        held = held if self.lower is None else held | ((x <= self.lower) & (slope > 0))
        held = held if self.upper is None else held | ((x >= self.upper) & (slope < 0))
        return (~held).to(x.dtype)

    def linearized(self, x: Tensor, dense: bool) -> Linearized:
        """The function to first order, by as few products as make its Jacobian, where that is wanted."""
        errors, pull, push = linearize(self.fn, x)
        slope, jacobian = pull(errors)[0], x.new_zeros((0, x.numel()))
        if dense and errors.numel() <= x.numel():
            jacobian = rows(lambda u: pull(u)[0], errors)
        elif dense:
            jacobian = rows(lambda v: push(v)[0], x).mT
        return Linearized(errors, slope, _half_square(errors), jacobian)

    def push(self, x: Tensor, v: Tensor) -> Tensor:
        """The product of the Jacobian with a vector."""
        return linearize(self.fn, x)[2](v)[0]

    def normal_operator(self, x: Tensor, free: Tensor | None = None) -> LinearOperator:
        """The matrix `J^T J` on the free unknowns, by products."""
        if free is None:
            return gauss_newton_operator(self.fn, _half_square, x, tags=["positive_definite"])
        fn = self.fn
        return gauss_newton_operator(
            lambda v, x, free: fn(x + free * v), _half_square, torch.zeros_like(x), x, free, tags=["positive_definite"]
        )


def _half_square(errors: Tensor) -> Tensor:
    return (errors * errors).sum() / 2
