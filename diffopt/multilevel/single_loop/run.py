r"""The loop of a single-loop method, and its batches as a function of key and step.

.. math:: s_{t+1} = \text{step}(s_t, I(k, t), J(k, t))
"""

from typing import Any

import torch
from torch import Tensor

from diffopt import random
from diffopt.multilevel.single_loop.problem import BilevelProblem
from diffopt.multilevel.single_loop.protocol import SingleLoop
from diffopt.random.keys import check_key
from diffopt.schedules.hyperparameters import check_count

__all__ = ["draw", "run"]

_BLOCK = 256  # steps whose batches are drawn at once; the numbers do not depend on it


def draw(
    method: SingleLoop, problem: BilevelProblem, key: Tensor, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the batches of one step: samples with replacement, each as likely as any other.

    Args:
        method: The method, which says how many batches it takes.
        problem: The problem, which says how many samples there are.
        key: A key, int64, shape (2,).
        batch_size: How many samples a batch has. Default: all samples, in order, and no chance.

    Returns:
        Indices of inner and of outer samples, as `step` takes them: shapes `(k, b)`, or `(n,)` and `(m,)` for all.

    Raises:
        TypeError: If the key is not an int64 tensor, or the size not an int.
        ValueError: If the key is not of shape (2,), or the size below 1.

    Example:
        >>> from diffopt.multilevel.single_loop import AmIGO
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean()
        >>> problem = BilevelProblem(loss, loss, torch.ones(3), torch.ones(2))
        >>> inner, outer = draw(AmIGO(0.1, 0.1), problem, torch.tensor([42, 0]), 64)
        >>> inner.shape, outer.shape
        (torch.Size([21, 64]), torch.Size([1, 64]))
    """
    check_key(key)
    if batch_size is None:
        return (
            torch.arange(problem.inner_size, device=key.device),
            torch.arange(problem.outer_size, device=key.device),
        )
    check_count("batch_size", batch_size)
    counts, sizes = method.draws, (problem.inner_size, problem.outer_size)
    words = random.bits(key, (counts.inner + counts.outer, batch_size))
    inner, outer = words.split([counts.inner, counts.outer])
    return (inner * sizes[0]) >> 32, (outer * sizes[1]) >> 32


def run(
    method: SingleLoop,
    problem: BilevelProblem,
    state: Any,
    key: Tensor,
    steps: int,
    *,
    batch_size: int | None = None,
) -> Any:
    """Take steps of a method.

    The batches depend on the key and on the steps that the state has taken, so that 20 steps are 10 and 10 more, also
    where the state was saved between. Under `torch.func.vmap` over keys each lane draws its own.

    Args:
        method: The method.
        problem: The problem.
        state: Where to start: `method.init(problem, z, x)`, or what `run` returned.
        key: A key, int64, shape (2,): the same in every part of one run.
        steps: How many steps to take.
        batch_size: How many samples a batch has. Default: all samples.

    Returns:
        The state.

    Raises:
        TypeError: If the key is not an int64 tensor, a number not an int, or the state none of a method.
        ValueError: If the key is not of shape (2,), or a number below 1.

    Example:
        >>> from diffopt.multilevel.single_loop import SABA
        >>> inner = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2  # z* = x + mean of the data
        >>> outer = lambda z, x, batch: ((z - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(inner, outer, torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0]))
        >>> method, key = SABA(0.5, 0.2), torch.tensor([42, 0])
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> f"{run(method, problem, state, key, 100, batch_size=4).x:.2f}"
        '4.00'
    """
    check_count("steps", steps)
    check_key(key)
    if not isinstance(getattr(state, "count", None), Tensor):
        raise TypeError(f"`state` must be one that `init` or `step` returned; got {type(state).__name__}.")
    done, taken = 0, state.count
    while done < steps:
        block = min(_BLOCK, steps - done)
        for inner, outer in _drawn(method, problem, key, taken + done, block, batch_size):
            state = method.step(problem, state, inner, outer)
        done += block
    return state


def _drawn(method, problem, key, first, block, batch_size):
    if batch_size is None:
        return [draw(method, problem, key)] * block
    keys = random.fold_in(key, first + torch.arange(block, device=key.device))
    drawn = torch.func.vmap(lambda key: draw(method, problem, key, batch_size))(keys)
    return zip(*(indices.unbind() for indices in drawn), strict=True)
