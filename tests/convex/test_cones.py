"""diffopt.convex.cones: the second-order and the semidefinite cone, at their apexes and with repeated eigenvalues."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacfwd, jacrev

from convex.checks import F64, TOL, check_jacobians, check_lanes, check_optimal, random
from diffopt.convex import projection_psd_cone, projection_second_order_cone


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 10_000), st.floats(-3.0, 3.0))
def test_second_order_cone_is_optimal(n, seed, t):
    point = random(n, seed=seed), torch.tensor(t, dtype=F64)
    others = [(y, y.norm() * 1.1) for y in (random(n, seed=seed + k) for k in range(1, 4))]
    check_optimal(
        projection_second_order_cone, point, [*others, (torch.zeros(n, dtype=F64), torch.tensor(0.0, dtype=F64))]
    )
    x, s = projection_second_order_cone(point)
    assert x.norm() <= s + TOL


@pytest.mark.parametrize("t", [-5.0, -0.4, 0.4, 5.0])
def test_second_order_cone_derivatives(t):
    def operator(x, t):
        x, t = projection_second_order_cone((x, t))
        return torch.cat([x, t[None]])

    check_jacobians(operator, random(4), torch.tensor(t, dtype=F64))
    check_lanes(operator, random(6, 4), random(6, seed=1, scale=2.0))


@pytest.mark.parametrize("t", [-1.0, 0.0, 1.0])
def test_second_order_cone_at_its_kinks(t):
    x, t = torch.zeros(3, dtype=F64), torch.tensor(t, dtype=F64)

    def squares(x, t):
        x, t = projection_second_order_cone((x, t))
        return (x**2).sum() + t**2

    for derivative in (jacrev, jacfwd, hessian):
        assert all(part.isfinite().all() for part in torch.utils._pytree.tree_leaves(derivative(squares, (0, 1))(x, t)))
    J = jacrev(lambda x: projection_second_order_cone((x, t))[0])(x)
    assert torch.equal(J, (t >= 0) * torch.eye(3, dtype=F64))


@pytest.mark.parametrize("scale", [1e-25, 1e9])
def test_second_order_cone_magnitudes(scale):
    x, t = projection_second_order_cone((random(3, scale=scale).float(), torch.tensor(0.0)))
    assert torch.allclose(x.double().norm() / t.double(), torch.ones((), dtype=F64))  # float32 has no such squares


def symmetric(n, seed=0):
    M = random(n, n, seed=seed)
    return M + M.T


def rotation(n, seed=0):
    return torch.linalg.qr(random(n, n, seed=seed))[0]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(0, 10_000))
def test_psd_cone_is_optimal(n, seed):
    others = [M @ M.T for M in (random(n, n, seed=seed + k) for k in range(1, 4))]
    X = symmetric(n, seed)
    check_optimal(projection_psd_cone, X, others)
    P = projection_psd_cone(X)
    assert torch.equal(P, P.T)
    assert torch.linalg.eigvalsh(P).amin() >= -TOL


def psd_of_any(X):
    """On all matrices, so that differences may be taken entry by entry."""
    return projection_psd_cone(X)


REPEATED = {
    "distinct": [2.0, 0.7, -0.5, -1.5],
    "positive twice": [1.3, 1.3, -0.8, 0.4],
    "negative twice": [1.3, 0.6, -0.8, -0.8],
    "all one": [1.0, 1.0, 1.0, 1.0],
    "plus and minus one": [1.0, 1.0, -1.0, -1.0],
}


@pytest.mark.parametrize("name", REPEATED)
def test_psd_jacobians_with_repeated_eigenvalues(name):
    V, values = rotation(4), torch.tensor(REPEATED[name], dtype=F64)
    X = V @ torch.diag(values) @ V.T
    check_jacobians(psd_of_any, X)
    # Daleckii and Krein: divided differences of max(l, 0)
    plus = values.clamp(min=0)
    same = (values[:, None] - values).abs() < TOL
    gaps = torch.where(same, 1.0, values[:, None] - values)
    weights = torch.where(same, (values > 0).double(), (plus[:, None] - plus) / gaps)
    H = symmetric(4, seed=5)
    expected = V @ (weights * (V.T @ H @ V)) @ V.T
    assert torch.allclose(torch.func.jvp(projection_psd_cone, (X,), (H,))[1], expected, atol=TOL)


@pytest.mark.parametrize("name", REPEATED)
def test_psd_second_derivatives_with_repeated_eigenvalues(name):
    V = rotation(4, seed=1)
    X = V @ torch.diag(torch.tensor(REPEATED[name], dtype=F64)) @ V.T
    weights, H = random(4, 4, seed=2), symmetric(4, seed=3)

    def slope(X):
        return jacrev(lambda X: (weights * projection_psd_cone(X).sin()).sum())(X)

    expected = (slope(X + 1e-6 * H) - slope(X - 1e-6 * H)) / 2e-6
    for derivative in (jacrev, jacfwd):
        found = (derivative(slope)(X) * H).sum((-2, -1))
        assert torch.allclose(found, expected, atol=1e-7)


def test_psd_lanes():
    check_lanes(projection_psd_cone, torch.stack([symmetric(3, 0), torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)]))


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, -1.0], [0.0, 0.0, -1.0]])
def test_psd_kinks_are_finite(values):
    V = rotation(3)
    X = V @ torch.diag(torch.tensor(values, dtype=F64)) @ V.T
    J = jacrev(projection_psd_cone)(X)
    assert torch.allclose(jacfwd(projection_psd_cone)(X), J, atol=TOL)
    spectrum = torch.linalg.eigvalsh(J.reshape(9, 9))
    assert spectrum.amin() >= -TOL  # between 0 and the identity, as all elements of the generalized Jacobian
    assert spectrum.amax() <= 1 + TOL
    assert hessian(lambda X: (projection_psd_cone(X) ** 2).sum())(X).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_psd_keeps_the_rank_and_the_scale(dtype):
    V = rotation(4).to(dtype)
    X = 1e9 * V @ torch.diag(torch.tensor([2.0, -1.0, -1.0, -1.0], dtype=dtype)) @ V.T
    P = projection_psd_cone(X)
    assert P.dtype == dtype
    assert torch.linalg.matrix_rank(P, rtol=8 * torch.finfo(dtype).eps) == 1


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"`point` must be a pair \(x, t\)"):
        projection_second_order_cone(torch.ones(3))
    with pytest.raises(TypeError, match=r"`t` must be a 0-d tensor of torch\.float32"):
        projection_second_order_cone((torch.ones(3), 1.0))
    with pytest.raises(ValueError, match=r"`t` must be a 0-d tensor; got shape \(2,\)"):
        projection_second_order_cone((torch.ones(3), torch.ones(2)))
    with pytest.raises(ValueError, match="`X` must be square"):
        projection_psd_cone(torch.ones(2, 3))
    with pytest.raises(ValueError, match="`X` must be a matrix"):
        projection_psd_cone(torch.ones(2, 2, 2))


def test_a_matrix_that_is_not_finite_shows_and_spares_other_lanes():
    X = torch.stack([torch.full((2, 2), torch.nan), torch.diag(torch.tensor([2.0, -1.0]))])
    found = torch.func.vmap(projection_psd_cone)(X)
    assert found[0].isnan().all()
    assert torch.equal(found[1], torch.diag(torch.tensor([2.0, 0.0])))
    with pytest.raises(TypeError, match="projection_psd_cone needs float32 or float64"):
        projection_psd_cone(torch.eye(2, dtype=torch.bfloat16))
