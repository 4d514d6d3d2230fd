"""diffopt.autodiff.levels: which transforms are live, what a tensor carries, and the private torch names behind it."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jvp, vjp, vmap

from diffopt.autodiff import any_lane, levels, transforms_active

X = torch.tensor([[0.5, -1.5, 2.5], [3.5, -0.5, 1.5]], dtype=torch.float64)


class PublicAnyLane(torch.autograd.Function):
    """`any_lane` by the public interface alone: its vmap rule applies itself and returns an unbatched result."""

    @staticmethod
    def forward(mask):
        return mask.any()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, cotangent):
        return None

    @staticmethod
    def jvp(ctx, tangent):
        return None

    @staticmethod
    def vmap(info, in_dims, mask):
        return PublicAnyLane.apply(mask), None


NESTINGS = {
    "plain": lambda f, X: f(X),
    "vmap": lambda f, X: vmap(f)(X),
    "vmap(in_dims=1)": lambda f, X: vmap(f, in_dims=1)(X),
    "vmap(vmap)": lambda f, X: vmap(vmap(f))(X),
    "grad": lambda f, X: grad(lambda x: f(x).sum())(X),
    "jvp": lambda f, X: jvp(f, (X,), (X.cos(),))[1],
    "vmap(grad)": lambda f, X: vmap(grad(lambda x: f(x).sum()))(X),
    "grad(vmap)": lambda f, X: grad(lambda Z: vmap(f)(Z).sum())(X),
    "vmap(jacfwd)": lambda f, X: vmap(jacfwd(f))(X),
    "jvp(vmap(grad))": lambda f, X: jvp(vmap(grad(lambda x: f(x).sum())), (X,), (X.cos(),))[1],
    "grad(jvp(vmap))": lambda f, X: grad(lambda Z: jvp(vmap(f), (Z,), (Z,))[1].sum())(X),
}


@pytest.mark.parametrize("bound", [-9.0, 3.0, 9.0])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_any_lane_agrees_with_its_public_twin(nesting, bound):
    answers, twins = [], []

    def f(x):
        mask = x > bound
        answers.append(any_lane(mask))
        twins.append(PublicAnyLane.apply(mask))
        return x**2

    NESTINGS[nesting](f, X)
    expected = bool((bound < X).any())
    assert answers
    assert set(answers) == {expected}
    assert {bool(levels.unwrap_lanes(t).any()) for t in twins} == {expected}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_any_lane_is_any_over_all_lanes(rows):
    mask = torch.tensor(rows)
    seen = []
    vmap(vmap(lambda m: (seen.append(any_lane(m)), m)[1]))(mask)
    assert seen == [bool(mask.any())]


def test_any_lane_of_nothing_is_false():
    assert not any_lane(torch.zeros(0, dtype=torch.bool))


@pytest.mark.parametrize("mask", [torch.ones(2), torch.ones(2, dtype=torch.int64), True])
def test_any_lane_refuses_what_is_not_a_bool_tensor(mask):
    with pytest.raises(TypeError, match="any_lane needs a bool tensor"):
        any_lane(mask)


def test_transforms_active_sees_transforms_and_dual_levels_and_not_autograd():
    seen = {}

    def note(name):
        return lambda x: (seen.setdefault(name, transforms_active()), x.sum())[1]

    note("plain")(X)
    note("autograd")(X.clone().requires_grad_()).backward()
    grad(note("grad"))(X)
    vmap(note("vmap"))(X)
    jvp(note("jvp"), (X,), (X,))
    with forward_ad.dual_level():
        note("dual_level")(X)
        dual_only = levels.dual_only()
        grad(lambda x: (seen.setdefault("under dual", levels.functorch_active()), x.sum())[1])(X)
    note("after")(X)
    assert seen == {
        "plain": False, "autograd": False, "grad": True, "vmap": True, "jvp": True, "dual_level": True,
        "under dual": True, "after": False,
    }  # fmt: skip
    assert dual_only
    assert not levels.dual_only()


def test_derivative_possible_needs_grad_mode_or_a_transform():
    tracked, plain = X.clone().requires_grad_(), X
    assert levels.derivative_possible([plain, tracked])
    assert not levels.derivative_possible([plain])
    with torch.no_grad():
        assert not levels.derivative_possible([tracked])
        assert vmap(lambda x: x * levels.derivative_possible([x]))(torch.ones(1)).item() == 1


def test_batched_at_most_sees_gradients_under_lanes_and_every_other_transform():
    tracked, seen = X.clone().requires_grad_(), {}

    def note(name):
        return lambda x: (seen.setdefault(name, levels.batched_at_most([x])), (x * 1.0).sum())[1]

    note("plain")(X)
    note("autograd")(tracked)
    vmap(note("vmap"))(X)
    vmap(vmap(note("vmap(vmap)")))(X)
    vmap(note("vmap, tracked"))(tracked)
    vmap(vmap(note("vmap(vmap), tracked")))(tracked)
    grad(note("grad"))(X)
    vmap(grad(note("vmap(grad)")))(X)
    grad(lambda Z: vmap(note("grad(vmap)"))(Z).sum())(X)
    grad(lambda Z: vmap(note("grad(vmap), constant"))(X).sum() * Z.sum())(X)
    jvp(vmap(note("jvp(vmap)")), (X,), (X,))
    with forward_ad.dual_level():
        vmap(note("dual(vmap)"))(X)
    with torch.no_grad():
        vmap(note("vmap, no_grad"))(tracked)
    right = {"plain", "vmap", "vmap(vmap)", "vmap, no_grad"}
    assert {name for name, answer in seen.items() if answer} == right
    assert len(seen) == 13


def test_is_tracked_and_is_live():
    assert not levels.is_tracked(X)
    assert levels.is_tracked(X.clone().requires_grad_())
    seen = []

    def f(x):
        constant = torch.ones(3, dtype=torch.float64) * 2
        seen.append((levels.is_live(x * 2), levels.is_live(constant), levels.is_live(constant + X[0])))
        return (x * 2).sum()

    for transformed in (grad(f), vmap(f), lambda z: jvp(f, (z,), (z,)), grad(lambda z: vmap(f)(z[None]).sum())):
        seen.clear()
        transformed(X)
        assert set(seen) == {(True, False, False)}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, X)
        assert levels.is_tracked(dual)
        assert levels.is_live(dual)
        assert not levels.is_live(X)
        seen = []
        vmap(lambda z: (seen.append((levels.is_live(dual), levels.is_tracked(dual))), z)[1])(X)
        assert seen == [(True, True)]
    assert not levels.is_tracked(X)


def test_first_lane_is_one_lane_and_carries_nothing():
    seen = []

    def f(x):
        lane = levels.first_lane(x)
        assert not levels.is_live(lane)
        seen.append(levels.unwrap_lanes(lane))
        return x.sum()

    vmap(vmap(grad(f)), in_dims=1)(X)
    assert torch.equal(seen[0], X[0, 0])
    vmap(f)(torch.ones(0, 3, dtype=torch.float64))
    assert torch.equal(seen[1], torch.zeros(3, dtype=torch.float64))


# What follows fails when torch changes the meaning of a private name that levels.py uses.


def test_torch_get_unwrapped_takes_one_wrapper_off():
    def f(x):
        inner = levels.get_unwrapped(x)
        assert levels.is_functorch_wrapped_tensor(inner)
        plain = levels.get_unwrapped(inner)
        assert not levels.is_functorch_wrapped_tensor(plain)
        assert torch.equal(plain, X)
        return x.sum()

    vmap(lambda row: grad(f)(row))(X)


def test_torch_is_batchedtensor_tells_vmap_from_grad():
    def kinds(x):
        return levels.is_batchedtensor(x), levels.is_functorch_wrapped_tensor(x)

    seen = [kinds(X)]
    vmap(lambda x: (seen.append(kinds(x)), x)[1])(X)
    grad(lambda x: (seen.append(kinds(x)), x.sum())[1])(X)
    assert seen == [(False, False), (True, True), (False, True)]


def test_torch_maybe_get_bdim_is_where_the_lanes_are():
    seen = []
    vmap(lambda x: (seen.append(levels.maybe_get_bdim(x)), x)[1], in_dims=1)(X)
    assert seen == [1]


def test_torch_levels_count_from_the_outermost_transform():
    seen = []

    def f(x):
        top = levels.peek_interpreter_stack()
        seen.append((levels.maybe_get_level(x), top.level()))
        with levels.temporarily_pop_interpreter_stack():
            below = levels.peek_interpreter_stack()
            seen.append(below.level())
        seen.append(levels.peek_interpreter_stack().level())
        return x.sum()

    assert levels.peek_interpreter_stack() is None
    vmap(grad(f))(X)
    assert seen == [(2, 2), 1, 2]
    assert levels.peek_interpreter_stack() is None


def test_torch_temporarily_pop_interpreter_stack_shows_a_tensor_at_its_own_level():
    seen = []

    def outer(x):
        constant = torch.ones_like(X) * 2

        def inner(y):
            with levels.temporarily_pop_interpreter_stack():
                seen.append(((2 * x).requires_grad, constant.requires_grad))
            return (x * y).sum()

        return grad(inner)(X).sum()

    grad(outer)(X)
    assert seen == [(True, False)]


def test_torch_unwrap_if_dead_unwraps_only_dead_levels():
    kept = []

    def f(x):
        kept.append(x)
        assert levels.unwrap_if_dead(x) is x
        return x.sum()

    grad(f)(X)
    assert levels.is_functorch_wrapped_tensor(kept[0])
    assert not levels.is_functorch_wrapped_tensor(levels.unwrap_if_dead(kept[0]))
    assert torch.equal(levels.unwrap_if_dead(kept[0]), X)


def test_torch_current_level_is_the_dual_level():
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    assert forward_ad._current_level == -1


def test_torch_level_zero_of_unpack_dual_is_the_innermost_jvp():
    def inner(x):
        primal, tangent = forward_ad.unpack_dual(x, level=0)
        assert torch.equal(levels.unwrap_lanes(tangent), torch.full_like(X, 5.0))
        # the outer tangent stays: the derivative of the primal in the outer direction is one
        return primal * 1.0

    def outer(x):
        return jvp(inner, (x,), (torch.full_like(X, 5.0),))[0]

    assert torch.equal(jvp(outer, (X,), (torch.ones_like(X),))[1], torch.ones_like(X))
    stripped = []
    jvp(lambda x: (stripped.append(forward_ad.unpack_dual(levels.level_primals((x,))[0], level=0).tangent), x)[1],
        (X,), (X,))  # fmt: skip
    assert stripped == [None]


def test_torch_forward_ad_is_off_inside_a_functions_jvp_and_can_be_put_on():
    class Cube(torch.autograd.Function):
        """x^3 whose tangent rule runs with forward AD as torch leaves it, or enabled again."""

        @staticmethod
        def forward(x, enable):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.enable = inputs[1]
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def jvp(ctx, tangent, _):
            (x,) = levels.level_primals(ctx.saved_tensors)
            if not ctx.enable:
                return 3 * x**2 * tangent
            with levels.enable_forward_ad():
                return 3 * x**2 * tangent

    def second(enable):
        x, one = torch.tensor(2.0), torch.tensor(1.0)
        return jvp(lambda x: jvp(lambda x: Cube.apply(x, enable), (x,), (one,))[1], (x,), (one,))[1].item()

    assert second(True) == 12
    # when torch repairs its issue 197867, this reads 12 and `enable_forward_ad` may go
    assert second(False) != 12


def test_pullbacks_survive_their_level():
    """What `unwrap_if_dead` is for: a pullback used after the transform that made it."""
    from diffopt.autodiff import custom_derivative

    rule = custom_derivative(
        lambda x: (x.exp(),),
        vjp=lambda inputs, outputs, cotangents, wanted: (outputs[0] * cotangents[0],),
        jvp=lambda inputs, outputs, tangents: (outputs[0] * tangents[0],),
    )
    kept = []

    def f(x):
        _, pull = vjp(lambda y: rule(y)[0], x)
        kept.append(pull)
        return x.sum()

    grad(f)(X)
    (found,) = kept[0](torch.ones_like(X))
    assert torch.allclose(levels.unwrap_lanes(found), X.exp())
