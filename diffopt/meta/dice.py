r"""The surrogate of sampled trajectories whose derivatives of every order are unbiased estimates.

.. math:: L = \sum_t \gamma^t\, c_t \exp\bigl(\ell_t - \lfloor \ell_t \rfloor\bigr), \qquad
          \ell_t = \sum_{s \le t} \log \pi(a_s)
"""

from typing import Any, Literal

import torch
from torch import Tensor

from diffopt import tree
from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms.leaves import flatten_floating, precise_dtype
from diffopt.typing import Numeric

__all__ = ["dice"]


def dice(
    log_probs: Tensor,
    costs: Tensor,
    discount: Numeric = 1.0,
    *,
    baseline: Tensor | Literal["leave_one_out"] | None = None,
) -> Tensor:
    r"""Take the mean discounted cost of trajectories, with estimates of the expectation's derivatives as its own.

    .. math:: L = \frac1N \sum_{n, t} \gamma^t \bigl[ c_{nt}\, \square(\ell_{nt})
                    + b_{nt}\, (1 - \square(\log \pi(a_{nt}))) \bigr], \qquad
              \square(x) = \exp(x - \lfloor x \rfloor)

    The box :math:`\square` is 1, and its derivatives are those of the probability over itself; what is in
    :math:`\lfloor\cdot\rfloor` is a constant. So the derivatives of L, of every order and by any transform, are
    unbiased estimates of those of the expected cost; `torch.func.grad` of it is REINFORCE with costs to go. Each
    action answers for the costs from its own time on.

    Args:
        log_probs: The log-probabilities of the actions that were sampled, shape (trajectories, times); where several
            players act at once, the sum over them. Actions themselves carry no derivative.
        costs: The costs that followed, of the same shape; rewards with the sign changed. They may depend on parameters.
        discount: The factor :math:`\gamma`, in [0, 1], a number or a 0-d tensor.
        baseline: The expected discounted cost from a time on, of the same shape, which must not depend on the action
            of that time; "leave_one_out" takes the mean over the other trajectories. It lowers the variance and leaves
            the value and the expectation of every derivative as they are.

    Returns:
        The surrogate, a 0-d tensor, equal to the mean discounted cost.

    Raises:
        TypeError: If log_probs or costs are not floating-point tensors, or the discount is no number.
        ValueError: If shapes differ or are not (trajectories, times), there is no trajectory, the discount is out of
            range, or one trajectory alone is asked for a baseline from the others.

    Example:
        >>> import torch
        >>> chosen = torch.tensor([[0.0], [1.0]])  # one coin toss a trajectory: once tails, once heads
        >>> cost_of_heads = lambda p: dice(torch.log(chosen * p + (1 - chosen) * (1 - p)), chosen)
        >>> torch.func.grad(cost_of_heads)(torch.tensor(0.5))
        tensor(1.)

    References:
        Foerster et al. (2018), DiCE: the infinitely differentiable Monte Carlo estimator, eq. 4. Mao et al. (2019),
        A baseline for any order gradient estimation in stochastic computation graphs.
    """
    _check(log_probs, costs, discount, baseline)
    powers = _powers(discount, costs)
    total = costs * _box(log_probs.cumsum(1))
    if baseline is not None:
        level = _mean_of_others(costs, powers) if isinstance(baseline, str) else baseline
        total = total + level * (1 - _box(log_probs))
    return (powers * total).sum(1).mean()


def _box(x: Tensor) -> Tensor:
    return (x - x.detach()).exp()


def _powers(discount: Numeric, costs: Tensor) -> Tensor:
    """Those of the discount, shape (times,). Of a tensor they are products, which have derivatives at 0, too."""
    length, dtype = costs.shape[1], precise_dtype(costs.dtype)
    if not isinstance(discount, Tensor):
        return (discount ** torch.arange(length, dtype=dtype, device=costs.device)).to(costs.dtype)
    one = torch.ones(1, dtype=dtype, device=costs.device)
    return torch.cat([one, discount.to(one).expand(length)])[:length].cumprod(0).to(costs.dtype)


def _mean_of_others(costs: Tensor, powers: Tensor) -> Tensor:
    """The discounted costs from each time on, the mean over all trajectories but the own one."""
    times = torch.arange(len(powers), device=powers.device)
    to_go = costs @ powers[(times[:, None] - times).clamp(min=0)].tril()
    return (to_go.sum(0) - to_go) / (len(costs) - 1)


def _check(log_probs: Tensor, costs: Tensor, discount: Numeric, baseline: Any) -> None:
    flatten_floating((log_probs, costs), "(log_probs, costs)")
    if log_probs.ndim != 2 or log_probs.shape != costs.shape or not len(costs):
        raise ValueError(
            "`log_probs` and `costs` must both be of shape (trajectories, times), of one trajectory or more; got "
            f"{tuple(log_probs.shape)} and {tuple(costs.shape)}."
        )
    check_hyperparameter("discount", discount, at_least=0.0, at_most=1.0)
    if baseline is None:
        return
    if isinstance(baseline, str):
        if baseline != "leave_one_out":
            raise ValueError(f'`baseline` must be a tensor, "leave_one_out" or None; got {baseline!r}.')
        if len(costs) < 2:
            raise ValueError('baseline="leave_one_out" needs two trajectories or more; got one.')
    else:
        tree.check_like(baseline, costs, name="baseline", reference_name="costs")
