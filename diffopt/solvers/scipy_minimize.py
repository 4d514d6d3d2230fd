"""SciPy's minimizers as solvers, their solutions differentiable like any other."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffopt.autodiff import grad, vjp
from diffopt.solvers.objective import Objective

__all__ = ["SciPyMinimize", "SciPyMinimizeState"]

_SECOND_ORDER = frozenset({"newton-cg", "trust-ncg"})
_GRADIENT_FREE = frozenset({"nelder-mead", "powell", "cobyqa"})
_GRADIENT = frozenset({"cg", "bfgs", "l-bfgs-b", "tnc", "slsqp"})
_BOUNDED = frozenset({"nelder-mead", "powell", "cobyqa", "l-bfgs-b", "tnc", "slsqp"})
_TIGHT = {
    "cg": {"gtol": 1e-10},
    "bfgs": {"gtol": 1e-10},
    "l-bfgs-b": {"gtol": 1e-10, "ftol": 0.0, "maxcor": 20, "maxiter": 15000, "maxfun": 30000},
    "tnc": {"gtol": 1e-10, "ftol": 0.0, "xtol": 0.0, "maxfun": 30000},
    "slsqp": {"ftol": 1e-18, "maxiter": 1000},
    "newton-cg": {"xtol": 1e-12},
    "trust-ncg": {"gtol": 1e-10},
    "nelder-mead": {"xatol": 1e-9, "fatol": 1e-16, "adaptive": True},
    "powell": {"xtol": 1e-9, "ftol": 1e-16},
    "cobyqa": {"final_tr_radius": 1e-9},
}


class SciPyMinimizeState(NamedTuple):
    """The iterate, its residual, whether SciPy gave up, the value, and the evaluations so far."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    evaluations: Tensor


@dataclasses.dataclass(frozen=True)
class SciPyMinimize:
    """A method of `scipy.optimize.minimize`: a step runs it to its end, in float64 on the CPU.

    Gradients, and products with the Hessian, are those of `fn`. SciPy's tolerances are set tight, and what counts is
    that of `minimize`: while the residual is above it, and each run halves it, SciPy is started again. `vmap` calls it
    once a lane.

    Args:
        method: A method for unconstrained problems or bounds, such as "L-BFGS-B".
        options: SciPy's options, added to these tolerances.

    Raises:
        ValueError: If `method` is not one of those that solve unconstrained problems.

    Example:
        >>> from diffopt.solvers import minimize
        >>> minimize(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2), solver=SciPyMinimize("BFGS")).value
        tensor([3., 3.])

    References:
        Virtanen et al. (2020), SciPy 1.0: fundamental algorithms for scientific computing in Python.
    """

    method: str = "L-BFGS-B"
    options: Mapping[str, Any] | None = None

    batching = "sequential"
    truncatable = False

    def __post_init__(self):
        known = _SECOND_ORDER | _GRADIENT | _GRADIENT_FREE
        if self.method.lower() not in known:
            raise ValueError(f"method must be one of {', '.join(sorted(known))}; got {self.method!r}")

    @property
    def handles(self) -> tuple[str, ...]:
        """The structures that the method takes."""
        return ("bounds",) if self.method.lower() in _BOUNDED else ()

    def init(self, fn: Any, x: Tensor) -> SciPyMinimizeState:
        """The state at the start."""
        objective = Objective.of(fn)
        x = objective.clip(x)
        value, slope = objective.value_and_grad(x)
        count = torch.ones((), dtype=torch.int64, device=x.device)
        return SciPyMinimizeState(x, objective.residual(x, slope), count < 0, value, count)

    def step(self, fn: Any, state: SciPyMinimizeState) -> SciPyMinimizeState:
        """The state after a whole run."""
        import scipy.optimize  # 0.2 s

        objective, method = Objective.of(fn), self.method.lower()
        as_tensor = lambda x: torch.as_tensor(x, dtype=state.x.dtype, device=state.x.device)  # noqa: E731

        def value(x):
            return float(objective(as_tensor(x)))

        def value_and_grad(x):
            f, g = objective.value_and_grad(as_tensor(x))
            return float(f), _as_numpy(g)

        def hessian_product(x, v):
            return _as_numpy(vjp(grad(objective.fn), as_tensor(x))[1](as_tensor(v))[0])

        needs_gradient = method not in _GRADIENT_FREE
        found = scipy.optimize.minimize(
            value_and_grad if needs_gradient else value,
            _as_numpy(state.x),
            method=self.method,
            jac=needs_gradient or None,
            hessp=hessian_product if method in _SECOND_ORDER else None,
            bounds=_bounds(objective, state.x),
            options={**_TIGHT[method], **(self.options or {})},
        )
        x = objective.clip(as_tensor(found.x))
        f, slope = objective.value_and_grad(x)
        residual = objective.residual(x, slope)
        stuck = residual.abs().amax() > state.residual.abs().amax() / 2
        failed = stuck | torch.as_tensor(not found.success, device=x.device)
        return SciPyMinimizeState(x, residual, failed, f, state.evaluations + int(found.nfev))


def _as_numpy(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()


def _bounds(objective: Objective, x: Tensor) -> Any:
    if objective.structure is None:
        return None

    lower, upper = (
        np.full(x.numel(), infinite) if bound is None else _as_numpy(bound)
        for bound, infinite in ((objective.lower, -np.inf), (objective.upper, np.inf))
    )
    return np.stack([lower, upper], axis=1)
