r"""Mirror descent: gradient steps in the geometry of a mirror map, such as the entropy on the simplex.

.. math:: x_{k+1} = (\nabla\phi)^{-1}_C\left(\nabla\phi(x_k) - \eta_k \nabla f(x_k)\right)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import while_loop
from diffopt.solvers.objective import Objective
from diffopt.solvers.proximal_gradient import check_step_size
from diffopt.typing import Tree

__all__ = ["Mirror", "MirrorDescent", "MirrorDescentState", "entropy_mirror"]


class Mirror(NamedTuple):
    r"""A geometry, as the map to the dual and the way back; both are functions of trees.

    .. math:: \text{to\_dual}(x) = \nabla\phi(x), \qquad
              \text{from\_dual}(y) = \arg\max_{x \in C} \langle x, y \rangle - \phi(x)

    Args:
        to_dual: The gradient of :math:`\phi`.
        from_dual: The point of the set whose mirror image is nearest: the Bregman projection. For the entropy and a
            set of `diffopt.convex`, that is its `kl_projection`.

    Example:
        >>> euclidean = Mirror(to_dual=lambda x: x, from_dual=lambda y: y.clamp(min=0))
        >>> euclidean.from_dual(euclidean.to_dual(torch.ones(2)) - 2)
        tensor([0., 0.])
    """

    to_dual: Callable[[Tree], Tree]
    from_dual: Callable[[Tree], Tree]


def entropy_mirror(total: float | Tensor = 1.0) -> Mirror:
    r"""The geometry of the entropy on the simplex: of mirror descent it makes the exponentiated gradient method.

    .. math:: \phi(x) = \sum_i x_i \log x_i, \qquad \text{from\_dual}(y) = s \operatorname{softmax}(y)

    Args:
        total: The sum `s` of each row of each leaf.

    Returns:
        The mirror; the last dimension of every leaf is a simplex.

    Example:
        >>> mirror = entropy_mirror()
        >>> mirror.from_dual(mirror.to_dual(torch.tensor([0.25, 0.75])))
        tensor([0.2500, 0.7500])

    References:
        Beck and Teboulle (2003), Mirror descent and nonlinear projected subgradient methods, section 5.
    """

    def to_dual(x: Tree) -> Tree:
        return tree.map(lambda leaf: leaf.clamp(min=torch.finfo(leaf.dtype).tiny).log(), x)

    return Mirror(to_dual, lambda y: tree.map(lambda leaf: total * leaf.softmax(-1), y))


class MirrorDescentState(NamedTuple):
    """The iterate, its residual, whether no step size served, the step size, and the number of steps taken."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    step_size: Tensor
    steps: Tensor


@dataclasses.dataclass(frozen=True)
class MirrorDescent:
    r"""Mirror descent; with `entropy_mirror`, the exponentiated gradient method on the simplex.

    .. math:: x_{k+1} = \text{from\_dual}(\text{to\_dual}(x_k) - \eta_k \nabla f(x_k))

    The mirror holds the set, which `minimize` cannot see: give the Euclidean `projection=` onto the same set, by whose
    fixed point the solution is recognized and differentiated.

    Args:
        mirror: The geometry and the set.
        step_size: :math:`\eta`, a number, a tensor, or a schedule, a function of the number of steps taken; None
            searches for it by backtracking, until the decrease is half of what the gradient says.
        max_backtracks: The most halvings of the step size in a step.

    Raises:
        TypeError: If `mirror` has no maps to the dual and back.
        ValueError: If `step_size` is not positive, or, when run, no projection was given.

    Example:
        >>> from diffopt.solvers import minimize
        >>> project = lambda x: (x + (1 - x.sum()) / 2).clamp(0, 1)  # onto the simplex of two
        >>> loss = lambda x: ((x - torch.tensor([0.4, 0.2])) ** 2).sum()
        >>> solver = MirrorDescent(entropy_mirror())
        >>> minimize(loss, torch.ones(2) / 2, projection=project, solver=solver, atol=1e-6).value
        tensor([0.6000, 0.4000])

    References:
        Beck and Teboulle (2003), Mirror descent and nonlinear projected subgradient methods, eq. 3.11.
    """

    mirror: Mirror
    step_size: float | Tensor | Callable[[Tensor], Tensor] | None = None
    max_backtracks: int = 60

    handles = ("prox",)
    hides_set = True

    def __post_init__(self):
        if not all(callable(getattr(self.mirror, name, None)) for name in Mirror._fields):
            raise TypeError(f"mirror must be a Mirror(to_dual, from_dual), or entropy_mirror(); got {self.mirror!r}")
        check_step_size(None if callable(self.step_size) else self.step_size, self.max_backtracks)

    def init(self, fn: Any, x: Tensor) -> MirrorDescentState:
        """The state at the start, which is moved into the set."""
        objective = Objective.of(fn)
        if objective.prox is None:
            raise ValueError("MirrorDescent needs the Euclidean projection= onto the set of its mirror, too")
        to_dual, from_dual = self._on_vectors(objective)
        x = from_dual(to_dual(x))
        given = 1.0 if self.step_size is None or callable(self.step_size) else self.step_size
        size = torch.as_tensor(given, dtype=x.dtype, device=x.device)
        no = torch.zeros((), dtype=torch.bool, device=x.device)
        return MirrorDescentState(x, objective.optimality(x), no, size, no.to(torch.int64))

    def step(self, fn: Any, state: MirrorDescentState) -> MirrorDescentState:
        """The state after one step."""
        objective = Objective.of(fn)
        to_dual, from_dual = self._on_vectors(objective)
        x = state.x
        value, slope = objective.value_and_grad(x)
        dual = to_dual(x)

        def moved(size):
            return from_dual(dual - size * slope)

        def tried(size):
            d = moved(size) - x
            along = slope @ d
            visible = -along > 1e3 * torch.finfo(value.dtype).eps * value.abs()
            return size, visible & ~(objective(x + d) <= value + along / 2), visible

        size = self.step_size(state.steps) if callable(self.step_size) else state.step_size
        size = torch.as_tensor(size, dtype=x.dtype, device=x.device)
        failed = ~size.isfinite()
        if self.step_size is None:
            first = tried(1.5 * size)
            halved, failed, visible = while_loop(
                lambda last: last[1], lambda last: tried(last[0] / 2), first, max_steps=self.max_backtracks
            )
            size = torch.where(visible, halved, size)  # where rounding hides the decrease, the size stays
        new = moved(size)
        return MirrorDescentState(new, objective.optimality(new), failed, size, state.steps + 1)

    def _on_vectors(self, objective: Objective):
        return objective.on_vectors(self.mirror.to_dual), objective.on_vectors(self.mirror.from_dual)
