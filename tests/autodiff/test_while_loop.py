"""diffopt.autodiff.while_loop: lanes stop on their own, and a stopped lane contributes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from diffopt.autodiff import while_loop

F64 = torch.float64
TOL = 1e-12


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def halve(x, factor=0.5):
    return while_loop(lambda x: x > 1, lambda x: x * factor, x, max_steps=60)


def halve_plainly(x, factor=0.5):
    for _ in range(60):
        if not x > 1:
            break
        x = x * factor
    return x


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6))
def test_vmap_equals_the_loop_with_its_gradient(values):
    x, factor = tensor(*values), tensor(0.5)[0]
    assert close(vmap(halve)(x), torch.stack([halve_plainly(v) for v in x]))
    found = jacrev(vmap(halve, in_dims=(0, None)), argnums=(0, 1))(x, factor)
    columns = [jacrev(halve_plainly, argnums=(0, 1))(v, factor) for v in x]
    assert close(found[0], torch.diag(torch.stack([by_x for by_x, _ in columns])))
    assert torch.allclose(found[1], torch.stack([by_f for _, by_f in columns]), rtol=1e-9)  # up to 20 products


def test_mixed_nestings_equal_the_loop():
    def grow(a, bound):
        return while_loop(lambda x: x < bound, lambda x: x + a**2, a * 1.0, max_steps=20)

    a, bound = tensor(1.0, 2.0, 0.5), tensor(3.0, 0.2)

    def table(a):
        return vmap(vmap(grow, (0, None)), (None, 0))(a, bound)

    def loop(a):
        return torch.stack([torch.stack([grow(x, b) for x in a]) for b in bound])

    assert close(table(a), loop(a))
    assert close(jacrev(table)(a), torch.autograd.functional.jacobian(loop, a))
    assert close(jacfwd(jacfwd(table))(a), jacrev(jacrev(table))(a))
    assert close(jvp(table, (a,), (a,))[1], torch.autograd.functional.jvp(loop, a, a)[1])


def test_a_loop_in_a_loop_equals_the_loop():
    def outer(a):
        def body(carry):
            x, k = carry
            return halve(8 * x) + a, k + 1

        return while_loop(lambda carry: carry[1] < 3, body, (a, torch.tensor(0)), max_steps=9)[0]

    def plainly(a):
        x = a
        for _ in range(3):
            x = halve_plainly(8 * x) + a
        return x

    a = tensor(1.0, 2.0, 3.3)
    assert close(vmap(outer)(a), torch.stack([plainly(v) for v in a]))
    assert close(grad(lambda a: vmap(outer)(a).sum())(a), torch.stack([grad(plainly)(v) for v in a]))


def scaled_by_quotient(a, x):
    """The body is 0/0 in the lanes where a is zero."""
    return while_loop(lambda x: x > 1, lambda x: x * (a / a) * 0.25, x, max_steps=40)


@pytest.mark.parametrize("starts", [(5.0, 0.5, 3.0), (0.5, 0.5, 0.5)])
def test_lanes_dead_at_step_zero_give_no_nan_for_carry_or_captured(starts):
    a, x = tensor(4.0, 0.0, 9.0), tensor(*starts)
    f = vmap(scaled_by_quotient)
    for derivative in (jacrev, jacfwd):
        by_a, by_x = derivative(f, argnums=(0, 1))(a, x)
        assert close(by_a, torch.zeros(3, 3, dtype=F64))
        steps = torch.stack([halve_plainly(v, 0.25) / v for v in x])
        assert close(by_x, torch.diag(steps))
    assert hessian(lambda a: f(a, x).sum())(a).abs().max() == 0


def test_lanes_that_die_at_a_singular_point_give_no_nan():
    """Newton's method for a square root whose body is 0/0 at the root of a = 0."""
    theta = tensor(1.0)[0]

    def newton(a, theta):
        def body(x):
            return x - theta * (x * x - a) / (2 * x)

        return while_loop(lambda x: (x * x - a).abs() > 1e-14, body, a.detach() / 2, max_steps=40)

    a = tensor(5.0, 0.0, 9.0)
    f = vmap(newton, in_dims=(0, None))
    by_a, by_theta = jacrev(f, argnums=(0, 1))(a, theta)
    assert torch.isfinite(by_theta).all()
    assert torch.allclose(by_a.diag()[[0, 2]], 0.5 / a[[0, 2]].sqrt())
    assert torch.isfinite(hessian(lambda a: f(a, theta).sum())(a)).all()
    assert torch.isfinite(jacfwd(f, argnums=1)(a, theta)).all()


