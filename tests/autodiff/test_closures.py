"""diffopt.autodiff.closures: captured tensors are found and rebuilt, or what stays hidden raises."""

import collections
import dataclasses
import functools
import types
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from diffopt import tree
from diffopt.autodiff import check_closed, checkpoint, hoist, unroll
from diffopt.implicit import custom_fixed_point, custom_root
from diffopt.linalg import function_operator, jacobian_operator, linear_solve

F64 = torch.float64
THETA = torch.tensor([2.0, 3.0], dtype=F64)
A = torch.tensor([0.7, -0.4], dtype=F64)
ONE = torch.ones(2, dtype=F64)
TOL = 1e-10  # every problem here is linear, so the only error is rounding


class Holder:
    """An object with a tensor, callable and with a method."""

    def __init__(self, t):
        self.t = t

    def method(self, x):
        return self.t * x

    def __call__(self, x):
        return self.t * x


class Slotted:
    __slots__ = ("t",)

    def __init__(self, t):
        self.t = t

    def __call__(self, x):
        return self.t * x


class Scale(nn.Module):
    """A module whose buffer is the tensor."""

    def __init__(self, t):
        super().__init__()
        self.register_buffer("t", t)

    def forward(self, x):
        return self.t * x


class Outer(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.layers = nn.ModuleList([Scale(t), Scale(torch.ones_like(t))])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@dataclasses.dataclass
class Record:
    t: torch.Tensor


class Pair(NamedTuple):
    t: torch.Tensor
    n: int


SHARED = None


def by_global(x):
    return SHARED * x


def capture_global(t):
    global SHARED
    SHARED = t
    return by_global


def capture_global_indirectly(t):
    capture_global(t)
    return lambda x: by_global(x)


def capture_in_exec(t):
    scope = {"t": t}
    exec("def inner(x): return t * x\ndef outer(x): return inner(x)", scope)
    return scope["outer"]


def capture_kwdefault(t):
    def f(x, *, t=t):
        return t * x

    return f


def capture_late_cell(t):
    def f(x):
        return late * x

    late = t
    return f


def decorated(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)

    return wrapper


def capture_inherited(t):
    class Child(Holder):
        def method(self, x):
            return super().method(x)

    return Child(t).method


def capture_hook(t):
    module = nn.Identity()
    module.register_forward_hook(lambda module, args, out: t * out)
    return module


def capture_nested_root(t):
    inner = custom_root(lambda y, x: y - t * x)(lambda init, x: t * x)
    return lambda x: inner(torch.zeros_like(x), x)


def capture_nested_fixed_point(t):
    inner = custom_fixed_point(lambda y, x: 0.5 * (y + t * x))(lambda init, x: t * x)
    return lambda x: inner(torch.zeros_like(x), x)


def capture_linear_solve(t):
    operator = function_operator(lambda _, v: v / t, (), ONE)
    return lambda x: linear_solve(operator, x)


FOUND = {
    "closure": lambda t: lambda x: t * x,
    "late closure": capture_late_cell,
    "default": lambda t: lambda x, t=t: t * x,
    "keyword default": capture_kwdefault,
    "global": capture_global,
    "global of a called function": capture_global_indirectly,
    "exec'd globals": capture_in_exec,
    "partial": lambda t: functools.partial(lambda t, x: t * x, t),
    "partial keyword": lambda t: functools.partial(lambda x, t: t * x, t=t),
    "partial of a builtin": lambda t: functools.partial(torch.mul, t),
    "bound method": lambda t: Holder(t).method,
    "inherited method": capture_inherited,
    "callable object": Holder,
    "object in a closure": lambda t: (lambda o: lambda x: o.t * x)(Holder(t)),
    "dataclass": lambda t: (lambda o: lambda x: o.t * x)(Record(t)),
    "named tuple": lambda t: (lambda o: lambda x: o.t * x)(Pair(t, 3)),
    "list in a list": lambda t: (lambda o: lambda x: o[1][0] * x)([1, [t]]),
    "dict in a dict": lambda t: (lambda o: lambda x: o["a"]["b"] * x)({"a": {"b": t}}),
    "ordered dict": lambda t: (lambda o: lambda x: o["a"] * x)(collections.OrderedDict(a=t)),
    "defaultdict": lambda t: (lambda o: lambda x: o["a"] * x)(collections.defaultdict(list, a=t)),
    "function in a list": lambda t: (lambda fs: lambda x: fs[0](x))([lambda x: t * x]),
    "module buffer": Scale,
    "submodule": Outer,
    "sequential": lambda t: nn.Sequential(Scale(t), nn.Identity()),
    "module hook": capture_hook,
    "view": lambda t: (lambda stacked: lambda x: stacked[0] * x)(torch.stack([t, t])),
    "decorated": lambda t: decorated(decorated(lambda x: t * x)),
    "inner grad": lambda t: lambda x: grad(lambda y: (t * y**2 / 2).sum())(x),
    "inner vmap": lambda t: lambda x: vmap(lambda row: t * row)(x[None])[0],
    "nested root": capture_nested_root,
    "nested fixed point": capture_nested_fixed_point,
    "nested linear solve": capture_linear_solve,
    "nested checkpoint": lambda t: checkpoint(lambda x: t * x),
    "nested unroll": lambda t: lambda x: unroll(lambda c, _: (t * c, None), x, length=1, checkpoint="log")[0],
}
"""Ways to capture theta, as functions `theta -> (x -> theta x)`, that `hoist` sees."""


def recursive(t):
    def f(x, n=2):
        return t * x if n == 0 else f(x, n - 1)

    return f


def cached(t):
    @functools.lru_cache
    def weight():
        return t

    return lambda x: weight() * x


def generated(t):
    def forever():
        while True:
            yield t

    values = forever()
    return lambda x: next(values) * x


def class_attribute(t):
    class Shared:
        value = t

    return lambda x: Shared.value * x


def module_attribute(t):
    module = types.ModuleType("a_module_of_the_test")
    module.t = t
    return lambda x: module.t * x


def function_attribute(t):
    def f(x):
        return f.t * x

    f.t = t
    return f


def property_closure(t):
    class Lazy:
        @property
        def value(self):
            return t

    item = Lazy()
    return lambda x: item.value * x


def pullback(t):
    _, pull = torch.func.vjp(lambda x: t * x, ONE)
    return lambda x: pull(x)[0]


HIDDEN = {
    "slots": Slotted,
    "recursive function": recursive,
    "lru_cache": cached,
    "generator": generated,
    "class attribute": class_attribute,
    "module attribute": module_attribute,
    "function attribute": function_attribute,
    "property": property_closure,
    "pullback": pullback,
    "builtin method": lambda t: t.mul,
    "builtin method in a closure": lambda t: (lambda f: lambda x: f(x))(t.mul),
    "long list": lambda t: (lambda o: lambda x: o[-1] * x)([0.0] * 5000 + [t]),
    "long dict": lambda t: (lambda o: lambda x: o["t"] * x)({**dict.fromkeys(range(5000)), "t": t}),
    "deque": lambda t: (lambda o: lambda x: o[0] * x)(collections.deque([t])),
    "mapping proxy": lambda t: (lambda o: lambda x: o["t"] * x)(types.MappingProxyType({"t": t})),
    "simple namespace": lambda t: (lambda o: lambda x: o.t * x)(types.SimpleNamespace(t=t)),
    "exception": lambda t: (lambda o: lambda x: o.args[0] * x)(ValueError(t)),
}
"""Ways to capture theta that no walk sees."""


def quotient(capture, theta, a):
    """x = a / theta, as the root of theta x = a with theta captured."""
    f = capture(theta)
    solve = custom_root(lambda x, a: f(x) - a)(lambda init, a: a / f(torch.ones_like(a)).detach())
    return solve(torch.zeros_like(a), a)


def by_autograd(op):
    theta = THETA.clone().requires_grad_()
    (first,) = torch.autograd.grad(op(theta).sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), theta)
    return torch.stack([first.detach(), second])


