"""Scalings by the root of a mean or sum of squares, without momentum: rms, stddev, rss and adadelta.

With ``eps_root = 0``, the derivative through a zero gradient is NaN where the root is of 0, as in `scale_by_adam`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leafwise import leafwise
from diffopt.transforms.leaves import check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = [
    "ScaleByAdadeltaState",
    "ScaleByRmsState",
    "ScaleByRssState",
    "ScaleByStddevState",
    "scale_by_adadelta",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_stddev",
]


class ScaleByRmsState(NamedTuple):
    """The state of `scale_by_rms`.

    Attributes:
        nu: Running mean of the squared gradient, a tree like the parameters.
    """

    nu: Tree


class ScaleByStddevState(NamedTuple):
    """The state of `scale_by_stddev`: trees like the parameters.

    Attributes:
        mu: Running mean of the gradient.
        nu: Running mean of the squared gradient.
    """

    mu: Tree
    nu: Tree


class ScaleByRssState(NamedTuple):
    """The state of `scale_by_rss`.

    Attributes:
        sum_of_squares: Sum of the squared gradients, a tree like the parameters.
    """

    sum_of_squares: Tree


class ScaleByAdadeltaState(NamedTuple):
    """The state of `scale_by_adadelta`: trees like the parameters.

    Attributes:
        e_g: Running mean of the squared gradient.
        e_x: Running mean of the squared update.
    """

    e_g: Tree
    e_x: Tree


def scale_by_rms(
    decay: Numeric = 0.9, eps: Numeric = 1e-8, eps_root: Numeric = 0.0, *, initial_scale: Numeric = 0.0
) -> GradientTransformation:
    r"""Divide the updates by their root mean square.

    .. math::
        \nu_t = \gamma \nu_{t-1} + (1 - \gamma) g_t^2, \qquad
        u_t = \frac{g_t}{\sqrt{\nu_t + \epsilon_\text{root}} + \epsilon}

    Args:
        decay: The decay :math:`\gamma`, in [0, 1), a number or a 0-d tensor like all four.
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.
        initial_scale: The first :math:`\nu`, at least 0.

    Returns:
        A transformation with `ScaleByRmsState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_rms(decay=0.75)
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -2.0000])

    References:
        Tieleman and Hinton, "Lecture 6.5, RMSProp", Coursera, 2012.
    """

    def rule(g, nu, decay, rest, eps, eps_root):
        nu = decay * nu + rest * g * g
        return g / (torch.sqrt(nu + eps_root) + eps), nu

    return _decaying(ScaleByRmsState, rule, decay, eps, eps_root, initial_scale)


def scale_by_stddev(
    decay: Numeric = 0.9, eps: Numeric = 1e-8, eps_root: Numeric = 0.0, *, initial_scale: Numeric = 0.0
) -> GradientTransformation:
    r"""Divide the updates by their standard deviation.

    .. math::
        \mu_t = \gamma \mu_{t-1} + (1 - \gamma) g_t, \quad \nu_t = \gamma \nu_{t-1} + (1 - \gamma) g_t^2, \quad
        u_t = \frac{g_t}{\sqrt{\max(\nu_t - \mu_t^2, 0) + \epsilon_\text{root}} + \epsilon}

    Args:
        decay: The decay :math:`\gamma`, in [0, 1), a number or a 0-d tensor like all four.
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.
        initial_scale: The first :math:`\nu`, at least 0.

    Returns:
        A transformation with `ScaleByStddevState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_stddev(decay=0.5)
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -2.0000])

    References:
        Graves, "Generating Sequences With Recurrent Neural Networks", 2013, eqs. 38-40.
    """

    def rule(g, mu, nu, decay, rest, eps, eps_root):
        mu, nu = decay * mu + rest * g, decay * nu + rest * g * g
        return g / (torch.sqrt((nu - mu * mu).clamp(min=0.0) + eps_root) + eps), mu, nu

    return _decaying(ScaleByStddevState, rule, decay, eps, eps_root, initial_scale)


def scale_by_rss(
    initial_accumulator_value: Numeric = 0.0, eps: Numeric = 1e-10, eps_root: Numeric = 0.0
) -> GradientTransformation:
    r"""Divide the updates by the root of the sum of their squares so far.

    .. math:: s_t = s_{t-1} + g_t^2, \qquad u_t = \frac{g_t}{\sqrt{s_t + \epsilon_\text{root}} + \epsilon}

    Args:
        initial_accumulator_value: The first s, at least 0, a number or a 0-d tensor like all three.
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.

    Returns:
        A transformation with `ScaleByRssState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_rss()
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])

    References:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
        JMLR 2011, figure 1.
    """
    _check_nonnegative(initial_accumulator_value=initial_accumulator_value, eps=eps, eps_root=eps_root)

    def rule(g, total, eps, eps_root):
        total = total + g * g
        return g / (torch.sqrt(total + eps_root) + eps), total

    return leafwise(ScaleByRssState, rule, lambda count: (eps, eps_root), initial=initial_accumulator_value)


def scale_by_adadelta(rho: Numeric = 0.9, eps: Numeric = 1e-6) -> GradientTransformation:
    r"""Scale the updates by the ratio of the root mean squares of past updates and gradients.

    .. math::
        E_g \leftarrow \rho E_g + (1 - \rho) g_t^2, \quad
        u_t = \sqrt{\frac{E_x + \epsilon}{E_g + \epsilon}}\, g_t, \quad E_x \leftarrow \rho E_x + (1 - \rho) u_t^2

    Args:
        rho: The decay of both means, in [0, 1), a number or a 0-d tensor like eps.
        eps: Added inside both roots, at least 0; above 0, all derivatives are finite.

    Returns:
        A transformation with `ScaleByAdadeltaState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_adadelta(rho=0.5, eps=0.5)
        >>> t.update(torch.tensor([1.0, -1.0]), t.init(torch.zeros(2)))[0]
        tensor([ 0.7071, -0.7071])

    References:
        Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, algorithm 1.
    """
    check_hyperparameter("rho", rho, at_least=0.0, below=1.0)
    _check_nonnegative(eps=eps)

    def rule(g, e_g, e_x, rho, rest, eps):
        e_g = rho * e_g + rest * g * g
        out = torch.sqrt(e_x + eps) / torch.sqrt(e_g + eps) * g
        return out, e_g, rho * e_x + rest * out * out

    return leafwise(ScaleByAdadeltaState, rule, lambda count: (rho, 1 - rho, eps))


def _decaying(
    state_type: Callable[..., Any],
    rule: Callable[..., tuple[Tensor, ...]],
    decay: Numeric,
    eps: Numeric,
    eps_root: Numeric,
    initial_scale: Numeric,
) -> GradientTransformation:
    check_hyperparameter("decay", decay, at_least=0.0, below=1.0)
    _check_nonnegative(eps=eps, eps_root=eps_root, initial_scale=initial_scale)
    return leafwise(state_type, rule, lambda count: (decay, 1 - decay, eps, eps_root), initial=initial_scale)


def _check_nonnegative(**values: Numeric) -> None:
    for name, value in values.items():
        check_hyperparameter(name, value, at_least=0.0)
