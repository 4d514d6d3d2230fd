"""What an adjoint is, and what the problem whose solution it differentiates gives it."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.typing import Tree

__all__ = ["Adjoint", "Batching", "Equation", "Info", "Response", "Solve", "unsolved"]

Batching: TypeAlias = Literal["vmap", "sequential"]


@dataclasses.dataclass(frozen=True)
class Equation:
    """What a solution satisfies.

    Args:
        residual: `F(x, *args)`, shaped like `x`, zero at the solution.
        symmetric: Whether its Jacobian in `x` is symmetric positive definite, as at a minimizer; then one solve serves
            both modes, and `CG` serves. Not so for `proximal_map`, `projected_map` and `kkt_map`.
    """

    residual: Callable[..., Tree]
    symmetric: bool = False


class Solve(Protocol):
    """A solver at work, as functions of `init` and the arguments that capture nothing they change."""

    @property
    def unrollable(self) -> bool:
        """Whether the steps have a derivative at all."""
        ...

    @property
    def truncatable(self) -> bool:
        """Whether the steps at a solution have a derivative that means something."""
        ...

    def __call__(self, init: Tree, *args: Tree) -> tuple[Tree, Any]:
        """Solve: `(x, aux)`."""
        ...

    def start(self, init: Tree, *args: Tree) -> Any:
        """The carry of the loop at the start."""
        ...

    def run(self, carry: Any, init: Tree, *args: Tree, max_steps: int | None = None) -> Any:
        """The carry after steps taken while a lane is live."""
        ...

    def step(self, carry: Any, init: Tree, *args: Tree) -> Any:
        """The carry after one step, whether live or not."""
        ...

    def finish(self, carry: Any, init: Tree) -> tuple[Tree, Any]:
        """`(x, aux)` of a carry."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """A problem at an iterate that stands for its solution `x(args)`.

    Args:
        x: The iterate.
        args: What the solution depends on, trees of floating-point tensors.
        equation: What the solution satisfies.
        objective: `(x, *args) -> scalar`, which the solution minimizes.
        retrace: `(truncate, checkpoint, *args) -> x`, the steps that led to the iterate, to be differentiated; with
            `truncate` the last ones alone.
        change: `gradient -> dx`, what one more step along a gradient adds to the iterate.
        pull_change: `(gradient, cotangent) -> cotangent`, what a cotangent of that is for the gradient; 0 where the
            gradient is 0 and the step has no derivative.
    """

    x: Tree
    args: tuple
    equation: Equation
    objective: Callable[..., Tensor]
    retrace: Callable[..., Tree]
    change: Callable[[Tree], Tree]
    pull_change: Callable[[Tree, Tree], Tree]


class Info(NamedTuple):
    """How well a cotangent was pulled through a response; NaN and -1 where the method does not say.

    Attributes:
        residual: The relative residual of the adjoint system.
        steps: The products that its solver took.
    """

    residual: Tensor
    steps: Tensor


class Adjoint(Protocol):
    """What an adjoint is: a value with these methods. The last three serve problems whose solver runs elsewhere.

    `retraces` says whether those call the response's `retrace`, `moves` whether `pull` compares values away from `x`
    and `args`.
    """

    retraces: ClassVar[bool]
    moves: ClassVar[bool]

    def solve(self, run: Solve, equation: Equation, init: Tree, args: tuple, *, batching: Batching) -> tuple[Tree, Any]:
        """`(x, aux)`, where `x` has this adjoint's derivative in `args` and captured tensors, and `aux` has none."""
        ...

    def begin(self, x: Tree, key: Tensor) -> Any:
        """What is carried from one `pull` to the next, tensors alone."""
        ...

    def pull(self, response: Response, cotangent: Tree, state: Any) -> tuple[tuple[Tree, ...], Any, Info]:
        """The cotangents of the response's arguments, the state for the next time, and how good they are."""
        ...

    def respond(self, response: Response, state: Any) -> Tree:
        """The iterate, with this adjoint's derivative in the response's arguments."""
        ...


def unsolved(x: Tree) -> Info:
    """What is known of a system that was not solved: nothing."""
    like = tree.leaves(x)[0]
    return Info(torch.full((), torch.nan, dtype=like.dtype, device=like.device), torch.full((), -1, device=like.device))
