import dataclasses

import pytest
import torch
from torch.testing import assert_close

from diffopt import random, tree
from diffopt.implicit import OneStep
from diffopt.implicit.protocol import Equation, Response
from diffopt.linalg import CG, Dense, Neumann
from diffopt.multilevel import (
    SAMA,
    Detached,
    Edge,
    FiniteDifference,
    Implicit,
    Level,
    Nystrom,
    Reinforce,
    Unrolled,
    ZeroOrder,
    graph,
)
from diffopt.optimizers import adam, adamw, rmsprop, sgd
from diffopt.transforms import chain, clip_by_global_norm
from multilevel.quadratic_programs import SHAPES, program, quadratic, solved, start, true_gradient, value

SHAPE = "two levels"


def hypergrad(method, known=None, **options):
    known = start(SHAPE) if known is None else known
    levels = program(SHAPE, method, **options)
    state = levels.init(random.key(0), known)
    return levels.hypergrad("a")(state)


def error(method, **options):
    known = start(SHAPE)
    return torch.linalg.vector_norm(hypergrad(method, known, **options)[0] - true_gradient(SHAPE, "a", known)).item()


def test_conjugate_gradients_are_exact_in_as_many_steps_as_unknowns():
    assert error(Implicit(CG(rtol=0.0, max_steps=3))) < 1e-10
    assert error(Implicit(CG(rtol=0.0, max_steps=1))) > 1e-3


def test_a_solve_that_failed_is_no_place_to_start_the_next():
    """Of a system that is not definite; each solve started from the last one's answer, which grew without end."""
    h = torch.tensor([2.0, 1.0, 0.5, 0.3, 0.1, -0.4, -0.2, 0.05], dtype=torch.float64)
    levels = {
        "a": Level(lambda a, b, _: ((b - 1) ** 2).sum(), sgd(1e-4), reads=("b",)),
        "b": Level(lambda b, a, _: (h * b**2).sum() / 2 + a @ b, sgd(1e-4), reads=("a",)),
    }
    two = graph(levels, [Edge("a", "b", Implicit(CG(max_steps=2)))])
    state = two.init(random.key(0), {"a": torch.zeros_like(h), "b": torch.linspace(-1, 2, 8, dtype=h.dtype)})
    seen = []
    for _ in range(20):
        state, metrics = two.update(state)
        seen.append(metrics["a"].reports["b"].residual)
    assert max(seen[10:]) < 1.1 * max(seen[:10]) < 20


def test_neumann_converges_at_its_geometric_rate():
    errors = [error(Implicit(Neumann(n, 0.4))) for n in (10, 20, 30)]
    assert errors[2] < 1e-3
    assert errors[1] / errors[0] == pytest.approx(errors[2] / errors[1], rel=0.2)


def test_truncation_converges_at_the_rate_of_the_steps():
    errors = [error(Unrolled(truncate=n), steps=60) for n in (10, 20, 30)]
    assert errors[2] < 2e-2
    assert errors[1] / errors[0] == pytest.approx(errors[2] / errors[1], rel=0.3)


def test_unrolled_steps_from_the_solution_approach_the_response():
    assert error(Unrolled(), steps=300) < 1e-8
    assert error(Unrolled(checkpoint="sqrt"), steps=300) < 1e-8


@pytest.mark.parametrize("eta", [0.1, 0.5])
def test_a_finite_difference_is_the_one_step_derivative(eta):
    assert_close(hypergrad(FiniteDifference(eta))[0], hypergrad(OneStep(eta))[0], rtol=1e-8, atol=1e-9)


