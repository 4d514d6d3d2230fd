import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt import random
from diffopt.zero_order import magic_box, score_function
from zero_order.smoothings import f64

LOGITS = f64([[0.3, -0.5, 0.8], [0.2, 0.6, -0.4]])
COST = f64([[1.0, -2.0, 0.5], [0.3, 4.0, -1.0]])
LEVEL = f64([[0.7, 1.1, -0.4], [0.9, 0.2, 1.6], [-0.3, 0.8, 0.5]])
BASELINES = {"none": None, "constant": 2.5, "leave one out": "leave_one_out"}


def expected(logits, scale):
    """Two steps: a draw z of the first row, a cost of it, and a draw y of the second; a cost of both."""
    p, q = logits[0].softmax(0), logits[1].softmax(0)
    return scale * (p @ COST[0]) + p @ (LEVEL * scale.cos()) @ q


def all_pairs():
    z, y = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
    return z, y


def steps(logits, scale, z, y):
    log_p = logits.log_softmax(1)
    log_prob = torch.stack([log_p[0][z], log_p[1][y]], 1)
    cost = torch.stack([scale * COST[0][z], LEVEL[z, y] * scale.cos()], 1)
    return log_prob, cost


def enumerated(logits, scale, baseline=None):
    """The expectation over every outcome of the estimate of one sample, weighted by constant probabilities."""
    log_prob, cost = steps(logits, scale, *all_pairs())
    weights = log_prob.detach().sum(1).exp()
    one = lambda l, c: score_function(l[None], c[None], baseline=baseline)  # noqa: E731
    return weights @ vmap(one)(log_prob, cost)


@pytest.mark.parametrize("baseline", [None, 2.5])
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: f,
        lambda f: grad(f, argnums=(0, 1)),
        lambda f: hessian(f, argnums=(0, 1)),
        lambda f: jacrev(jacrev(f, argnums=(0, 1)), argnums=(0, 1)),
        lambda f: jacfwd(jacfwd(f, argnums=1), argnums=0),
        lambda f: jacfwd(jacrev(jacrev(f))),
    ],
    ids=["value", "grad", "hessian", "jacrev(jacrev)", "mixed", "third"],
)
def test_derivatives_of_every_order_are_those_of_the_expectation(derivative, baseline):
    args = LOGITS, f64(0.7)
    found = derivative(lambda *a: enumerated(*a, baseline))(*args)
    torch.testing.assert_close(found, derivative(expected)(*args), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("derivative", [grad, hessian])
def test_leave_one_out_is_unbiased(derivative):
    """Over every pair of independent samples."""

    def enumerated_pairs(logits):
        log_p = logits[0].log_softmax(0)
        z, y = all_pairs()
        weights = (log_p[z] + log_p[y]).detach().exp()
        log_prob, cost = torch.stack([log_p[z], log_p[y]], 1), torch.stack([COST[0][z], COST[0][y]], 1)
        return weights @ vmap(lambda l, c: score_function(l, c, baseline="leave_one_out"))(log_prob, cost)

    found = derivative(enumerated_pairs)(LOGITS)
    torch.testing.assert_close(found, derivative(lambda logits: logits[0].softmax(0) @ COST[0])(LOGITS))


def sampled(key, logits, baseline, count=20):
    noise = random.gumbel(key, (count, 3), dtype=torch.float64)
    z = (logits[0].detach() + noise).argmax(1)
    return score_function(logits[0].log_softmax(0)[z], 10 + COST[0][z], baseline=baseline)


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES)
def test_samples_have_the_mean_of_the_gradient(baseline):
    found = vmap(lambda key: grad(lambda l: sampled(key, l, baseline))(LOGITS)[0])(random.split(random.key(2), 2000))
    exact = grad(lambda l: l.softmax(0) @ COST[0])(LOGITS[0])
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / math.sqrt(2000)).all()


def test_leave_one_out_lowers_the_variance():
    keys = random.split(random.key(2), 1000)
    variances = [
        vmap(lambda key, b=b: grad(lambda l: sampled(key, l, b))(LOGITS)[0])(keys).var(0).sum()
        for b in (None, "leave_one_out")
    ]
    assert variances[0] > 20 * variances[1]


def test_later_costs_do_not_teach_earlier_steps_of_nothing():
    """The cost of a step meets the scores of steps up to it, and no later ones."""
    log_prob, cost = f64([[-0.5, -0.7, -0.2]]), f64([[1.0, 10.0, 100.0]])
    torch.testing.assert_close(grad(lambda l: score_function(l, cost))(log_prob), f64([[111.0, 110.0, 100.0]]))


def test_magic_box():
    p = f64(0.3)
    box = lambda p: magic_box(p.log())  # noqa: E731
    assert box(p) == 1
    torch.testing.assert_close(grad(box)(p), 1 / p)
    assert grad(grad(box))(p).abs() < 1e-12


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "`cost` must be a floating-point", lambda l: score_function(l, torch.ones(4, dtype=torch.int64))),
        (TypeError, "`log_prob` must be a floating-point", lambda l: score_function([0.0], l)),
        (TypeError, "`log_prob`", lambda l: magic_box(0.5)),
        (ValueError, r"one shape, \(m,\) or \(m, T\)", lambda l: score_function(l, l[:3])),
        (ValueError, "m samples", lambda l: score_function(l[0], l[0])),
        (ValueError, "m samples", lambda l: score_function(l[:0], l[:0])),
        (ValueError, "two samples", lambda l: score_function(l[:1], l[:1], baseline="leave_one_out")),
        (ValueError, "baseline", lambda l: score_function(l, l, baseline="mean")),
    ],
)
def test_bad_input_is_refused(error, match, call):
    with pytest.raises(error, match=match):
        call(f64(-0.1, -0.2, -0.3, -0.4))
