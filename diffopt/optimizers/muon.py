"""Muon: momentum with its singular values set to about one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.optimizers.adamw import adamw
from diffopt.transforms import (
    EmptyState,
    GradientTransformation,
    add_decayed_weights,
    chain,
    ema,
    scale_by_learning_rate,
)
from diffopt.transforms.leafwise import leafwise
from diffopt.transforms.leaves import check_hyperparameter
from diffopt.transforms.masked import partition_leaves
from diffopt.transforms.masks import mask_leaves
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["muon", "orthogonalize"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon(
    learning_rate: Numeric | Schedule,
    momentum: Numeric = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    eps: Numeric = 1e-7,
    weight_decay: Numeric = 0.1,
    matrices: Tree | Callable[[Tree], Tree] | None = None,
    adam_learning_rate: Numeric | Schedule | None = None,
    adam_b1: Numeric = 0.9,
    adam_b2: Numeric = 0.95,
    adam_eps: Numeric = 1e-8,
    adam_eps_root: Numeric = 0.0,
) -> GradientTransformation:
    r"""Descend along orthogonalized momentum for matrices, and as AdamW does for all else.

    .. math::
        m_t = \gamma m_{t-1} + (1 - \gamma) g_t, \quad d = m_t \ \text{ or, with Nesterov, } \
        (1 - \gamma) g_t + \gamma m_t, \quad
        \theta_{t+1} = \theta_t - \alpha \left(\sqrt{\max(1, \text{rows} / \text{columns})}\; O(d)
        + \lambda \theta_t\right)

    with the orthogonalization O of `orthogonalize`. Matrices are laid out as in `torch.nn.Linear`: a row an output.
    (`torch.optim.Muon` computes the same, with O in bfloat16.)

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        momentum: The decay :math:`\gamma`, in [0, 1), a number or a 0-d tensor like those below.
        nesterov: Whether to use Nesterov momentum.
        ns_steps: Newton-Schulz iterations, at least 0.
        eps: The least norm by which a matrix is divided, at least 0.
        weight_decay: The multiple :math:`\lambda` of the weights, at least 0, for matrices and all else.
        matrices: Which leaves are matrices: a tree of bools, a prefix of one, or a function from the parameters to
            either. Default: those of two dimensions. Embeddings and output layers are better left to AdamW.
        adam_learning_rate: The rate of AdamW. Default: learning_rate.
        adam_b1: Decay of AdamW's mean, in [0, 1).
        adam_b2: Decay of AdamW's mean square, in [0, 1).
        adam_eps: Added outside AdamW's root, at least 0.
        adam_eps_root: Added inside AdamW's root, at least 0.

    Returns:
        A transformation, whose update needs ``params``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions; in update, if a leaf said to be a matrix
            has not two dimensions.

    Example:
        >>> from diffopt.transforms import step
        >>> optimizer, x = muon(0.1, weight_decay=0.0), {"w": torch.eye(2), "b": torch.ones(1)}
        >>> step(optimizer, x, optimizer.init(x), x)[0]["b"]
        tensor([0.9000])

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    check_hyperparameter("eps", eps, at_least=0.0)
    if not isinstance(ns_steps, int) or ns_steps < 0:
        raise ValueError(f"`ns_steps` must be an int of at least 0; got {ns_steps!r:.60}.")

    def labels(params: Tree) -> list[str]:
        chosen = [p.ndim == 2 for p in tree.leaves(params)] if matrices is None else mask_leaves(matrices, params)
        return ["muon" if matrix else "adamw" for matrix in chosen]

    def rule(d: Tensor, eps: Any) -> tuple[Tensor]:
        rows, columns = _matrix_shape(d)
        return (max(1.0, rows / max(columns, 1)) ** 0.5 * orthogonalize(d, ns_steps, eps),)

    by_muon = chain(
        _nesterov_mean(momentum) if nesterov else ema(momentum, debias=False),
        leafwise(EmptyState, rule, lambda count: (eps,)),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(learning_rate),
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    by_adamw = adamw(rate, adam_b1, adam_b2, adam_eps, adam_eps_root, weight_decay=weight_decay)
    return partition_leaves({"muon": by_muon, "adamw": by_adamw}, labels)


def orthogonalize(matrix: Tensor, steps: int = 5, eps: Numeric = 1e-7) -> Tensor:
    r"""Set the singular values of a matrix to about one, by quintic Newton-Schulz iterations.

    .. math::
        X_0 = \frac{M}{\max(\lVert M \rVert_F, \epsilon)}, \qquad
        X_{k+1} = a X_k + b (X_k X_k^T) X_k + c (X_k X_k^T)^2 X_k

    with coefficients (3.4445, -4.7750, 2.0315), for which singular values end between about 0.7 and 1.2.

    Args:
        matrix: The matrix, shape (m, n), of a floating dtype, in which it is computed.
        steps: The number of iterations.
        eps: The least norm by which to divide, a number or a 0-d tensor.

    Returns:
        The matrix of shape (m, n) with the same singular vectors.

    Raises:
        ValueError: If it is no matrix.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.tensor([[3.0, 1.0], [0.0, 2.0]])))
        >>> bool(((values > 0.6) & (values < 1.3)).all())
        True

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    rows, columns = _matrix_shape(matrix)
    if rows > columns:
        return orthogonalize(matrix.mT, steps, eps).mT
    norm = tree.norm(matrix)
    x, (a, b, c) = matrix / torch.where(norm > eps, norm, eps), COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _nesterov_mean(momentum: Numeric) -> GradientTransformation:
    mean = ema(momentum, debias=False)

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        _, new = mean.update(updates, state)
        return mean.update(updates, new)[0], new

    return GradientTransformation(mean.init, update)


def _matrix_shape(matrix: Tensor) -> tuple[int, int]:
    if matrix.ndim != 2:
        raise ValueError(f"Muon needs matrices; got shape {tuple(matrix.shape)}. Leave it to AdamW by `matrices`.")
    return matrix.shape[0], matrix.shape[1]
