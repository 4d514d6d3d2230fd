import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from diffopt import random
from diffopt.zero_order import (
    orthogonal,
    rademacher,
    smoothed,
)
from zero_order.smoothings import SIGMA, B, Ranks, X, f64

KEY = random.key(3)
RANKED = {
    "antithetic": {},
    "forward": {"method": "forward"},
    "leave one out": {"method": "naive", "baseline": "leave_one_out"},
    "antithetic, leave one out": {"baseline": "leave_one_out"},
    "orthogonal": {"sampler": orthogonal()},
    "chunked": {"chunk_size": 4},
}


@pytest.mark.parametrize("options", RANKED.values(), ids=RANKED)
def test_shards_make_the_whole(options):
    def f(x, a):
        return (a * x.sin()).sum() + (x * x).sum()

    def all_of(F):
        loss = lambda x, a, s: F(s)(KEY, x, a).cos()  # noqa: E731
        args = X, B, f64(SIGMA)
        mixed = jacrev(grad(loss), 1)(*args)
        return loss(*args), grad(loss, argnums=(0, 1, 2))(*args), jacrev(jacrev(loss))(*args), mixed

    whole = all_of(lambda s: smoothed(f, s, 12, **options))
    ranks = Ranks(3)
    parts = ranks.run(lambda rank: all_of(lambda s: smoothed(f, s, 4, start=4 * rank, reduce=ranks.reduce, **options)))
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"method": "forward"}, {"sampler": rademacher()}])
def test_derivatives_pass_the_sum_over_ranks(options):
    """Three ranks that do the same: their sum is three times what one has."""

    def f(x, a):
        return (a * x.sin()).sum() + (x * x).sum()

    def all_of(**more):
        F = smoothed(f, SIGMA, 8, **options, **more)
        loss = lambda x, a: F(KEY, x, a).cos()  # noqa: E731
        second = grad(lambda a: grad(loss)(X, a) @ B)(B), jvp(lambda a: grad(loss)(X, a), (B,), (X,))[1]
        mapped = vmap(grad(lambda x: F(KEY, x, B)))(torch.stack([X, B]))
        return jvp(loss, (X, B), (B, X))[1], jacfwd(grad(loss), 1)(X, B), second, mapped

    torch.testing.assert_close(all_of(reduce=lambda x: 3 * x), all_of())


def test_a_captured_gradient_and_reduce_are_refused():
    w = B.clone().requires_grad_()
    F = smoothed(lambda x: (w * x).sum(), SIGMA, 4, reduce=lambda x: x)
    with pytest.raises(ValueError, match="Pass them as arguments"):
        F(KEY, X)
