"""diffopt.autodiff.fused_op: a launcher with the derivatives of its reference, one launch for all lanes."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from diffopt.autodiff import fused_op
from diffopt.autodiff.levels import is_functorch_wrapped_tensor

F64 = torch.float64
X = torch.tensor([0.5, -0.4, 0.8], dtype=F64)
M = torch.tensor([0.3, 0.2, 0.1], dtype=F64)
RATE = torch.tensor(0.7, dtype=F64)
RATES = torch.tensor([0.1, 0.4], dtype=F64)
XS, MS = torch.stack([X, 2 * X]), torch.stack([M, 3 * M])
TOL = 1e-10


def reference(x, m, rate):
    m = 0.9 * m + x * x
    return x - rate * m.sin(), m


def backward_formula(x, m, rate, x_bar, m_bar):
    m = 0.9 * m + x * x
    inner = m_bar - rate * m.cos() * x_bar
    return x_bar + 2 * x * inner, 0.9 * inner, -m.sin() * x_bar


def make(with_backward=True):
    """A toy launcher over one leaf that records what it is given, and refuses anything but plain tensors."""
    launches = []

    def forward(columns, scalars):
        values = [*(x for column in columns for x in column), *scalars]
        assert not any(is_functorch_wrapped_tensor(x) for x in values)
        launches.append([tuple(x.shape) for x in values])
        rates = lane_shaped(scalars[0], columns[0][0])
        return tuple(map(list, zip(*(reference(*row, rates) for row in zip(*columns, strict=True)), strict=True)))

    def backward(columns, scalars, cotangents, wanted, scalars_wanted):
        values = [x for column in (*columns, scalars, *cotangents) for x in column]
        assert not any(is_functorch_wrapped_tensor(x) for x in values)
        launches.append("backward")
        rates = lane_shaped(scalars[0], columns[0][0])
        rows = [
            backward_formula(*row, rates, *bars)
            for *row, bars in zip(*columns, zip(*cotangents, strict=True), strict=True)
        ]
        sums = sum(row[2].reshape(*scalars[0].shape, -1).sum(-1) for row in rows)
        found = tuple([row[i] for row in rows] if w else None for i, w in enumerate(wanted))
        return found, [sums] if scalars_wanted else None

    op = fused_op(reference, forward, backward if with_backward else None)

    def on_one_leaf(x, m, rate):
        (x,), (m,) = op([[x], [m]], [rate])
        return x, m

    return on_one_leaf, launches


def lane_shaped(scalar, leaf):
    return scalar.reshape(-1, *(1,) * (leaf.ndim - 1)) if scalar.ndim else scalar


def scalar(f):
    return lambda x, m, rate: (f(x, m, rate)[0].sin() * f(x, m, rate)[1]).sum()


CASES = {
    "forward": lambda f: f(X, M, RATE),
    "grad": lambda f: grad(scalar(f), (0, 1, 2))(X, M, RATE),
    "jacrev": lambda f: jacrev(f, (0, 1, 2))(X, M, RATE),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2))(X, M, RATE),
    "jvp": lambda f: jvp(f, (X, M, RATE), (M, X, RATE))[1],
    "hessian": lambda f: hessian(scalar(f), (0, 2))(X, M, RATE),
    "third": lambda f: grad(lambda r: grad(lambda r: grad(lambda r: scalar(f)(X, M, r))(r))(r))(RATE),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(lambda r: f(X, M, r)))(RATE),
    "vmap over rates": lambda f: vmap(lambda r: f(X, M, r))(RATES),
    "vmap(grad) over rates": lambda f: vmap(grad(scalar(f), (0, 1, 2)), (None, None, 0))(X, M, RATES),
    "vmap(grad) over all": lambda f: vmap(grad(scalar(f), (0, 1, 2)))(XS, MS, RATES),
    "vmap(grad), columns": lambda f: vmap(grad(scalar(f), (0, 1, 2)), (None, 1, None))(X, MS.T, RATE),
    "vmap(jvp)": lambda f: vmap(lambda r: jvp(f, (X, M, r), (M, X, r))[1])(RATES),
    "vmap(hessian)": lambda f: vmap(hessian(lambda r: scalar(f)(X, M, r)))(RATES),
    "grad(vmap)": lambda f: grad(lambda r: vmap(lambda x: scalar(f)(x, M, r))(XS).sum())(RATE),
    "vmap(vmap(grad))": lambda f: vmap(
        vmap(grad(scalar(f), (0, 1, 2)), (None, None, 0)), (0, 0, None))(XS, MS, RATES),
    "vmap(vmap(vmap))": lambda f: vmap(
        vmap(vmap(lambda x, m, r: f(x, m, r), (None, None, 0)), (0, None, None)), (None, 0, None))(XS, MS, RATES),
    "out_dims, chunks": lambda f: vmap(lambda r: f(X * r, M * r, r), out_dims=1, chunk_size=1)(RATES),
}  # fmt: skip


@pytest.mark.parametrize("with_backward", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_reference(case, with_backward):
    op, launches = make(with_backward)
    found = torch.utils._pytree.tree_leaves(CASES[case](op))
    expected = torch.utils._pytree.tree_leaves(CASES[case](reference))
    assert launches
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert torch.allclose(f, e, rtol=TOL, atol=TOL)


def test_double_backward_by_plain_autograd():
    op, launches = make()
    x, rate = X.clone().requires_grad_(), RATE.clone().requires_grad_()

    def twice(f):
        first = torch.autograd.grad(scalar(f)(x, M, rate), (x, rate), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), (x, rate))

    for f, e in zip(twice(op), twice(reference), strict=True):
        assert torch.allclose(f, e, rtol=TOL, atol=TOL)
    assert "backward" in launches


def test_all_lanes_share_one_launch():
    op, launches = make()
    vmap(lambda r: op(X, M, r))(RATES)
    assert launches == [[(2, 3), (2, 3), (2,)]]
    launches.clear()
    vmap(vmap(lambda x, r: op(x, M, r), (None, 0)), (0, None))(XS, RATES)
    assert launches == [[(4, 3), (4, 3), (4,)]]


def test_several_leaves_are_one_launch_each_way():
    leaves = [X, X.reshape(3, 1) * 2, X[0], X[:0]]
    moments = [m * 0.3 for m in leaves]
    launches = []

    def forward(columns, scalars):
        launches.append(len(columns[0]))
        return tuple(map(list, zip(*(reference(*row, *scalars) for row in zip(*columns, strict=True)), strict=True)))

    def loss(f):
        return lambda x, m, rate: sum((a.sin() * b).sum() for a, b in zip(*f(x, m, rate), strict=True))

    op = fused_op(reference, forward)
    plain = loss(
        lambda x, m, rate: tuple(zip(*(reference(a, b, rate) for a, b in zip(x, m, strict=True)), strict=True))
    )
    fused = loss(lambda x, m, rate: op([x, m], [rate]))
    want = grad(plain, (0, 1, 2))(leaves, moments, RATE)
    found = grad(fused, (0, 1, 2))(leaves, moments, RATE)
    assert launches == [4]
    for f, e in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(f, e, rtol=TOL, atol=TOL)


def test_what_needs_no_cotangent_is_not_asked_for():
    asked = []

    def backward(columns, scalars, cotangents, wanted, scalars_wanted):
        asked.append((wanted, scalars_wanted, cotangents[1][0].stride()))
        return ([columns[0][0] * 0 + 1], None), None

    op = fused_op(reference, lambda columns, scalars: tuple([o] for o in reference(X, M, RATE)), backward)
    op([[X.clone().requires_grad_()], [M]], [RATE])[0][0].sum().backward()
    assert asked == [((True, False), False, (0,))]  # and the cotangent that nobody gave is one expanded zero


def test_no_leaves_at_all():
    op = fused_op(reference, lambda columns, scalars: ([], []))
    assert op([[], []], [RATE]) == ([], [])


def test_bad_arguments_raise():
    op, launches = make()
    with pytest.raises(ValueError, match="columns of leaf 0 differ in shape"):
        op(X, M[:2], RATE)
    with pytest.raises(ValueError, match=r"0-d scalars; got shapes \[\(1,\)\]"):
        op(X, M, RATE[None])
    with pytest.raises(TypeError, match="floating-point"):
        op(X, M.long(), RATE)
    with pytest.raises(ValueError, match=r"columns of one length; got \[1, 0\]"):
        fused_op(reference, None)([[X], []], [RATE])
    assert not launches


def test_compiled_it_is_the_reference():
    op, launches = make()
    found = torch.compile(lambda x, m, r: op(x, m, r), fullgraph=True, backend="eager")(X, M, RATE)
    assert not launches
    assert all(torch.equal(f, e) for f, e in zip(found, reference(X, M, RATE), strict=True))


def test_expanded_leaves_have_every_derivative():
    op, _ = make()
    wide = X[:, None].expand(3, 2)

    def loss(f):
        return lambda rate: scalar(f)(wide, M[:, None].expand(3, 2), rate)

    torch.testing.assert_close(hessian(loss(op))(RATE), hessian(loss(reference))(RATE), rtol=TOL, atol=TOL)
