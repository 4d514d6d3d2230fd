"""diffopt.tree.arithmetic: against the same arithmetic on raveled vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from diffopt import tree

DTYPES = [torch.float32, torch.float64, torch.complex128]


def make(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (2, 3), "b": (), "e": (0, 2)}
    return {k: torch.randn(s, dtype=dtype, generator=generator) for k, s in shapes.items()}


def vector(value):
    return tree.ravel(value)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_vectors(dtype):
    x, y = make(0, dtype), make(1, dtype)
    u, v = vector(x), vector(y)
    torch.testing.assert_close(vector(tree.add(x, y)), u + v)
    torch.testing.assert_close(vector(tree.sub(x, y)), u - v)
    torch.testing.assert_close(vector(tree.scale(x, 0.5)), 0.5 * u)
    torch.testing.assert_close(vector(tree.axpy(0.5, x, y)), 0.5 * u + v)
    torch.testing.assert_close(tree.vdot(x, y), torch.vdot(u, v))
    torch.testing.assert_close(tree.norm(x), torch.linalg.vector_norm(u))
    assert torch.equal(vector(tree.zeros_like(x)), torch.zeros_like(u))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_scalars_do_not_promote(dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    a = torch.tensor(0.5, dtype=torch.float64)
    assert tree.scale(x, a).dtype == dtype
    assert tree.axpy(a, x, x).dtype == dtype
    assert vmap(lambda a: tree.axpy(a, x, x))(a.expand(2)).dtype == dtype


def test_gradient_reaches_the_scalar():
    x, y = make(0), make(1)
    a = torch.tensor(0.3)
    slope = grad(lambda a: tree.vdot(tree.axpy(a, x, y), y))(a)
    torch.testing.assert_close(slope, tree.vdot(x, y).float())
    assert slope.dtype == a.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    x = torch.full((5000,), 1.0, dtype=dtype)
    assert tree.vdot(x, x) == torch.tensor(5000.0).to(dtype)
    large = torch.full((4,), 400.0, dtype=dtype)
    assert tree.norm(large) == 800
    assert tree.norm(large).dtype == dtype


def test_empty_trees():
    assert tree.add({}, {}) == {}
    assert tree.norm({}) == 0
    assert tree.vdot((), ()) == 0
    assert tree.norm([torch.ones(0)]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_norm_has_zero_derivatives_of_every_order_at_zero(dtype):
    zero = torch.zeros(2, dtype=torch.float64)

    def f(x):
        return tree.norm({"a": x.to(dtype), "b": x.to(dtype)[:1]})

    assert torch.equal(grad(f)(zero), zero)
    assert torch.equal(jvp(f, (zero,), (zero + 1,))[1], zero[0])
    for second in (hessian, lambda g: jacrev(jacrev(g)), lambda g: jacfwd(jacfwd(g))):
        assert torch.equal(second(f)(zero), torch.zeros(2, 2, dtype=torch.float64))
    third = jacrev(jacrev(jacrev(f)))(zero)
    assert torch.equal(third, torch.zeros_like(third))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_norm_derivatives_away_from_zero(dtype):
    x = torch.tensor([0.3, -1.2], dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(tree.norm, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(tree.norm, (x,))


def test_norm_under_vmap_is_safe_in_the_zero_lane():
    batch = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert torch.equal(vmap(tree.norm)(batch), torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(vmap(grad(tree.norm))(batch), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_vmap_equals_loop():
    xs, ys = (tree.map(lambda *rows: torch.stack(rows), *map_makes(seed)) for seed in (0, 10))
    dots = vmap(tree.vdot)(xs, ys)
    lanes = [tree.vdot(tree.map(lambda l: l[i], xs), tree.map(lambda l: l[i], ys)) for i in range(3)]  # noqa: B023
    torch.testing.assert_close(dots, torch.stack(lanes))


def map_makes(seed):
    return [make(seed + i) for i in range(3)]


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_where_picks_lanes(bits):
    masks = torch.tensor(bits)
    a = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    b = tree.map(lambda x: 5 * x, a)
    picked = vmap(tree.where)(masks, a, b)
    expected = torch.where(masks, 1.0, 5.0)
    assert torch.equal(picked["b"], expected)
    assert torch.equal(picked["w"], expected[:, None].expand(3, 2))


def test_where_takes_a_tree_of_masks():
    a, b = {"w": torch.ones(2), "b": torch.ones(())}, {"w": torch.zeros(2), "b": torch.zeros(())}
    mask = {"w": torch.tensor([True, False]), "b": torch.tensor(False)}
    picked = tree.where(mask, a, b)
    assert picked["w"].tolist() == [1, 0]
    assert picked["b"] == 0


def test_bad_inputs():
    x = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match=r"`y\['a'\]` must have shape \(2,\), as `x\['a'\]` has; got \(1,\)"):
        tree.add(x, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"`y` must have the structure of `x`. At `y`: keys missing \['a'\]"):
        tree.vdot(x, {"b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"0-d tensor; got shape \(2,\)"):
        tree.scale(x, torch.ones(2))
    with pytest.raises(TypeError, match=r"torch.int64 cannot keep it .* torch.float32"):
        tree.scale(torch.ones(2, dtype=torch.int64), 0.5)
    with pytest.raises(TypeError, match=r"scalar of torch.complex64"):
        tree.scale(x, 1j)
    with pytest.raises(TypeError, match=r"scalar of torch.complex128"):
        tree.scale(x, torch.tensor(1j, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"`mask` of shape \(2, 2\) does not expand to `a\['a'\]` of shape \(2,\)"):
        tree.where(torch.ones(2, 2, dtype=torch.bool), x, x)
    assert tree.scale(torch.ones(2, dtype=torch.int64), 3).tolist() == [3, 3]


def test_compiles():
    def f(x, y, a):
        z = tree.axpy(a, x, tree.add(x, tree.scale(y, 2.0)))
        return tree.norm(tree.where(a > 0, z, tree.zeros_like(z))) + tree.vdot(x, tree.ravel(y)[1](tree.ravel(y)[0]))

    args = make(0), make(1), torch.tensor(0.5)
    torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(*args), f(*args))
