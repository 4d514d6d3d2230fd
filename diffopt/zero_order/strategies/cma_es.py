"""CMA-ES: a Gaussian whose covariance adapts to the landscape; the strategy for up to some hundred unknowns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff.levels import any_lane
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.strategies.base import (
    Strategy,
    check_population_size,
    check_sigma,
    filled,
    normal_members,
    on_vectors,
)
from diffopt.zero_order.strategies.cma_paths import follow
from diffopt.zero_order.strategies.cma_rates import Rates, by_rank, rates
from diffopt.zero_order.strategies.fitness import rank_weights

__all__ = ["CMAESState", "cma_es"]


class CMAESState(NamedTuple):
    """The state of `cma_es`.

    Attributes:
        mean: The parameters, a tree.
        best: The best member so far, a tree like them.
        best_loss: Its loss, a 0-d tensor.
        generation: How often `tell` was called, an int64 0-d tensor.
        sigma: The step size, a 0-d tensor.
        step_path: The path of the step size, shape (n,).
        covariance_path: The path of the covariance, shape (n,).
        covariance: The matrix C, shape (n, n).
        axes: The eigenvectors of C, as columns, shape (n, n).
        scales: The roots of its eigenvalues, shape (n,).
    """

    mean: Tree
    best: Tree
    best_loss: Tensor
    generation: Tensor
    sigma: Tensor
    step_path: Tensor
    covariance_path: Tensor
    covariance: Tensor
    axes: Tensor
    scales: Tensor


def cma_es(sigma: Numeric, population_size: int | None = None, *, active: bool = True) -> Strategy:
    r"""Adapt mean, step size and covariance of a Gaussian by ranks.

    .. math:: x_i = m + \sigma y_i, \quad y_i \sim \mathcal{N}(0, C), \qquad
              m \leftarrow m + \sigma \sum_{w_i > 0} w_i y_{i:\lambda}

    .. math:: C \leftarrow \Big(1 - c_1 - c_\mu \sum_i w_i\Big) C + c_1 p_c p_c^\top
              + c_\mu \sum_i w_i^\circ y_{i:\lambda} y_{i:\lambda}^\top

    with the paths and the step size of `cma_paths` and the constants of `cma_rates`; the negative weights are
    :math:`w_i^\circ = w_i n / \lVert C^{-1/2} y_i \rVert^2`. The search is the same for any increasing function of f,
    and under rotations. Memory is quadratic and time cubic in the number n of unknowns; for thousands, take
    `sep_cma_es`.

    Args:
        sigma: The step size at the start, above 0, a number or a 0-d tensor: about a third of the distance to where the
            optimum is expected.
        population_size: The number of members, at least 2. Default: :math:`4 + \lfloor 3 \ln n \rfloor`; a larger one
            searches more globally.
        active: Whether the worse half shrinks the covariance along its steps.

    Returns:
        A strategy with `CMAESState`. Its eigendecomposition has no derivative (NaN) where eigenvalues are equal.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If sigma is not above 0, or the size below 2.

    Example:
        >>> from diffopt import random
        >>> from diffopt.zero_order import run
        >>> found = run(cma_es(0.5), lambda x: (x**2).sum(), torch.ones(3), random.key(0), 100)
        >>> bool(found.loss < 1e-8)
        True

    References:
        Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, figure 6.
    """
    check_sigma(sigma)
    check_population_size(population_size)

    def start(x: Tensor, params: Tree) -> tuple[Tensor, ...]:
        eye, zeros = torch.eye(x.shape[0], dtype=x.dtype, device=x.device), torch.zeros_like(x)
        return filled(x[0], sigma), zeros, zeros.clone(), eye, eye.clone(), torch.ones_like(x)

    def sample(key: Tensor, x: Tensor, state: CMAESState) -> Tensor:
        z = normal_members(key, x, population_size)
        return x + state.sigma * ((z * state.scales) @ state.axes.mT)

    def learn(x: Tensor, members: Tensor, losses: Tensor, state: CMAESState) -> tuple[Tensor, dict[str, Any]]:
        steps = (members - x) / state.sigma
        white = (steps @ state.axes) / state.scales
        found = rates(x.shape[0], steps.shape[0], active=active)
        weights = rank_weights(losses, by_rank(found, x))
        y = weights[0] @ steps
        paths = follow(
            found,
            y,
            state.axes @ (weights[0] @ white),
            state.generation,
            state.sigma,
            state.step_path,
            state.covariance_path,
        )
        covariance = _covariance(found, steps, white, weights, paths.covariance_path, paths.decay, state)
        axes, scales = _decomposed(found, covariance, state)
        return x + state.sigma * y, {
            "sigma": paths.sigma,
            "step_path": paths.step_path,
            "covariance_path": paths.covariance_path,
            "covariance": covariance,
            "axes": axes,
            "scales": scales,
        }

    return on_vectors(CMAESState, start, sample, learn)


def _covariance(
    found: Rates, steps: Tensor, white: Tensor, weights: Tensor, path: Tensor, decay: Tensor, state: CMAESState
) -> Tensor:
    """The rank-one and rank-mu updates of C."""
    lengths = (white * white).sum(dim=1)
    scaled = weights[0] + weights[1] * steps.shape[1] / torch.where(lengths > 0, lengths, 1.0)
    update = steps.mT @ (scaled[:, None] * steps)
    kept = decay - found.c_mu * sum(found.weights)
    return kept * state.covariance + found.c_1 * torch.outer(path, path) + found.c_mu * (update + update.mT) / 2


def _decomposed(found: Rates, covariance: Tensor, state: CMAESState) -> tuple[Tensor, Tensor]:
    """Eigenvectors and roots of eigenvalues, anew once C has changed enough."""
    n = covariance.shape[-1]
    every = max(1, int(1 / (10 * n * (found.c_1 + found.c_mu))))
    due = (state.generation + 1) % every == 0
    if every > 1 and not torch.compiler.is_compiling() and not any_lane(due):
        return state.axes, state.scales
    eigenvalues, axes = torch.linalg.eigh(covariance)
    scales = eigenvalues.clamp(min=torch.finfo(eigenvalues.dtype).tiny).sqrt()
    # eigh gives columns, which a compiled generation would take for another kind of state.
    return torch.where(due, axes, state.axes).contiguous(), torch.where(due, scales, state.scales)
