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
    return x_bar + 2 * x * inner, 0.9 * inner, (-m.sin() * x_bar).sum_to_size(rate.shape)


def make(with_backward=True):
    """A toy launcher that records what it is given, and refuses anything but plain tensors."""
    launches = []

    def forward(*inputs):
        assert not any(is_functorch_wrapped_tensor(x) for x in inputs)
        launches.append([tuple(x.shape) for x in inputs])
        return tuple(o.clone() for o in reference(*inputs))

    def backward(*values):
        assert not any(is_functorch_wrapped_tensor(x) for x in values)
        launches.append("backward")
        return backward_formula(*values)

    return fused_op(reference, forward, backward if with_backward else None), launches


def scalar(f):
    return lambda x, m, rate: (f(x, m, rate)[0].sin() * f(x, m, rate)[1]).sum()


CASES = {
    "forward": lambda f: f(X, M, RATE),
    "grad": lambda f: grad(scalar(f), (0, 1, 2))(X, M, RATE),
    "rate of shape (1,)": lambda f: grad(scalar(f), (0, 1, 2))(X, M, RATE[None]),
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
    assert launches == [[(2, 3), (2, 3), (2, 1)]]
    launches.clear()
    vmap(vmap(lambda x, r: op(x, M, r), (None, 0)), (0, None))(XS, RATES)
    assert launches == [[(4, 3), (4, 3), (4, 1)]]


def test_integer_inputs_get_no_cotangent():
    op = fused_op(lambda x, n: (x * n,), lambda x, n: (x * n,), lambda x, n, v: (v * n, torch.zeros_like(n)))
    n = torch.tensor([1, 2, 3])
    assert torch.equal(grad(lambda x: op(x, n)[0].sum())(X), n.to(F64))
    assert torch.equal(vmap(grad(lambda x, n: op(x, n)[0].sum()))(XS, torch.stack([n, n])), torch.stack([n, n]).to(F64))


def test_a_launcher_that_returns_no_tuple_raises():
    with pytest.raises(TypeError, match="primal must return a tuple of tensors; got Tensor"):
        fused_op(lambda x: (x * 2,), lambda x: x * 2)(X)


def test_compiled_it_is_the_reference():
    op, launches = make()
    found = torch.compile(lambda x, m, r: op(x, m, r), fullgraph=True, backend="eager")(X, M, RATE)
    assert not launches
    assert all(torch.equal(f, e) for f, e in zip(found, reference(X, M, RATE), strict=True))
