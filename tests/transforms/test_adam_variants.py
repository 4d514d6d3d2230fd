"""diffopt.transforms.adam_variants: RAdam on both sides of its threshold, and derivatives where others have none."""

import pytest
import torch
from torch.func import grad, hessian, jacrev, vmap

from diffopt.transforms import scale_by_radam

G = torch.tensor([[1.5, -0.4], [0.7, 0.3], [-0.2, 1.1], [0.9, -0.8], [0.4, 0.6], [1.2, -0.5], [0.1, 0.2]]).double()
NAMES = ("b1", "b2", "eps", "eps_root")
VALUES = torch.tensor([0.8, 0.9, 0.01, 0.02], dtype=torch.float64)


def length(t, b2):
    """The length of the approximated average, rho of the paper."""
    return 2 / (1 - b2) - 1 - 2 * t * b2**t / (1 - b2**t)


def updates(values, threshold=5.0, grads=G):
    transformation = scale_by_radam(**dict(zip(NAMES, values, strict=True)), threshold=threshold)
    state, out = transformation.init(grads[0]), []
    for g in grads:
        u, state = transformation.update(g, state)
        out.append(u)
    return torch.stack(out)


def formula(values, rectified, grads=G):
    """All steps, the ones in `rectified` with the mean square."""
    b1, b2, eps, eps_root = values
    m = v = torch.zeros_like(grads[0])
    out = []
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u, rho, end = m / (1 - b1**t), length(t, b2), 2 / (1 - b2) - 1
        if t in rectified:
            r = ((rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho)).sqrt()
            u = u * r * (1 - b2**t).sqrt() / ((v + eps_root).sqrt() + eps)
        out.append(u)
    return torch.stack(out)


def total(values, fn, *options):
    return (torch.cos(G) * fn(values, *options)).sum()


@pytest.mark.parametrize("t", [5, 6, 7])
@pytest.mark.parametrize(("side", "first"), [(-1e-9, 0), (1e-9, 1)])
def test_values_and_derivatives_are_right_on_both_sides_of_the_threshold(t, side, first):
    """A threshold just below the length at step t rectifies it; just above, only later steps."""
    threshold, rectified = length(t, 0.9) + side, range(t + first, 8)
    torch.testing.assert_close(updates(VALUES, threshold), formula(VALUES, rectified))
    got, want = jacrev(updates)(VALUES, threshold), jacrev(formula)(VALUES, rectified)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(hessian(total)(VALUES, updates, threshold), hessian(total)(VALUES, formula, rectified))


def test_the_threshold_is_crossed_lane_by_lane():
    thresholds = torch.tensor([4.5, 5.2, 8.0], dtype=torch.float64)
    got = vmap(lambda threshold: jacrev(updates)(VALUES, threshold))(thresholds)
    for lane, threshold in zip(got, thresholds, strict=True):
        rectified = [t for t in range(1, 8) if length(t, 0.9) > threshold]
        torch.testing.assert_close(lane, jacrev(formula)(VALUES, rectified))


@pytest.mark.parametrize("b2", [0.0, 1 / 3, 0.6])
def test_derivatives_are_finite_where_the_factor_is_never_defined(b2):
    """At these decays the longest average has a length of 1, 2 or 4: the factor's numerator or denominator is 0."""
    values = VALUES.clone()
    values[1] = b2
    torch.testing.assert_close(updates(values), formula(values, ()))
    torch.testing.assert_close(jacrev(updates)(values), jacrev(formula)(values, ()))


def test_a_zero_gradient_has_a_derivative_while_the_mean_is_plain():
    def last(g):
        return updates(VALUES * torch.tensor([1.0, 1.0, 1.0, 0.0]), grads=g)[-1].sum()

    zero = torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(grad(last)(zero), grad(lambda g: formula(VALUES, (), g)[-1].sum())(zero))
