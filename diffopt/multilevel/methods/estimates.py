r"""Derivatives of the lower level's steps from their ends alone, at perturbed arguments."""

from typing import Any

from torch import Tensor

from diffopt import random, tree
from diffopt.implicit.protocol import Info, Response, unsolved
from diffopt.typing import Tree
from diffopt.zero_order import es_grad, smoothed

__all__ = ["pulled_by_values", "responded_by_values"]


def pulled_by_values(
    response: Response, cotangent: Tree, key: Tensor, sigma: float, num_samples: int, **options: Any
) -> tuple[tuple[Tree, ...], Tensor, Info]:
    """The estimated cotangents of a response's arguments, the next key, and what is known of them.

    Args:
        response: The response.
        cotangent: What is pulled, a tree like the iterate.
        key: The key of the perturbations.
        sigma: Their scale.
        num_samples: The number of runs.
        **options: As in `es_grad`.

    Returns:
        What `pull` of an adjoint returns.
    """
    now, later = random.split(key)
    along = lambda args: tree.vdot(cotangent, response.retrace(None, None, *args))  # noqa: E731
    parts, _ = es_grad(along, sigma, num_samples, **options)(now, response.args)
    return parts, later, unsolved(response.x)


def responded_by_values(response: Response, key: Tensor, sigma: float, num_samples: int, **options: Any) -> Tree:
    """The iterate, with the estimated derivative in the response's arguments; arguments as in `pulled_by_values`."""
    run = lambda args: response.retrace(None, None, *args)  # noqa: E731
    return smoothed(run, sigma, num_samples, value="f", **options)(key, response.args)
