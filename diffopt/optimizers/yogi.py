"""Yogi: Adam whose mean square moves by additive steps."""

from diffopt.transforms import GradientTransformation, chain, scale_by_learning_rate, scale_by_yogi
from diffopt.typing import Numeric, Schedule

__all__ = ["yogi"]


def yogi(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-3,
    eps_root: Numeric = 0.0,
    *,
    initial_accumulator_value: Numeric = 1e-6,
) -> GradientTransformation:
    r"""Descend as Adam does, with a mean square that cannot grow fast.

    .. math::
        \nu_t = \nu_{t-1} - (1 - b_2)\, \text{sign}(\nu_{t-1} - g_t^2)\, g_t^2, \qquad
        \theta_{t+1} = \theta_t - \alpha\,
        \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}

    with Adam's running mean :math:`\mu`.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: One minus the step of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
        initial_accumulator_value: The first :math:`\nu`, at least 0.

    Returns:
        A transformation.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = yogi(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9001, -1.9000])

    References:
        Zaheer et al., "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018, algorithm 2.
    """
    return chain(
        scale_by_yogi(b1, b2, eps, eps_root, initial_accumulator_value=initial_accumulator_value),
        scale_by_learning_rate(learning_rate),
    )