def by_dual_level(op):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(op(forward_ad.make_dual(THETA, ONE))).tangent


BATCH = torch.stack([THETA, 2 * THETA, THETA + 1])
MODES = {
    "autograd twice": by_autograd,
    "grad": lambda op: grad(lambda t: op(t).sum())(THETA),
    "jvp": lambda op: jvp(op, (THETA,), (ONE,))[1],
    "jacrev": lambda op: jacrev(op)(THETA),
    "jacfwd(jacfwd)": lambda op: jacfwd(jacfwd(op))(THETA),
    "hessian": lambda op: hessian(lambda t: op(t).sum())(THETA),
    "vmap": lambda op: vmap(op)(BATCH),
    "vmap(grad)": lambda op: vmap(grad(lambda t: op(t).sum()))(BATCH),
    "grad(vmap)": lambda op: grad(lambda T: vmap(op)(T).sum())(BATCH),
    "jvp(vmap)": lambda op: jvp(vmap(op), (BATCH,), (BATCH.cos(),))[1],
    "dual_level": by_dual_level,
}


@pytest.mark.parametrize("name", FOUND)
def test_what_a_root_captures_is_differentiated_in_every_mode(name):
    for mode, apply in MODES.items():
        found = apply(lambda t: quotient(FOUND[name], t, A))
        expected = apply(lambda t: A / t)
        assert torch.allclose(found, expected, rtol=TOL, atol=TOL), mode