def unit(b):
    """The projection onto the unit ball."""
    return b / torch.linalg.vector_norm(b).clamp(min=1.0)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (sgd(0.1), {}),
        (adam(0.05), {}),
        (adamw(0.05), {}),
        (rmsprop(0.05), {}),
        (adam(0.05), {"clip": 0.3}),
        (sgd(0.1), {"project": unit}),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "clip", "project"],
)
def test_sama_is_the_derivative_of_one_more_step(optimizer, options):
    known = start(SHAPE)
    levels = program(SHAPE, SAMA())
    level = levels.program.levels["b"]
    two = graph(
        {"a": levels.program.levels["a"], "b": Level(level.loss, optimizer, reads=("a",), steps=7, **options)},
        [Edge("a", "b", SAMA())],
    )
    known["b"] = known["b"] + 0.3  # away from the solution, where Adam's rates mean something
    state, _ = two.update(two.init(random.key(0), known))
    found, _ = two.hypergrad("a")(state)
    chained = [clip_by_global_norm(options["clip"])] if "clip" in options else []
    whole = chain(*chained, optimizer)

    def stepped(a):
        gradient = torch.func.grad(level.loss)(state.params["b"], a)
        before = (*(c.init(gradient) for c in chained), state.optimizers["b"])
        moved = state.params["b"] + whole.update(gradient, before, state.params["b"])[0]
        return options["project"](moved) if "project" in options else moved

    top = levels.program.levels["a"].loss
    v = torch.func.grad(top, argnums=1)(state.params["a"], state.params["b"])
    expected = torch.func.grad(top)(state.params["a"], state.params["b"])
    expected = expected + torch.func.vjp(stepped, state.params["a"])[1](v)[0]
    assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", [adam(0.1), rmsprop(0.1)], ids=["adam", "rmsprop"])
def test_sama_leaves_out_parameters_that_were_never_used(optimizer):
    """Their gradients are 0, where the root of these optimizers has no derivative."""

    def gradient(size):
        levels = {
            "a": Level(lambda a, b, _: ((b[:2] - 1) ** 2).sum(), sgd(0.1), reads=("b",)),
            "b": Level(lambda b, a, _: ((b[:2] - a) ** 4).sum(), optimizer, reads=("a",)),
        }
        two, known = graph(levels, [Edge("a", "b", SAMA())]), {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(size)}
        state = two.init(random.key(0), tree.map(torch.Tensor.double, known))
        for _ in range(3):
            state, _ = two.update(state)
        return two.hypergrad("a")(state)[0]

    assert_close(gradient(5), gradient(2), rtol=1e-7, atol=0)
    assert gradient(2).abs().min() > 1e-3


def response_of_a_level():
    """A response whose step mixes all parameters, by the clipping, and whose iterate is no solution."""
    phi = lambda x, a: torch.log(torch.exp(x * a[0]).sum() + torch.exp(-x).sum()) + (x - a[1]).pow(2).sum()  # noqa: E731
    x = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    args = (torch.tensor([0.8, 0.4], dtype=torch.float64),)
    optimizer = chain(clip_by_global_norm(0.3), adam(0.05))
    change = lambda g: optimizer.update(g, optimizer.init(x), x)[0]  # noqa: E731
    slope = torch.func.grad(phi)
    retrace = lambda truncate, checkpoint, a: x - 0.1 * slope(x, a)  # noqa: E731
    pull_change = lambda g, v: torch.func.vjp(change, g)[1](v)[0]  # noqa: E731
    return Response(x, args, Equation(slope, symmetric=True), phi, retrace, change, pull_change)


