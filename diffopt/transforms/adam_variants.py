"""Scalings of the Adam family: amsgrad, adamax, nadam, radam, adabelief and yogi.

All keep a running mean of the gradient and divide by a running measure of its size. Where the measure is a root,
`eps_root` is added inside it: with 0, the derivative through a zero gradient is NaN, as in `scale_by_adam`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.transforms.adam import ScaleByAdamState
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leafwise import bias_correction, leafwise
from diffopt.transforms.leaves import as_dtype, check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = [
    "ScaleByAmsgradState",
    "ScaleByNadamState",
    "scale_by_adabelief",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_nadam",
    "scale_by_radam",
    "scale_by_yogi",
]


class ScaleByAmsgradState(NamedTuple):
    """The state of `scale_by_amsgrad`: the count, and trees like the parameters.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        mu: Running mean of the gradient.
        nu: Running mean of the squared gradient.
        nu_max: The largest nu so far.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Tree
    nu: Tree
    nu_max: Tree


class ScaleByNadamState(NamedTuple):
    """The state of `scale_by_nadam`: the count and its momentum product, and trees like the parameters.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        product: The product of the momenta so far, a float64 0-d tensor.
        moments: Running means of the gradient and its square, as `ScaleByAdamState`, whose count is the same.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    product: Tensor
    moments: ScaleByAdamState


def scale_by_amsgrad(
    b1: Numeric = 0.9, b2: Numeric = 0.999, eps: Numeric = 1e-8, eps_root: Numeric = 0.0
) -> GradientTransformation:
    r"""Scale the updates by Adam's rule with the largest mean square so far.

    .. math::
        \mu_t = b_1 \mu_{t-1} + (1 - b_1) g_t, \quad \nu_t = b_2 \nu_{t-1} + (1 - b_2) g_t^2, \quad
        \hat\nu_t = \max(\hat\nu_{t-1}, \nu_t), \quad
        u_t = \frac{\mu_t / (1 - b_1^t)}{\sqrt{\hat\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}

    The corrections for bias are Adam's, the second after the maximum, as in torch; the paper has none.

    Args:
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like all four.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.

    Returns:
        A transformation with `ScaleByAmsgradState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_amsgrad()
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -1.0000])

    References:
        Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, algorithm 2.
    """
    _check(b1, b2, eps, eps_root)

    def rule(g, mu, nu, nu_max, b1, rest1, b2, rest2, correction1, correction2, eps, eps_root):
        mu, nu = b1 * mu + rest1 * g, b2 * nu + rest2 * g * g
        nu_max = torch.maximum(nu_max, nu)
        return mu / correction1 / (torch.sqrt(nu_max / correction2 + eps_root) + eps), mu, nu, nu_max

    return leafwise(ScaleByAmsgradState, rule, lambda count: (*_moments(b1, b2, count), eps, eps_root))


def scale_by_adamax(b1: Numeric = 0.9, b2: Numeric = 0.999, eps: Numeric = 1e-8) -> GradientTransformation:
    r"""Scale the updates by Adam's rule with the decaying maximum norm in place of the root mean square.

    .. math::
        \mu_t = b_1 \mu_{t-1} + (1 - b_1) g_t, \quad \nu_t = \max(b_2 \nu_{t-1}, |g_t| + \epsilon), \quad
        u_t = \frac{\mu_t}{(1 - b_1^t)\, \nu_t}

    Args:
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like all three.
        b2: Decay of the maximum, in [0, 1).
        eps: Added to the size of the gradient, at least 0.

    Returns:
        A transformation with `ScaleByAdamState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_adamax()
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 2.
    """
    _check(b1, b2, eps)

    def rule(g, mu, nu, b1, rest1, b2, correction1, eps):
        mu, nu = b1 * mu + rest1 * g, torch.maximum(b2 * nu, g.abs() + eps)
        return mu / correction1 / nu, mu, nu

    return leafwise(ScaleByAdamState, rule, lambda count: (b1, 1 - b1, b2, bias_correction(b1, count), eps))


def scale_by_nadam(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    momentum_decay: Numeric = 4e-3,
) -> GradientTransformation:
    r"""Scale the updates by Adam's rule with Nesterov momentum that warms up.

    .. math::
        \gamma_t = b_1 (1 - \tfrac12\, 0.96^{\psi t}), \quad \Gamma_t = \prod_{s \le t} \gamma_s, \quad
        u_t = \frac{\frac{1 - \gamma_t}{1 - \Gamma_t} g_t + \frac{\gamma_{t+1}}{1 - \Gamma_{t+1}} \mu_t}
        {\sqrt{\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}

    with Adam's running means :math:`\mu, \nu`. The warm-up is torch's. For a constant momentum, use
    ``scale_by_adam(nesterov=True)``.

    Args:
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like all five.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.
        momentum_decay: The speed :math:`\psi` of the warm-up, at least 0.

    Returns:
        A transformation with `ScaleByNadamState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_nadam(momentum_decay=0.0)
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 1.0564, -1.0564])

    References:
        Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016.
    """
    _check(b1, b2, eps, eps_root)
    check_hyperparameter("momentum_decay", momentum_decay, at_least=0.0)

    def rule(g, mu, nu, b1, rest1, b2, rest2, correction2, grad_weight, mean_weight, eps, eps_root):
        mu, nu = b1 * mu + rest1 * g, b2 * nu + rest2 * g * g
        return (grad_weight * g + mean_weight * mu) / (torch.sqrt(nu / correction2 + eps_root) + eps), mu, nu

    def momentum(count: Tensor) -> Tensor:
        exponent = as_dtype(momentum_decay, torch.float64) * count.to(torch.float64)
        return as_dtype(b1, torch.float64) * (1 - 0.5 * 0.96**exponent)

    def init(params: Tree) -> ScaleByNadamState:
        moments = leafwise(ScaleByAdamState, rule, lambda count: ()).init(params)
        return ScaleByNadamState(moments.count, torch.ones_like(moments.count, dtype=torch.float64), moments)

    def update(
        updates: Tree, state: ScaleByNadamState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ScaleByNadamState]:
        now, ahead = momentum(state.count + 1), momentum(state.count + 2)
        product = state.product * now
        weights = ((1 - now) / (1 - product), ahead / (1 - product * ahead))

        def scalars(count: Tensor) -> tuple[Numeric, ...]:
            return b1, 1 - b1, b2, 1 - b2, bias_correction(b2, count), *weights, eps, eps_root

        out, moments = leafwise(ScaleByAdamState, rule, scalars).update(updates, state.moments)
        return out, ScaleByNadamState(moments.count, product, moments)

    return GradientTransformation(init, update)


def scale_by_radam(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    threshold: Numeric = 5.0,
) -> GradientTransformation:
    r"""Scale the updates by Adam's rule, rectified for the few gradients that the mean square has seen.

    .. math::
        \rho_\infty = \frac{2}{1 - b_2} - 1, \quad \rho_t = \rho_\infty - \frac{2 t b_2^t}{1 - b_2^t}, \quad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}, \quad
        u_t = \frac{\mu_t}{1 - b_1^t} \cdot
        \begin{cases} r_t \frac{\sqrt{1 - b_2^t}}{\sqrt{\nu_t + \epsilon_\text{root}} + \epsilon}
        & \rho_t > \text{threshold} \\ 1 & \text{else} \end{cases}

    with Adam's running means :math:`\mu, \nu`. As in torch, both epsilons meet :math:`\nu` before its correction for
    bias; the paper has none.

    Args:
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like all five.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.
        threshold: The length of the approximated average above which the mean square is used, at least 4: the
            default is torch's, 4 the paper's. It has no derivative.

    Returns:
        A transformation with `ScaleByAdamState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_radam()
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 3.0000, -0.1000])

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, algorithm 2.
    """
    _check(b1, b2, eps, eps_root)
    check_hyperparameter("threshold", threshold, at_least=4.0)

    def scalars(count: Tensor) -> tuple[Numeric, ...]:
        t, decay, correction = count.to(torch.float64), as_dtype(b2, torch.float64), bias_correction(b2, count)
        rho_inf = 2 / (1 - decay) - 1
        rho = rho_inf - 2 * t * (1 - correction) / correction
        rectified = rho > as_dtype(threshold, torch.float64)
        # Any lengths above 4 where they are not used, so that no NaN meets a zero in a derivative.
        rho, rho_inf = torch.where(rectified, rho, 5.0), torch.where(rectified, rho_inf, 6.0)
        ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        factor = torch.sqrt(ratio * correction)
        return b1, 1 - b1, b2, 1 - b2, bias_correction(b1, count), rectified.to(torch.float64), factor, eps, eps_root

    def rule(g, mu, nu, b1, rest1, b2, rest2, correction1, rectified, factor, eps, eps_root):
        mu, nu = b1 * mu + rest1 * g, b2 * nu + rest2 * g * g
        mean = mu / correction1
        root = torch.sqrt(torch.where(rectified > 0, nu + eps_root, 1.0))
        return torch.where(rectified > 0, mean * factor / (root + eps), mean), mu, nu

    return leafwise(ScaleByAdamState, rule, scalars)


def scale_by_adabelief(
    b1: Numeric = 0.9, b2: Numeric = 0.999, eps: Numeric = 1e-16, eps_root: Numeric = 1e-16
) -> GradientTransformation:
    r"""Scale the updates by the mean gradient over the root of its mean squared error.

    .. math::
        \mu_t = b_1 \mu_{t-1} + (1 - b_1) g_t, \quad
        \nu_t = b_2 \nu_{t-1} + (1 - b_2) (g_t - \mu_t)^2 + \epsilon_\text{root}, \quad
        u_t = \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t)} + \epsilon}

    Args:
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like all four.
        b2: Decay of the mean squared error, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added to the mean squared error in each step, at least 0.

    Returns:
        A transformation with `ScaleByAdamState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_adabelief(b1=0.5)
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 2., -2.])

    References:
        Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients",
        NeurIPS 2020, algorithm 2.
    """
    _check(b1, b2, eps, eps_root)

    def rule(g, mu, nu, b1, rest1, b2, rest2, correction1, correction2, eps, eps_root):
        mu = b1 * mu + rest1 * g
        nu = b2 * nu + rest2 * (g - mu) ** 2 + eps_root
        return mu / correction1 / (torch.sqrt(nu / correction2) + eps), mu, nu

    return leafwise(ScaleByAdamState, rule, lambda count: (*_moments(b1, b2, count), eps, eps_root))


def scale_by_yogi(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-3,
    eps_root: Numeric = 0.0,
    *,
    initial_accumulator_value: Numeric = 1e-6,
) -> GradientTransformation:
    r"""Scale the updates by Adam's rule with a mean square that moves by additive steps.

    .. math::
        \mu_t = b_1 \mu_{t-1} + (1 - b_1) g_t, \quad
        \nu_t = \nu_{t-1} - (1 - b_2)\, \text{sign}(\nu_{t-1} - g_t^2)\, g_t^2, \quad
        u_t = \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}

    The corrections for bias are Adam's; the paper has none. The mean :math:`\mu` starts at 0.

    Args:
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like all five.
        b2: One minus the step of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.
        initial_accumulator_value: The first :math:`\nu`, at least 0.

    Returns:
        A transformation with `ScaleByAdamState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_yogi(eps=0.0, initial_accumulator_value=0.0)
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -1.0000])

    References:
        Zaheer et al., "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018, algorithm 2.
    """
    _check(b1, b2, eps, eps_root)
    check_hyperparameter("initial_accumulator_value", initial_accumulator_value, at_least=0.0)

    def rule(g, mu, nu, b1, rest1, b2, rest2, correction1, correction2, eps, eps_root):
        mu, square = b1 * mu + rest1 * g, g * g
        nu = nu - rest2 * torch.sign(nu - square) * square
        return mu / correction1 / (torch.sqrt(nu / correction2 + eps_root) + eps), mu, nu

    return leafwise(
        ScaleByAdamState,
        rule,
        lambda count: (*_moments(b1, b2, count), eps, eps_root),
        initial=initial_accumulator_value,
    )


def _check(b1: Numeric, b2: Numeric, eps: Numeric, eps_root: Numeric = 0.0) -> None:
    check_hyperparameter("b1", b1, at_least=0.0, below=1.0)
    check_hyperparameter("b2", b2, at_least=0.0, below=1.0)
    check_hyperparameter("eps", eps, at_least=0.0)
    check_hyperparameter("eps_root", eps_root, at_least=0.0)


def _moments(b1: Numeric, b2: Numeric, count: Tensor) -> tuple[Numeric, ...]:
    return b1, 1 - b1, b2, 1 - b2, bias_correction(b1, count), bias_correction(b2, count)
