"""diffopt.tree.ravel: round trips, transforms and bad inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffopt import tree

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64])


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(shapes, min_size=1, max_size=2), min_size=1), dtypes)
def test_unravel_undoes_ravel(shape_tree, dtype):
    value = {
        key: [torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) + 1 for shape in row]
        for key, row in shape_tree.items()
    }
    vector, unravel = tree.ravel(value)
    assert vector.dtype == dtype
    assert vector.shape == (sum(leaf.numel() for leaf in tree.leaves(value)),)
    back = unravel(vector)
    tree.check_like(back, value)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(back), tree.leaves(value), strict=True))


def test_one_vector_is_not_copied():
    x = torch.ones(3)
    vector, unravel = tree.ravel({"x": x})
    assert vector is x
    assert unravel(vector)["x"] is x


def test_leaves_of_unravel_are_views():
    vector, unravel = tree.ravel([torch.ones(2, 2), torch.ones(())])
    assert all(leaf.untyped_storage().data_ptr() == vector.data_ptr() for leaf in unravel(vector))


def test_strided_leaf():
    x = torch.arange(6.0).reshape(2, 3).T
    vector, unravel = tree.ravel([x])
    assert vector.tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(unravel(vector)[0], x)


def test_unravel_keeps_the_dtype_of_its_vector():
    vector, unravel = tree.ravel([torch.ones(2), torch.ones(1)])
    assert [leaf.dtype for leaf in unravel(vector.double())] == [torch.float64] * 2


def value_and_loss():
    value = {"w": torch.arange(1.0, 5.0).reshape(2, 2), "b": torch.tensor(0.5)}
    return value, lambda t: (t["w"] ** 3).sum() * t["b"]


def test_grad_and_jvp():
    value, loss = value_and_loss()
    vector, unravel = tree.ravel(value)
    expected, _ = tree.ravel(torch.func.grad(loss)(value))
    torch.testing.assert_close(torch.func.grad(lambda v: loss(unravel(v)))(vector), expected)
    _, tangent = torch.func.jvp(lambda t: tree.ravel(t)[0], (value,), (value,))
    torch.testing.assert_close(tangent, vector)


def test_vmap_of_hessian_through_both_directions():
    value, loss = value_and_loss()
    vector, unravel = tree.ravel(value)

    def flat_loss(v):
        return loss(tree.ravel(unravel(v))[1](v))

    batch = torch.stack([vector, 2 * vector, -vector])
    hessians = torch.func.vmap(torch.func.hessian(flat_loss))(batch)
    for lane, row in zip(hessians, batch, strict=True):
        torch.testing.assert_close(lane, torch.func.hessian(flat_loss)(row))


def test_vmap_of_ravel():
    batch = {"w": torch.randn(3, 2, 2), "b": torch.randn(3)}
    vectors = torch.func.vmap(lambda t: tree.ravel(t)[0])(batch)
    assert torch.equal(vectors, torch.cat([batch["b"][:, None], batch["w"].reshape(3, 4)], dim=1))


def test_bad_trees():
    with pytest.raises(ValueError, match="empty tree"):
        tree.ravel({"a": None, "b": ()})
    with pytest.raises(TypeError, match=r"`tree\['a'\]` must be a tensor, got float"):
        tree.ravel({"a": 1.0})
    with pytest.raises(TypeError, match=r"one dtype; `tree\[0\]` has torch.float32 and `tree\[2\]` has torch.float64"):
        tree.ravel([torch.ones(1), torch.ones(1), torch.ones(1).double()])
    with pytest.raises(TypeError, match=r"one device; `tree\[0\]` has cpu and `tree\[1\]` has meta"):
        tree.ravel([torch.ones(1), torch.ones(1, device="meta")])


@pytest.mark.parametrize("shape", [(), (2,), (4,), (1, 3)])
def test_unravel_checks_its_length(shape):
    _, unravel = tree.ravel([torch.ones(2), torch.ones(())])
    with pytest.raises(ValueError, match=r"needs a vector of shape \(3,\); got"):
        unravel(torch.ones(shape))
