r"""Gradients of expectations over samples that cannot be differentiated, by the score function.

.. math:: \nabla_\theta\, \mathbb{E}_{z \sim p_\theta} f(z) = \mathbb{E}\, f(z)\, \nabla_\theta \log p_\theta(z)
"""

from typing import Literal

from torch import Tensor

__all__ = ["magic_box", "score_function"]


def magic_box(log_prob: Tensor) -> Tensor:
    r"""Make a one whose derivatives of every order are those of a likelihood ratio: the operator of DiCE.

    .. math:: \exp(\ell - \operatorname{stop}(\ell))

    Args:
        log_prob: Logarithms of probabilities of what was sampled, of any shape: summed over all samples that a cost
            depends on.

    Returns:
        Ones of that shape; times a cost, their derivatives are the score-function estimates.

    Raises:
        TypeError: If it is not a floating-point tensor.

    Example:
        >>> import torch
        >>> torch.func.grad(torch.func.grad(lambda p: magic_box(p.log())))(torch.tensor(0.5))
        tensor(0.)

    References:
        Foerster, Farquhar, Al-Shedivat, Rocktäschel, Xing and Whiteson, "DiCE: The infinitely differentiable Monte
        Carlo estimator", ICML 2018, section 4.
    """
    _check_floating("log_prob", log_prob)
    return (log_prob - log_prob.detach()).exp()


def score_function(
    log_prob: Tensor, cost: Tensor, *, baseline: Tensor | float | Literal["leave_one_out"] | None = None
) -> Tensor:
    r"""Make the mean cost of samples, with derivatives of every order of its expectation.

    .. math:: \frac{1}{m} \sum_{i=1}^m \sum_{t=1}^T \left[ (c_{it} - b_{it})\,
              \square\Big(\sum_{s \le t} \ell_{is}\Big) + b_{it} \right]

    with the `magic_box` :math:`\square`.

    The samples must be constants (drawn without a derivative, or detached); log_prob, and cost where it is, are
    functions of the parameters.

    Args:
        log_prob: :math:`\ell`, the logarithm of the probability of each sample, shape (m,), or of each step of it,
            shape (m, T).
        cost: c, of the same shape; costs of a step depend on steps up to it.
        baseline: b, what is subtracted from costs: "leave_one_out", the mean of the other samples' costs (of that
            step); or a constant or a tensor that broadcasts to cost, that may not depend on the sample it belongs to.
            No derivative passes through it. It changes no expectation, of a derivative of any order, and lowers the
            variance.

    Returns:
        The mean over samples of the total cost, a 0-d tensor.

    Raises:
        TypeError: If log_prob or cost is not a floating-point tensor.
        ValueError: If shapes are not (m,) or (m, T) and the same, m is 0, or leave-one-out has one sample.

    Example:
        >>> import torch
        >>> logit, coins = torch.tensor(0.0), torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> def expected(logit):  # of the number of heads, sigmoid(logit)
        ...     log_prob = coins * logit - torch.nn.functional.softplus(logit)
        ...     return score_function(log_prob, coins)
        >>> expected(logit), torch.func.grad(expected)(logit)
        (tensor(0.5000), tensor(0.2500))

    References:
        Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.
        Foerster et al., "DiCE: The infinitely differentiable Monte Carlo estimator", ICML 2018, eqs. 6 and 7; Mao et
        al., "A baseline for any order gradient estimation in stochastic computation graphs", ICML 2019, eq. 8.
    """
    _check_floating("cost", cost)
    _check_floating("log_prob", log_prob)
    if cost.shape != log_prob.shape or cost.ndim not in (1, 2) or cost.shape[0] == 0:
        raise ValueError(
            "`log_prob` and `cost` must have one shape, (m,) or (m, T) with m samples; got "
            f"{tuple(log_prob.shape)} and {tuple(cost.shape)}"
        )
    box = magic_box(log_prob if log_prob.ndim < 2 else log_prob.cumsum(1))
    total = cost + (cost - _baseline(cost, baseline)) * (box - 1)
    return total.sum() / cost.shape[0]


def _baseline(cost: Tensor, baseline: Tensor | float | str | None) -> Tensor | float:
    if baseline is None:
        return 0.0
    if isinstance(baseline, Tensor | float | int):
        return baseline.detach() if isinstance(baseline, Tensor) else baseline
    if baseline != "leave_one_out":
        raise ValueError(f'`baseline` must be None, a number, a tensor or "leave_one_out"; got {baseline!r}')
    if cost.shape[0] < 2:
        raise ValueError("a leave-one-out baseline needs two samples or more; got one")
    fixed = cost.detach()
    return (fixed.sum(0) - fixed) / (cost.shape[0] - 1)


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor; got {got}")
