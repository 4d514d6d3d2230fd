r"""SciPy's solvers of equations, their solutions differentiable.

.. math:: F(x) = 0
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["SciPyRoot", "SciPyRootState"]


class SciPyRootState(NamedTuple):
    """The iterate, the equation's value there, and whether SciPy gave up."""

    x: Tensor
    residual: Tensor
    failed: Tensor


@dataclasses.dataclass(frozen=True)
class SciPyRoot:
    r"""`scipy.optimize.root`, on the CPU: one step runs it to its end.

    .. math:: F(x) = 0

    Under `vmap` it is called once for each lane. Its steps cannot be unrolled.

    Args:
        method: SciPy's name of it: "hybr" and "lm", which get the Jacobian, "broyden1", "krylov", "df-sane", ...
        tol: SciPy's tolerance; None is the method's own. The solver's tolerances are checked afterwards.
        options: SciPy's options of the method.

    Example:
        >>> from diffopt.solvers import root
        >>> root(lambda x, a: x**2 - a, torch.tensor(1.0), (torch.tensor(2.0),), solver=SciPyRoot()).value
        tensor(1.4142)

    References:
        Powell (1970), A hybrid method for nonlinear equations, for "hybr".
    """

    method: str = "hybr"
    tol: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    batching: ClassVar[Literal["sequential"]] = "sequential"

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> SciPyRootState:
        """The state at the start."""
        return SciPyRootState(x, fn(x), torch.zeros((), dtype=torch.bool, device=x.device))

    def step(self, fn: Callable[[Tensor], Tensor], state: SciPyRootState) -> SciPyRootState:
        """The state after SciPy has run to its end."""
        import scipy.optimize

        def tensor(x):
            return torch.as_tensor(x, dtype=state.x.dtype, device=state.x.device)

        def value(x):
            return fn(tensor(x)).detach().cpu().double().numpy()

        def jacobian(x):
            return torch.func.jacrev(fn)(tensor(x)).detach().cpu().double().numpy()

        found = scipy.optimize.root(
            value, state.x.detach().cpu().double().numpy(), method=self.method, tol=self.tol,
            jac=jacobian if self.method in ("hybr", "lm") else None, options=dict(self.options),
        )  # fmt: skip
        x = tensor(found.x.reshape(-1))
        stuck = torch.as_tensor(not found.success, device=x.device) | (x == state.x).all()
        return SciPyRootState(x, fn(x), stuck)
