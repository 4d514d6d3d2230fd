r"""What `minimize` minimizes: a smooth function, with at most one further structure, on flat vectors.

.. math:: \min_x f(x), \quad \min_x f(x) + g(x), \quad \min_{l \le x \le u} f(x), \quad
          \min_{h(x) = 0,\, c(x) \le 0} f(x)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import value_and_grad
from diffopt.implicit.optimality import KKT, kkt_map
from diffopt.typing import Tree

__all__ = ["Objective", "Structure"]

Structure: TypeAlias = Literal["prox", "bounds", "constraints"]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A problem on flat vectors: what the solvers of `minimize` are given. A plain function is a smooth one.

    Args:
        fn: The smooth part, of a vector.
        prox: `(x, scaling) -> x` of the other part, or None.
        lower: The lower bounds, a vector, or None.
        upper: The upper bounds, a vector, or None.
        equality: Constraints whose values are to vanish, a vector of a vector, or None.
        inequality: Constraints whose values are to be at most 0, or None.
        sizes: With constraints, the numbers of unknowns, of equalities and of inequalities: iterates hold the
            multipliers behind the unknowns.
        unravel: The tree of a vector of unknowns, for solvers with functions of trees of their own; None for vectors.

    Example:
        >>> f = Objective(lambda x: (x**2).sum(), lower=torch.ones(2), upper=torch.full((2,), 3.0))
        >>> value, slope = f.value_and_grad(torch.ones(2))
        >>> value, slope, f.residual(torch.ones(2), slope)
        (tensor(2.), tensor([2., 2.]), tensor([0., 0.]))
    """

    fn: Callable[[Tensor], Tensor]
    prox: Callable[[Tensor, Any], Tensor] | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    equality: Callable[[Tensor], Tensor] | None = None
    inequality: Callable[[Tensor], Tensor] | None = None
    sizes: tuple[int, int, int] | None = None
    unravel: Callable[[Tensor], Tree] | None = None

    @staticmethod
    def of(problem: "Objective | Callable[[Tensor], Tensor]") -> "Objective":
        """The problem, or a plain function as one."""
        return problem if isinstance(problem, Objective) else Objective(problem)

    @property
    def structure(self) -> Structure | None:
        """What the problem has besides the smooth function."""
        if self.sizes is not None:
            return "constraints"
        if self.prox is not None:
            return "prox"
        return None if self.lower is None and self.upper is None else "bounds"

    def __call__(self, x: Tensor) -> Tensor:
        """The value of the smooth part."""
        return self.fn(x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value and the gradient of the smooth part."""
        return value_and_grad(self.fn)(x)

    def clip(self, x: Tensor) -> Tensor:
        """The nearest point within the bounds."""
        x = x if self.lower is None else torch.maximum(x, self.lower)
        return x if self.upper is None else torch.minimum(x, self.upper)

    def residual(self, x: Tensor, slope: Tensor) -> Tensor:
        """What vanishes at a solution, given the gradient of the smooth part."""
        if self.prox is not None:
            return x - self.prox(x - slope, 1.0)
        return slope if self.structure is None else x - self.clip(x - slope)

    def on_vectors(self, fn: Callable[[Tree], Tree]) -> Callable[[Tensor], Tensor]:
        """A function of the tree of unknowns, as one of vectors."""
        unravel = self.unravel
        return fn if unravel is None else lambda x: tree.ravel(fn(unravel(x)))[0]

    def split(self, y: Tensor) -> KKT:
        """The unknowns and the multipliers of a vector of all."""
        assert self.sizes is not None
        return KKT(*y.split(self.sizes))

    def optimality(self, y: Tensor) -> Tensor:
        """What vanishes at a solution."""
        if self.sizes is None:
            return self.residual(y, self.value_and_grad(y)[1])
        equality = self.equality or (lambda x: x[:0])
        inequality = self.inequality or (lambda x: x[:0])
        return torch.cat(kkt_map(self.fn, equality, inequality)(self.split(y)))
