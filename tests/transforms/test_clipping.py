"""diffopt.transforms.clipping: values, derivatives through the norm, and none that is not finite."""

import pytest
import torch
from torch.func import grad, hessian, jacrev

from diffopt.transforms import EmptyState, adaptive_grad_clip, clip, clip_by_block_rms, clip_by_global_norm

G = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)


def test_global_norm_is_that_of_torch():
    leaves = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(()))]
    leaves[0].grad, leaves[1].grad = torch.tensor([3.0, -4.0]), torch.tensor(12.0)
    grads = [leaf.grad.clone() for leaf in leaves]
    torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    got, _ = clip_by_global_norm(1.0).update(grads, EmptyState())
    for ours, theirs in zip(got, leaves, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


def test_derivative_passes_through_the_norm():
    def first(g):
        return clip_by_global_norm(2.0).update(g, EmptyState())[0][0]

    norm = G.norm()
    want = 2 * (torch.eye(3, dtype=torch.float64)[0] / norm - G[0] * G / norm**3)
    torch.testing.assert_close(grad(first)(G), want)
    in_the_bound = jacrev(lambda c: clip_by_global_norm(c).update(G, EmptyState())[0])(torch.tensor(2.0).double())
    torch.testing.assert_close(in_the_bound, G / norm)


@pytest.mark.parametrize("make", [clip, clip_by_global_norm, clip_by_block_rms, adaptive_grad_clip])
def test_all_derivatives_are_finite_at_a_zero_gradient(make):
    zero, params = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)

    def fn(g, bound, params):
        return (make(bound).update(g, EmptyState(), params)[0] ** 2).sum() + make(bound).update(
            g, EmptyState(), params
        )[0].sum()

    bound = torch.tensor(0.5, dtype=torch.float64)
    for derivative in (*grad(fn, argnums=(0, 1, 2))(zero, bound, params), hessian(fn)(zero, bound, params)):
        assert torch.isfinite(derivative).all()
    torch.testing.assert_close(grad(fn)(zero, bound, params), torch.ones_like(zero))


def test_what_is_small_stays():
    for transformation in (clip(13.0), clip_by_global_norm(13.5), clip_by_block_rms(13.0)):
        assert torch.equal(transformation.update(G, EmptyState())[0], G)


def test_each_row_is_a_unit():
    g, p = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[0.0, 1.0], [0.0, 10.0]])
    got, _ = adaptive_grad_clip(1.0).update(g, EmptyState(), p)
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_bad_bounds_raise():
    with pytest.raises(ValueError, match="`max_norm` must be above 0"):
        clip_by_global_norm(0.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        adaptive_grad_clip(0.1).update(G, EmptyState())
