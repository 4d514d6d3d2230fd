r"""An inverse Hessian of low rank: `Nystrom`."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from diffopt import random, tree
from diffopt.implicit.adjoints import pulled
from diffopt.implicit.protocol import Info, Response
from diffopt.linalg import hessian_operator
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Tree

__all__ = ["Nystrom"]


@dataclasses.dataclass(frozen=True)
class Nystrom:
    r"""The implicit derivative with the Hessian approximated from its products with a few random vectors.

    .. math:: H \approx Y (\Omega^\top Y)^{-1} Y^\top, \quad Y = H \Omega, \qquad
              (H + \rho I)^{-1} \bar x \approx \frac{1}{\rho}
              \big(\bar x - Y (\rho\,\Omega^\top Y + Y^\top Y)^{-1} Y^\top \bar x\big)

    A fixed number of products, all at once, and no iteration that could fail. As the rank reaches that of the Hessian,
    the result is that of `Implicit` with the same damping. For Hessians without negative eigenvalues.

    Args:
        rank: The number of random vectors.
        damping: :math:`\rho`, in the units of the Hessian.

    Raises:
        ValueError: If the rank or the damping is not positive.

    Example:
        >>> Nystrom(5, damping=0.1)
        Nystrom(rank=5, damping=0.1)

    References:
        Hataya and Yamada (2023), Nyström method for accurate and scalable implicit differentiation, section 3, which
        takes columns of the Hessian for the products.
    """

    rank: int
    damping: float | Tensor = 1e-2

    retraces: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    def __post_init__(self):
        check_count("rank", self.rank)
        if not isinstance(self.damping, Tensor) and not self.damping > 0:
            raise ValueError(f"damping must be positive; got {self.damping!r}")

    def begin(self, x: Tree, key: Tensor) -> Tensor:
        """The key of the next random vectors."""
        return key

    def pull(self, response: Response, cotangent: Tree, state: Tensor) -> tuple[tuple[Tree, ...], Tensor, Info]:
        """See `diffopt.implicit.Adjoint`; the residual is that of the damped system."""
        now, later = random.split(state)
        v, unravel = tree.ravel(cotangent)
        H = hessian_operator(lambda x: response.objective(x, *response.args), response.x)
        product = H.bind(*H.parameters).matvec
        u = self._inverse(product, now, v)
        size = torch.linalg.vector_norm(v)
        left = torch.linalg.vector_norm(v - product(u) - self.damping * u)
        residual = left / torch.where(size == 0, 1.0, size)
        return pulled(response, unravel(u)), later, Info(residual, torch.full((), self.rank + 1, device=v.device))

    def respond(self, response: Response, state: Tensor) -> Tree:
        """See `diffopt.implicit.Adjoint`; the approximate Hessian is taken as a constant."""
        unravel = tree.ravel(response.x)[1]
        H = hessian_operator(lambda x: response.objective(x, *response.args), response.x)
        product = H.bind(*(p.detach() for p in H.parameters)).matvec
        slope = tree.ravel(response.equation.residual(response.x, *response.args))[0]
        change = unravel(self._inverse(product, state, slope - slope.detach()))
        return tree.map(lambda x, c: x - c, response.x, change)

    def _inverse(self, product, key: Tensor, v: Tensor) -> Tensor:
        rank = min(self.rank, v.numel())
        omega = random.normal(key, (v.numel(), rank), dtype=v.dtype)
        Y = torch.stack([product(w) for w in omega.unbind(1)], dim=1)
        core = self.damping * (omega.mT @ Y) + Y.mT @ Y
        eps = torch.finfo(v.dtype).eps * torch.diagonal(core).sum()
        core = (core + core.mT) / 2 + eps * torch.eye(rank, dtype=v.dtype, device=v.device)
        return (v - Y @ torch.linalg.solve(core, Y.mT @ v)) / self.damping