@pytest.mark.parametrize(
    "method",
    [Implicit(Dense()), OneStep(0.3), FiniteDifference(0.3), SAMA(), Nystrom(3, 0.01), Unrolled()],
    ids=lambda m: type(m).__name__,
)
def test_a_response_has_the_derivative_that_is_pulled(method):
    response = response_of_a_level()
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    parts, _, _ = method.pull(response, v, method.begin(response.x, random.key(1)))

    def respond(a):
        here = dataclasses.replace(response, args=(a,))
        return method.respond(here, method.begin(response.x, random.key(1)))

    value, pull = torch.func.vjp(respond, *response.args)
    if not isinstance(method, Unrolled):
        assert_close(value, response.x)
    assert_close(pull(v)[0], parts[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("method", "within"), [(ZeroOrder(0.01, 8192), 0.06), (Reinforce(0.01, 32768), 0.06)])
def test_an_estimated_response_has_the_derivative_of_the_steps(method, within):
    response = response_of_a_level()
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact, _, _ = Unrolled().pull(response, v, ())

    def respond(a):
        return method.respond(dataclasses.replace(response, args=(a,)), method.begin(response.x, random.key(1)))

    found = torch.func.vjp(respond, *response.args)[1](v)[0]
    assert torch.linalg.vector_norm(found - exact[0]) < within * torch.linalg.vector_norm(exact[0])


def test_nystrom_of_full_rank_is_the_damped_solve():
    _, reports = hypergrad(Nystrom(3, damping=1e-8))
    assert error(Nystrom(3, damping=1e-8)) < 1e-5
    assert reports["b"].residual < 1e-5
    assert error(Nystrom(1, damping=1.0)) > 1e-3


@pytest.mark.parametrize(("method", "within"), [(ZeroOrder(0.5, 4096), 0.06), (Reinforce(0.5, 8192), 0.15)])
def test_estimates_by_values_alone_agree_with_unrolled_steps(method, within):
    exact, _ = hypergrad(Unrolled(), steps=20)
    found, _ = hypergrad(method, steps=20)
    assert torch.linalg.vector_norm(found - exact) < within * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("method", [Implicit(Dense()), Nystrom(4, 1e-8)], ids=lambda m: type(m).__name__)
def test_exact_methods_are_exact_within_a_chain(method):
    """The middle level's own response, differentiated by the top, holds the method's derivative of the lowest."""
    known = start("three, by neighbours")
    assert_close(chain_gradient(method, known), true_gradient("three, by neighbours", "a", known), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [OneStep(0.1), FiniteDifference(0.1), SAMA()], ids=lambda m: type(m).__name__)
def test_one_step_answers_within_a_chain(method):
    known, losses = (
        start("three, by neighbours"),
        {n: quadratic(n, r) for n, r in SHAPES["three, by neighbours"].items()},
    )
    known["b"], known["c"] = known["b"] + 0.3, known["c"] - 0.2

    def answer(loss, x, *args):
        slope = torch.func.grad(loss)(x, *args)
        return x - 0.1 * (slope - slope.detach())

    def middle(b, a):
        return losses["b"](b, a, answer(losses["c"], known["c"], b))

    expected = torch.func.grad(lambda a: losses["a"](a, answer(middle, known["b"], a)))(known["a"])
    assert_close(chain_gradient(method, known), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "shape", ["three, by neighbours", "three, the top acts through the response of the middle alone"]
)
@pytest.mark.parametrize("method", [OneStep(0.1), FiniteDifference(0.1), SAMA()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("below", [Implicit(Dense()), Implicit(CG()), Nystrom(4, 1e-8)], ids=["dense", "cg", "nystrom"])
def test_what_lies_below_follows_a_level_that_is_moved(shape, method, below):
    known = start(shape)
    levels = program(shape, below).program.levels
    three = graph(levels, [Edge("a", "b", method), Edge("b", "c", below)])
    found, _ = three.hypergrad("a")(three.init(random.key(0), known))

    def top(a):
        slope = torch.func.grad(lambda b: value(shape, "b", {"a": a, "b": b, "c": known["c"]}))(known["b"])
        here = {"a": a, "b": known["b"] - 0.1 * (slope - slope.detach())}
        here |= solved(shape, "b", here)
        return quadratic("a", SHAPES[shape]["a"])(a, *(here[r] for r in SHAPES[shape]["a"]))

    assert_close(found, torch.func.grad(top)(known["a"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "within"), [(ZeroOrder(0.05, 8192), 0.2), (Reinforce(0.5, 8192), 0.2)])
@pytest.mark.parametrize("above", [Implicit(Dense()), OneStep(0.1)], ids=lambda m: type(m).__name__)
def test_estimates_by_values_alone_serve_within_a_chain(method, within, above):
    """They give what the lowest level adds by its steps; to `Implicit` above, second derivatives without much noise."""
    shape = "three, the top acts through the response of the middle alone"
    levels, known = program(shape, Unrolled(), steps=10).program.levels, start(shape)

    def gradient(below):
        three = graph(levels, [Edge("a", "b", above), Edge("b", "c", below)])
        return three.hypergrad("a")(three.init(random.key(0), known))[0]

    exact, without = gradient(Unrolled()), gradient(Detached())
    distance = torch.linalg.vector_norm(gradient(method) - exact)
    assert distance < within * torch.linalg.vector_norm(without - exact)


def chain_gradient(method, known):
    three = program("three, by neighbours", method)
    return three.hypergrad("a")(three.init(random.key(0), known))[0]


def test_the_error_of_an_unfinished_solve_is_bounded():
    known = start(SHAPE)
    loose = program(SHAPE, Implicit(CG(rtol=0.0, max_steps=1)))
    b = loose.program.levels["b"]
    z = torch.cat([known["b"], known["a"]])
    H = torch.func.hessian(lambda z: b.loss(z[:3], z[3:]))(z)
    constants = {
        "strong_convexity": torch.linalg.eigvalsh(H[:3, :3])[0].item(),
        "coupling": torch.linalg.matrix_norm(H[:3, 3:], 2).item(),
    }
    edge = Edge("a", "b", Implicit(CG(rtol=0.0, max_steps=1)), **constants)
    two = graph(loose.program.levels, [edge])
    state = two.init(random.key(0), known)
    found, reports = two.hypergrad("a")(state)
    wrong = torch.linalg.vector_norm(found - true_gradient(SHAPE, "a", known))
    report = reports["b"]
    assert report.bound
    assert 1e-3 < wrong <= report.error < 100 * wrong
    assert report.distance < 1e-12
    assert not hypergrad(Implicit(CG(rtol=0.0, max_steps=1)))[1]["b"].bound


@pytest.mark.parametrize(
    "make",
    [
        lambda: FiniteDifference(radius=0.0),
        lambda: SAMA(radius=-1.0),
        lambda: Nystrom(0),
        lambda: Nystrom(2, damping=0.0),
        lambda: ZeroOrder(0.0, 2),
        lambda: ZeroOrder(0.1, 3),
        lambda: Reinforce(0.1, 1),
    ],
)
def test_bad_options_raise(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def pair(lower_steps=1, idle=False):
    """The levels of `a` over `b`, whose response is `a`."""
    toward = (lambda a, b, _: (a**2).sum() + 0 * b.sum()) if idle else (lambda a, b, _: ((b - 2.0) ** 2).sum())
    return {
        "a": Level(toward, sgd(0.5), reads=("b",)),
        "b": Level(lambda b, a, _: ((b - a) ** 2).sum() / 2, sgd(0.5), reads=("a",), steps=lower_steps),
    }


@pytest.mark.parametrize("method", [Implicit(), Implicit(CG()), Unrolled(), OneStep(0.5), FiniteDifference(), SAMA()])
@pytest.mark.parametrize("upper", [torch.float32, torch.float64])
def test_levels_may_differ_in_dtype(method, upper):
    lower = torch.float64 if upper is torch.float32 else torch.float32
    two = graph(pair(lower_steps=50), [Edge("a", "b", method)])
    at = torch.tensor([1.0, -0.5], dtype=torch.float64)
    mixed = two.init(random.key(0), {"a": at.to(upper), "b": at.to(lower)})
    exact = two.init(random.key(0), {"a": at, "b": at})
    for _ in range(2):
        mixed, exact = two.update(mixed)[0], two.update(exact)[0]
    assert (mixed.params["a"].dtype, mixed.params["b"].dtype) == (upper, lower)
    assert_close(mixed.params, exact.params, rtol=1e-2, atol=1e-2, check_dtype=False)  # of a difference in float32


@pytest.mark.parametrize("method", [Implicit(CG()), Unrolled(), OneStep(0.5), SAMA(), Nystrom(2)])
def test_odd_trees_pass_through(method):
    """Tuples, lists, 0-d and empty leaves; the empty ones stay."""
    low = Level(lambda b, a, batch: (b[0] - a[1][0]) ** 2 + b[1][0].sum(), sgd(0.2), reads=("a",))
    top = Level(lambda a, b, batch: (b[0] - 2) ** 2 + a[0]["z"] ** 2, sgd(0.2), reads=("b",))
    odd = {
        "a": ({"z": torch.tensor(1.0), "none": torch.ones(0, 3)}, [torch.tensor(0.5)], ()),
        "b": [torch.tensor(0.3), (torch.ones(0), {})],
    }
    two = graph({"a": top, "b": low}, [Edge("a", "b", method)])
    new, _ = two.update(two.init(random.key(0), odd))
    tree.check_like(new.params, odd)
    assert new.params["a"][1][0] > 0.5  # towards what brings b to 2
    assert_close(new.params["a"][0]["z"], torch.tensor(0.6))


def test_a_lower_level_without_effect_has_no_residual():
    two = graph(pair(idle=True), [Edge("a", "b", Nystrom(2))])
    new, metrics = two.update(two.init(random.key(0), {"a": torch.ones(2), "b": torch.ones(2)}))
    assert metrics["a"].reports["b"].residual == 0
    assert new.params["a"].tolist() == [0.0, 0.0]


def test_a_loss_of_nan_gives_no_gradient_and_leaves_the_adjoint():
    known = start(SHAPE)
    levels = program(SHAPE, Implicit(CG()))
    state = levels.init(random.key(0), known)
    bad = levels.program.levels["a"]
    broken = graph(
        {
            "a": Level(lambda *args: bad.loss(*args) * torch.nan, sgd(0.1), reads=("b",)),
            "b": levels.program.levels["b"],
        },
        [Edge("a", "b", Implicit(CG()))],
    )
    assert broken.hypergrad("a")(state)[0].isnan().all()
    after, _ = broken.update(state)
    assert after.methods["a", "b"]["b"].isfinite().all()


def at_a_saddle(method):
    """The hypergradient over a level whose iterate is no minimizer: its Hessian has eigenvalues of both signs."""
    A = torch.tensor([[1.0, 0.5], [0.5, -2.0]], dtype=torch.float64)
    levels = {
        "a": Level(lambda a, b, _: ((b - 2) ** 2).sum(), sgd(0.1), reads=("b",)),
        "b": Level(lambda b, a, _: b @ A @ b / 2 - (a * b).sum(), sgd(0.1), reads=("a",)),
    }
    two = graph(levels, [Edge("a", "b", method)])
    ones = torch.ones(2, dtype=torch.float64)
    return two.hypergrad("a")(two.init(random.key(0), {"a": ones, "b": ones})), torch.linalg.solve(A, -2 * ones)


@pytest.mark.parametrize("method", [Implicit(), Implicit(Dense())], ids=["automatic", "dense"])
def test_a_direct_solve_needs_no_minimizer(method):
    (found, reports), expected = at_a_saddle(method)
    assert_close(found, expected)
    assert reports["b"].residual < 1e-12


@pytest.mark.parametrize("method", [FiniteDifference(0.1), SAMA()], ids=lambda m: type(m).__name__)
def test_differences_are_of_one_loss_where_it_draws(method):
    """Dropout draws one mask for both places; of two masks the difference would be noise, divided by a small number."""
    x = random.normal(random.key(0), (20, 3), dtype=torch.float64)

    def losses(b):
        return ((torch.nn.functional.dropout(x, 0.3) @ b).tanh() - x.sum(1)) ** 2

    levels = {
        "a": Level(lambda a, b, _: losses(b).mean(), sgd(0.1), reads=("b",)),
        "b": Level(lambda b, a, _: (losses(b) * a.sigmoid()).mean(), sgd(0.1), reads=("a",)),
    }

    def gradients(method):
        two = graph(levels, [Edge("a", "b", method)])
        state = two.init(random.key(0), {"a": x[:, 0], "b": x[0]})
        torch.manual_seed(0)
        return torch.stack([two.hypergrad("a")(state)[0] for _ in range(20)])

    assert gradients(method).std(0).norm() < 2 * gradients(OneStep(0.1)).std(0).norm()