OPERATORS = {
    "checkpoint": lambda f: 1 / checkpoint(f)(ONE),
    "unroll": lambda f: 1 / unroll(lambda c, _: (f(c), None), ONE, length=1, checkpoint="sqrt")[0],
    "function_operator": lambda f: linear_solve(function_operator(lambda _, v: f(v), (), ONE), ONE),
    "jacobian_operator": lambda f: linear_solve(jacobian_operator(f, ONE), ONE),
    "fixed point": lambda f: custom_fixed_point(lambda x: x - 0.1 * (f(x) - 1))(lambda init: 1 / f(ONE).detach())(ONE),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["closure", "global", "bound method", "submodule", "partial", "dict in a dict"])
def test_what_other_operators_capture_is_differentiated_in_every_mode(name, operator):
    for mode, apply in MODES.items():
        found = apply(lambda t: OPERATORS[operator](FOUND[name](t)))
        expected = apply(lambda t: 1 / t)
        assert torch.allclose(found, expected, rtol=TOL, atol=TOL), mode


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_root_cannot_find_raises_in_every_mode(name):
    a = A.clone().requires_grad_()  # the plain mode checks where something is tracked
    for apply in MODES.values():
        with pytest.raises(ValueError, match=r"hidden where it cannot be found.*pass it as an argument"):
            apply(lambda t: quotient(HIDDEN[name], t, a))


def test_a_hidden_tensor_that_is_not_tracked_is_a_constant():
    for capture in HIDDEN.values():
        found = grad(lambda a: quotient(capture, THETA, a).sum())(A)  # noqa: B023
        assert torch.allclose(found, 1 / THETA, rtol=TOL)


def test_hoist_rebuilds_with_other_values_and_leaves_the_original():
    theta = THETA.clone().requires_grad_()
    for name, capture in FOUND.items():
        if name.startswith(("nested", "view")):
            continue
        fn = capture(theta)
        rebuild, captured, _ = hoist(fn)
        assert [c is theta for c in captured] == [True], name
        assert torch.allclose(rebuild(5 * ONE)(A), 5 * A), name
        assert torch.equal(fn(A), THETA * A), name


def test_hoist_of_several_functions_shares_what_they_share():
    theta = THETA.clone().requires_grad_()
    holder = Holder(theta)
    rebuild, captured, _ = hoist(holder.method, lambda x: holder.t + x)
    assert len(captured) == 1
    times, plus = rebuild(5 * ONE)
    assert torch.equal(times(A), 5 * A)
    assert torch.equal(plus(A), 5 + A)
    assert times.__self__.t is plus.__closure__[0].cell_contents.t


def test_hoist_keeps_tied_parameters_tied():
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    rebuild, captured, _ = hoist(nn.Sequential(first, second))
    assert len(captured) == 1
    rebuilt = rebuild(torch.eye(2))
    assert rebuilt[0].weight is rebuilt[1].weight


def test_hoist_of_nothing_tracked_returns_the_same_function():
    def fn(x):
        return x * len([1])

    rebuild, captured, complete = hoist(fn)
    assert rebuild() is fn
    assert captured == []
    assert complete
    both, _, _ = hoist(fn, torch.sin)
    assert both() == (fn, torch.sin)


