r"""Levels and edges: the vocabulary of a multilevel program.

.. math:: \min_{x} L_1(x, y^\star(x)) \quad\text{where}\quad y^\star(x) = \arg\min_y L_2(y, x)

Each problem is a `Level`: its own parameters, a loss, and the levels that the loss reads. An `Edge` says that one
level is optimized over the best response of another, and how that response is differentiated.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from diffopt.autodiff import value_and_grad
from diffopt.implicit.adjoints import Implicit
from diffopt.implicit.protocol import Adjoint
from diffopt.schedules.hyperparameters import check_count
from diffopt.transforms import GradientTransformation
from diffopt.transforms.base import check_optimizer
from diffopt.typing import Tree

__all__ = ["Edge", "Level"]


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    r"""One problem of a multilevel program.

    .. math:: \min_{x_i} L_i(x_i, \{x_j\}_{j \in \text{reads}}; \text{batch})

    Args:
        loss: `(own, *reads, batch) -> scalar tensor`, pure; `reads` come in the order declared here.
        optimizer: The optimizer of its own parameters.
        reads: The names of the levels that the loss uses.
        steps: How many steps it takes for each step of the levels above it.
        start: Where these steps start: "warm" where the last ones ended, "reset" at the parameters that the program
            started from, with a fresh optimizer, "rollback" at those before the last steps, which so were a look ahead.
        project: `params -> params`, after each step.
        clip: The largest norm of the gradient, or None.
        accumulate: The number of micro-batches, a leading axis of the batch, whose gradients are averaged.
        warmup: The number of updates of the program for which the level stays where it is, while those below it move.
        precision: bfloat16 or float16: the level's own gradient is computed under autocast, in float16 with a loss
            scaled to stay in range. Products with second derivatives are computed in the parameters' dtype.

    Attributes:
        value_and_grad: Made of the loss: its value and gradient in the level's own parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or `start` or `precision` is none of the above.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> Level(
        ...     lambda w, penalty, batch: ((w - batch) ** 2).sum() + penalty * (w**2).sum(),
        ...     sgd(0.1),
        ...     reads=("penalty",),
        ... )
        Level(reads=('penalty',), steps=1, start='warm')

    References:
        Choe et al. (2023), Betty: an automatic differentiation library for multilevel optimization, section 3.
    """

    loss: Callable[..., Tensor]
    optimizer: GradientTransformation
    _: dataclasses.KW_ONLY
    reads: tuple[str, ...] = ()
    steps: int = 1
    start: Literal["warm", "reset", "rollback"] = "warm"
    project: Callable[[Tree], Tree] | None = None
    clip: float | Tensor | None = None
    accumulate: int = 1
    warmup: int = 0
    precision: torch.dtype | None = None
    value_and_grad: Callable[..., tuple[Tensor, Tree]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        if isinstance(self.loss, nn.Module):
            raise TypeError(
                f"loss is a {type(self.loss).__name__}, a module: write a function (own, *reads, batch) -> scalar that "
                f"calls what `tree.from_module` makes of it"
            )
        if not callable(self.loss):
            raise TypeError(f"loss must be a function (own, *reads, batch) -> scalar; got {self.loss!r}")
        object.__setattr__(self, "value_and_grad", value_and_grad(self.loss))  # made once, not once a step
        check_optimizer(self.optimizer)
        if not isinstance(self.reads, (tuple, list)) or not all(isinstance(name, str) for name in self.reads):
            raise TypeError(f'reads must be a tuple of names, such as ("weights",); got {self.reads!r}')
        object.__setattr__(self, "reads", tuple(self.reads))
        if len(set(self.reads)) < len(self.reads):
            raise ValueError(f"reads names a level twice: {self.reads}")
        for name, least in (("steps", 1), ("accumulate", 1), ("warmup", 0)):
            check_count(name, getattr(self, name), at_least=least)
        if self.project is not None and not callable(self.project):
            raise TypeError(f"project must be a function params -> params; got {self.project!r}")
        if not isinstance(self.clip, (int, float, Tensor, type(None))):
            raise TypeError(f"clip must be a number, a tensor or None; got {self.clip!r}")
        if self.start not in ("warm", "reset", "rollback"):
            raise ValueError(f'start must be "warm", "reset" or "rollback"; got {self.start!r}')
        if self.precision not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"precision must be None, torch.bfloat16 or torch.float16; got {self.precision!r}")
        if isinstance(self.clip, (int, float)) and not self.clip > 0:
            raise ValueError(f"clip must be positive; got {self.clip!r}")

    @property
    def plain(self) -> bool:
        """Whether a gradient is one call of the loss in the parameters' own dtype."""
        return self.accumulate == 1 and self.precision is None

    @property
    def simple(self) -> bool:
        """Whether a step is one of the optimizer along such a gradient, and no more."""
        return self.plain and self.clip is None and self.project is None and not self.warmup

    def __repr__(self) -> str:
        return f"Level(reads={self.reads}, steps={self.steps}, start={self.start!r})"


@dataclasses.dataclass(frozen=True, eq=False)
class Edge:
    r"""An upper level is optimized over the best response of a lower one.

    .. math:: \frac{d L_u}{d x_u} = \partial_{x_u} L_u + \Big(\frac{d x_l^\star}{d x_u}\Big)^{\!\top} \partial_{x_l} L_u

    Args:
        upper: The name of the level above.
        lower: The name of the level below.
        method: The adjoint that differentiates the response: `Implicit(CG(max_steps=3))`, `Unrolled()`, `OneStep(0.1)`,
            `FiniteDifference()`, `SAMA()`, and others; `Detached()` for players that answer each other's moves without
            foreseeing them.
        response: What the upper level's own optimality condition counts when a level above it is differentiated.
            "total": that the lower level moves with it, which is exact; "partial": the lower level as it is. Partial
            costs one more solve for each level of a chain, and drops what acts only through the lower level; total
            costs a product of them.
        strong_convexity: A lower bound of the eigenvalues of the lower level's Hessian, if known.
        coupling: An upper bound of the norm of its mixed second derivative, if known. With both, `Report.error` is a
            bound for the adjoint's error, not an estimate.

    Raises:
        TypeError: If the method is not an adjoint, or a constant is not a number.
        ValueError: If `response` is none of the above, the two levels are one, or a constant is not positive.

    Example:
        >>> from diffopt.linalg import CG
        >>> Edge("penalty", "weights", Implicit(CG(max_steps=3))).response
        'total'
    """

    upper: str
    lower: str
    method: Adjoint = dataclasses.field(default_factory=Implicit)
    _: dataclasses.KW_ONLY
    response: Literal["total", "partial"] = "total"
    strong_convexity: float | None = None
    coupling: float | None = None

    def __post_init__(self):
        if not callable(getattr(self.method, "pull", None)) or isinstance(self.method, type):
            hint = f"; write Implicit({self.method!r})" if hasattr(self.method, "transposed") else ""
            raise TypeError(f"method must be an adjoint such as Implicit() or Unrolled(); got {self.method!r}{hint}")
        if self.response not in ("total", "partial"):
            raise ValueError(f'response must be "total" or "partial"; got {self.response!r}')
        if self.upper == self.lower:
            raise ValueError(f"an edge joins two levels; got {self.upper!r} twice")
        for name in ("strong_convexity", "coupling"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, type(None))):
                raise TypeError(f"{name} must be a number or None; got {value!r}")
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive; got {value!r}")

    @property
    def gain(self) -> float | None:
        """How much of the adjoint system's residual reaches the gradient at most, where that is known."""
        if self.strong_convexity is None or self.coupling is None:
            return None
        return self.coupling / self.strong_convexity