def test_captured_by_autograd_in_a_module_or_object_gives_no_nan():
    class Quotient:
        def __init__(self, w):
            self.w = w

        def __call__(self, a, x):
            return while_loop(lambda x: x > 1, lambda x: x * self.w * (a / a) * 0.25, x, max_steps=40)

    w = torch.ones((), dtype=F64, requires_grad=True)
    y = vmap(Quotient(w))(tensor(4.0, 0.0, 9.0), tensor(5.0, 0.5, 3.0))
    # two steps of 1/4 from 5, none, one from 3
    assert close(torch.autograd.grad(y.sum(), w)[0], tensor(2 * 5 / 16 + 3 / 4)[0])


def test_no_steps_and_empty_carries_and_batches():
    assert while_loop(lambda x: x > 0, lambda x: x - 1, tensor(3.0)[0], max_steps=0) == 3
    assert while_loop(lambda _: torch.tensor(True), lambda c: c, (), max_steps=3) == ()
    assert vmap(halve)(tensor()).shape == (0,)
    assert close(
        grad(lambda x: while_loop(lambda x: x > 0, lambda x: x**2, x, max_steps=0))(tensor(3.0)[0]), tensor(1.0)[0]
    )


def test_reaching_max_steps_is_not_an_error_and_nan_stops():
    assert while_loop(lambda x: x > 0, lambda x: x + 1, tensor(3.0)[0], max_steps=4) == 7
    assert while_loop(lambda x: x > 1, lambda x: x * float("nan"), tensor(3.0)[0], max_steps=9).isnan()


def test_a_carry_that_becomes_batched_in_the_body():
    def power(a):
        return while_loop(
            lambda c: c[1] < 3, lambda c: (c[0] * a, c[1] + 1), (tensor(1.0)[0], torch.tensor(0)), max_steps=9
        )

    a = tensor(1.0, 2.0)
    assert close(vmap(power)(a)[0], a**3)
    assert close(vmap(grad(lambda a: power(a)[0]))(a), 3 * a**2)


def test_the_body_runs_as_often_as_its_slowest_lane_needs():
    calls = []

    def body(x):
        calls.append(1)
        return x * 0.5

    vmap(lambda x: while_loop(lambda x: x > 1, body, x, max_steps=60))(tensor(0.5, 3.0, 16.0))
    assert len(calls) == 4


BAD = {
    "cond is not bool": (lambda x: x.sum(), lambda x: x, tensor(1.0), 3, TypeError, "cond must return a bool tensor"),
    "cond is not scalar": (lambda x: x > 0, lambda x: x, tensor(1.0), 3, TypeError, r"cond must .*; got torch.bool of"),
    "cond is Python": (lambda x: True, lambda x: x, tensor(1.0), 3, TypeError, "cond must .*; got bool"),
    "structure": (lambda c: c[0] > 0, lambda c: [c[0]], (tensor(1.0)[0],), 3, ValueError, "of the structure it was"),
    "shape": (lambda x: x.sum() > 0, lambda x: x[None], tensor(1.0), 3, ValueError, "body must keep shapes and dtypes"),
    "dtype": (lambda x: x.sum() > 0, lambda x: x.float(), tensor(1.0), 3, ValueError, r"float64 \(1,\) became"),
    "leaf": (lambda x: x > 0, lambda x: x, 3.0, 3, TypeError, "carry must be a tree of tensors; found .* float"),
    "body leaf": (lambda x: x > 0, lambda x: 2.0, tensor(1.0)[0], 3, ValueError, r"became float"),
    "float steps": (lambda x: x > 0, lambda x: x, tensor(1.0)[0], 2.0, ValueError, "max_steps must be a non-negative"),
    "negative": (lambda x: x > 0, lambda x: x, tensor(1.0)[0], -1, ValueError, "max_steps must be a non-negative int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise(case):
    cond, body, carry, max_steps, error, message = BAD[case]
    with pytest.raises(error, match=message):
        while_loop(cond, body, carry, max_steps=max_steps)


def test_compiled_it_freezes_lanes_and_refuses_many_steps():
    f = torch.compile(vmap(lambda x: while_loop(lambda x: x > 1, lambda x: x * 0.5, x, max_steps=6)),
                      fullgraph=True, backend="eager")  # fmt: skip
    x = tensor(0.5, 3.0, 16.0)
    assert close(f(x), vmap(halve)(x))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"at most.*64 are allowed"):
        torch.compile(halve_65, fullgraph=True, backend="eager")(x[0])


def halve_65(x):
    return while_loop(lambda x: x > 1, lambda x: x * 0.5, x, max_steps=65)