def test_hoist_says_when_it_could_not_see_everything():
    assert not hoist(Slotted(THETA)).complete
    assert not hoist(THETA.mul).complete
    assert hoist(torch.sin).complete


def test_hoist_does_not_follow_cycles_forever():
    items = [THETA.clone().requires_grad_()]
    items.append(items)
    rebuild, captured, _ = hoist(lambda x: items[0] * x)
    assert len(captured) == 1
    assert torch.equal(rebuild(5 * ONE)(A), 5 * A)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (4, 2)),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), (4, 2)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), (4, 2)),
        (lambda: nn.Bilinear(2, 2, 2), (4, 2)),
    ],
    ids=["mlp", "batch norm", "weight norm", "bilinear"],
)
def test_a_captured_module_has_the_gradient_of_the_unrolled_loop(network, shape):
    torch.manual_seed(0)
    net = network().double()
    call = (lambda x: net(x, x)) if isinstance(net, nn.Bilinear) else net
    shift = torch.linspace(-1, 1, 8, dtype=F64).reshape(shape)

    def contraction(x, shift):
        return 0.1 * torch.tanh(call(x)) + shift

    def iterate(init, shift):
        x = init
        for _ in range(40):
            x = contraction(x, shift)
        return x

    solve = custom_fixed_point(contraction)(iterate)
    parameters = list(net.parameters())
    found = torch.autograd.grad((solve(torch.zeros_like(shift), shift) ** 2).sum(), parameters)
    expected = torch.autograd.grad((iterate(torch.zeros_like(shift), shift) ** 2).sum(), parameters)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10)  # the contraction halves the error 40 times


class Odd(nn.Module):
    """A module that uses a parameter of its own, one out of reach of its registry, and a tensor of another."""

    def __init__(self, outside):
        super().__init__()
        self.inner = nn.Linear(2, 2).double()
        self.aliases = [self.inner, nn.Linear(2, 2).double()]
        self.outside = outside

    def forward(self, x):
        return self.aliases[0](x) + self.aliases[1](x) * self.outside


def test_a_function_of_a_module_does_not_hold_the_parameters_that_it_is_given():
    net = Scale(nn.Parameter(ONE))
    assert hoist(tree.from_module(net)[0]).captured == []
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    function, params, buffers = tree.from_module(net)
    assert hoist(lambda x: function(params, buffers, x)[0]).captured == []
    both = hoist(lambda x: function(params, buffers, x)[0] + net[0].weight.sum())
    assert [id(t) for t in both.captured] == [id(p) for p in net.parameters()]


def test_a_function_of_a_module_holds_what_else_the_module_holds():
    torch.manual_seed(0)
    outside = THETA.clone().requires_grad_()
    module = Odd(outside)
    function, params, _ = tree.from_module(module)
    rebuild, captured, _ = hoist(function)
    assert {id(t) for t in captured} == {id(t) for t in (outside, *module.aliases[1].parameters())}
    values = [torch.zeros_like(t) for t in captured]
    assert_close(rebuild(*values)(params, {}, A)[0], module.inner(A))
    assert_close(rebuild(*captured)(params, {}, A)[0], module(A))


@pytest.mark.parametrize("solve", [custom_root, custom_fixed_point], ids=lambda f: f.__name__)
def test_a_trainable_module_leaves_no_graph_behind(solve):
    net = nn.Linear(2, 2).double()
    function, params, _ = tree.from_module(net)

    def equation(x, shift):
        return function(params, {}, x)[0] * 0.1 + shift - (x if solve is custom_root else 0)

    assert not solve(equation)(lambda init, shift: init)(ONE, A).requires_grad
    weighted = solve(lambda x, shift: equation(x, shift) + 0 * net.weight.sum())
    assert weighted(lambda init, shift: init)(ONE, A).requires_grad


def test_check_closed_returns_the_leaves_and_raises_on_what_is_tracked():
    (leaf,) = check_closed(lambda x: {"y": 2 * x}, [THETA], name="double")
    assert torch.equal(leaf, 2 * THETA)
    hidden = Slotted(THETA.clone().requires_grad_())
    with pytest.raises(ValueError, match="my function uses a tensor that carries gradient"):
        check_closed(hidden, [A], name="my function")
    assert len(check_closed(Slotted(THETA), [A.clone().requires_grad_()], name="f")) == 1
