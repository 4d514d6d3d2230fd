import io
import itertools

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

from diffopt import random, tree
from diffopt.linalg import CG, Dense
from diffopt.multilevel import (
    Detached,
    Edge,
    Implicit,
    Level,
    OneStep,
    PerStep,
    Unrolled,
    graph,
)
from diffopt.optimizers import adam, sgd
from multilevel.quadratic_programs import SHAPES, program, start, true_gradient

EXACT = 1e-10  # linear systems of few unknowns in float64, and differences that are exact for quadratics
ROOTS = {"one lower level of two": "b"}


@pytest.mark.parametrize("method", [Implicit(Dense()), Implicit(CG(rtol=1e-12))], ids=["Dense", "CG"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hypergradients_are_exact(shape, method):
    if shape == "diamond" and isinstance(method.linear_solver, CG):
        pytest.skip("a joint response of two levels is not symmetric")
    known = start(shape)
    levels = program(shape, method)
    state = levels.init(random.key(0), known)
    for root in {"a", ROOTS.get(shape, "a")}:
        found, reports = levels.hypergrad(root)(state)
        assert_close(found, true_gradient(shape, root, known), rtol=EXACT, atol=EXACT)
        assert all(report.residual < 1e-8 for report in reports.values())


def test_a_partial_response_drops_what_acts_through_the_lower_level_alone():
    shape = "three, the top acts through the response of the middle alone"
    known = start(shape)
    exact = true_gradient(shape, "a", known)
    whole = program(shape, Implicit(Dense()))
    total, _ = whole.hypergrad("a")(whole.init(random.key(0), known))
    partial = program(shape, Implicit(Dense()), response="partial")
    dropped, _ = partial.hypergrad("a")(partial.init(random.key(0), known))
    assert_close(total, exact, rtol=EXACT, atol=EXACT)
    assert torch.linalg.vector_norm(dropped - exact) > 1e-3


def test_a_chain_whose_middle_level_reads_the_lowest_alone_has_a_gradient():
    """The top acts through the middle level, whose own loss depends on its parameters by its response alone."""
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    levels = {
        "top": Level(lambda a, b, batch: ((b - 3 * target) ** 2).sum() + 0 * a.sum(), sgd(0.1), reads=("middle",)),
        "middle": Level(lambda b, c, a, batch: ((c - a) ** 2).sum(), sgd(0.1), reads=("low", "top")),
        "low": Level(lambda c, b, batch: ((c - 2 * b) ** 2).sum(), sgd(0.1), reads=("middle",)),
    }
    a = torch.tensor([0.5, 1.5], dtype=torch.float64)
    state = {"top": a, "middle": a / 2, "low": a}  # c = 2 b, so b = a / 2
    edges = [Edge("top", "middle"), Edge("middle", "low")]
    exact = 2 * (a / 2 - 3 * target) / 2
    program = graph(levels, edges)
    assert_close(program.hypergrad("top")(program.init(random.key(0), state))[0], exact)


def quadratic_pair(lower_steps=50, **options):
    levels = {
        "a": Level(lambda a, b, batch: ((b - 2.0) ** 2).sum(), sgd(0.5), reads=("b",)),
        "b": Level(lambda b, a, batch: ((b - a) ** 2).sum() / 2, sgd(0.5), reads=("a",), steps=lower_steps, **options),
    }
    return levels, graph(levels, [Edge("a", "b")])


def params(a=0.0, b=1.0):
    return {"a": torch.full((2,), a, dtype=torch.float64), "b": torch.full((2,), b, dtype=torch.float64)}


def test_an_update_moves_the_lower_level_first_and_changes_nothing_in_place():
    _, program = quadratic_pair()
    state = program.init(random.key(0), params())
    new, metrics = program.update(state)
    assert program.counts == {"b": 50, "a": 1}
    assert_close(new.params["b"], torch.zeros(2, dtype=torch.float64))  # at the response to a = 0
    assert_close(new.params["a"], torch.full((2,), 2.0, dtype=torch.float64))  # 0 - 0.5 * 2 * (0 - 2)
    assert_close(metrics["a"].loss, torch.tensor(8.0, dtype=torch.float64))
    assert_close(metrics["a"].gradient_norm, torch.tensor(4 * 2**0.5, dtype=torch.float64))
    assert state.params["b"].tolist() == [1.0, 1.0]
    assert new.updates == 1
    assert not new.params["a"].requires_grad


def test_where_the_lower_level_starts():
    _, reset = quadratic_pair(2, start="reset")
    state = reset.init(random.key(0), params())
    once, _ = reset.update(state)
    again, _ = reset.update(once._replace(params={**once.params, "b": once.params["b"] + 7, "a": state.params["a"]}))
    assert_close(again.params["b"], once.params["b"])
    _, rollback = quadratic_pair(2, start="rollback")
    new, metrics = rollback.update(rollback.init(random.key(0), params()))
    assert new.params["b"].tolist() == [1.0, 1.0]
    assert metrics["a"].loss == 2 * (0.25 - 2.0) ** 2  # but the upper level saw two steps


def test_warmup_keeps_a_level_in_place():
    levels, _ = quadratic_pair(1)
    late = graph({**levels, "a": Level(levels["a"].loss, sgd(0.5), reads=("b",), warmup=2)}, [Edge("a", "b")])
    state = late.init(random.key(0), params())
    states = [state]
    for _ in range(3):
        states.append(late.update(states[-1])[0])
    assert [s.params["a"][0].item() for s in states[:3]] == [0.0, 0.0, 0.0]
    assert states[3].params["a"][0] != 0
    batched = vmap(lambda p: late.update(late.init(random.key(0), p))[0].params)(tree.map(lambda p: p[None], params()))
    assert batched["a"].tolist() == [[0.0, 0.0]]


def test_clip_and_project():
    levels, _ = quadratic_pair()
    kept = Level(levels["a"].loss, sgd(0.5), reads=("b",), clip=0.1, project=lambda a: a.clamp(max=0.03))
    bounded = graph({**levels, "a": kept}, [Edge("a", "b")])
    new, metrics = bounded.update(bounded.init(random.key(0), params()))
    assert new.params["a"].tolist() == [0.03, 0.03]  # 0.05 / sqrt(2) = 0.035 before the projection
    assert metrics["a"].gradient_norm > 5


def test_micro_batches_average_to_the_whole():
    X = random.normal(random.key(1), (8, 2), dtype=torch.float64)
    loss = lambda b, a, x: ((b - a - x) ** 2).mean()  # noqa: E731
    top = Level(lambda a, b, x: (b**2).sum(), sgd(0.5), reads=("b",))
    one = graph({"a": top, "b": Level(loss, sgd(0.3), reads=("a",))}, [Edge("a", "b")])
    four = graph({"a": top, "b": Level(loss, sgd(0.3), reads=("a",), accumulate=4)}, [Edge("a", "b")])
    whole, seen = one.update(one.init(random.key(0), params()), {"b": X})
    parts, parts_seen = four.update(four.init(random.key(0), params()), {"b": X.reshape(4, 2, 2)})
    assert_close(whole.params, parts.params)
    assert_close(seen["b"].loss, parts_seen["b"].loss)
    with pytest.raises(ValueError, match="4 micro-batches needs that leading size"):
        four.update(four.init(random.key(0), params()), {"b": X})


@pytest.mark.parametrize("method", [Implicit(), Unrolled()])
def test_batches_for_each_step(method):
    X = random.normal(random.key(1), (3, 2), dtype=torch.float64)
    loss = lambda b, a, x: ((b - a * x) ** 2).sum()  # noqa: E731
    levels = {
        "a": Level(lambda a, b, _: (b**2).sum(), sgd(0.1), reads=("b",)),
        "b": Level(loss, sgd(0.2), reads=("a",), steps=3),
    }
    two = graph(levels, [Edge("a", "b", method)])
    new, _ = two.update(two.init(random.key(0), params(1.0)), {"b": PerStep(X)})

    def lower(a):
        b = params()["b"]
        for x in X:
            b = b - 0.2 * grad(loss)(b, a, x)
        return b

    assert_close(new.params["b"], lower(params(1.0)["a"]))
    if isinstance(method, Unrolled):
        slope = grad(lambda a: (lower(a) ** 2).sum())(params(1.0)["a"])
        assert_close(new.params["a"], params(1.0)["a"] - 0.1 * slope)
    with pytest.raises(ValueError, match="'b' takes 3 steps in an update"):
        two.update(two.init(random.key(0), params()), {"b": PerStep(X[:2])})


def test_levels_between_take_their_steps_in_turn():
    order = []

    def loss(name):
        def value(own, *rest):
            order.append(name)
            return sum((x**2).sum() for x in (own, *rest[:-1]))

        return value

    levels = {
        "a": Level(loss("a"), sgd(0.1), reads=("b",)),
        "b": Level(loss("b"), sgd(0.1), reads=("a", "c"), steps=2),
        "c": Level(loss("c"), sgd(0.1), reads=("b",), steps=2),
    }
    chain = graph(levels, [Edge("a", "b", Detached()), Edge("b", "c", Detached())])
    assert [turn.name for turn in chain.schedule] == ["c", "c", "b", "c", "c", "b", "a"]
    assert chain.counts == {"c": 4, "b": 2, "a": 1}
    chain.update(chain.init(random.key(0), {n: torch.ones(1) for n in "abc"}))
    assert [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name] == ["c", "b", "c", "b", "a"]


def test_a_lower_level_of_two_moves_once_for_both():
    assert [t.name for t in program("one lower level of two", Implicit(), steps=2).schedule] == [*"ccab"] * 2


def test_players_answer_without_foreseeing():
    """A saddle: both players' gradients are partial, and simultaneous descent turns round the solution."""
    levels = {
        "min": Level(lambda x, y, _: (x * y).sum(), sgd(0.1), reads=("max",)),
        "max": Level(lambda y, x, _: -(x * y).sum(), sgd(0.1), reads=("min",)),
    }
    game = graph(levels, [Edge("min", "max", Detached())])
    state = game.init(random.key(0), {"min": torch.tensor([1.0]), "max": torch.tensor([2.0])})
    new, _ = game.update(state)
    assert_close(new.params["max"], torch.tensor([2.1]))
    assert_close(new.params["min"], torch.tensor([1 - 0.1 * 2.1]))


def test_the_best_response_is_reached():
    levels, _ = quadratic_pair(20)
    two = graph({**levels, "a": Level(levels["a"].loss, adam(0.1), reads=("b",))}, [Edge("a", "b")])
    state = two.init(random.key(0), params())
    for _ in range(200):
        state, _ = two.update(state)
    assert_close(state.params["a"], torch.full((2,), 2.0, dtype=torch.float64), atol=1e-3, rtol=0)


def test_seeds_and_step_sizes_map():
    levels, two = quadratic_pair(3)
    starts = tree.map(lambda p: torch.stack([p, p + 1, p - 2]), params())
    together = vmap(lambda p: two.update(two.init(random.key(0), p))[0].params)(starts)
    for i in range(3):
        alone, _ = two.update(two.init(random.key(0), tree.map(lambda p: p[i], starts)))  # noqa: B023
        assert_close(tree.map(lambda p: p[i], together), alone.params)  # noqa: B023

    def trained(rate):
        low = Level(levels["b"].loss, sgd(rate), reads=("a",), steps=3)
        program = graph({"a": levels["a"], "b": low}, [Edge("a", "b", OneStep(1.0))])
        return program.update(program.init(random.key(0), params()))[0].params["b"][0]

    rates = torch.tensor([0.1, 0.5], dtype=torch.float64)
    assert_close(vmap(trained)(rates), (1 - rates) ** 3)
    assert_close(vmap(grad(trained))(rates), -3 * (1 - rates) ** 2)


def test_a_state_resumes_exactly():
    _, two = quadratic_pair(3)
    state = two.init(random.key(0), params())
    state, _ = two.update(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for _ in range(3):
        state, loaded = two.update(state)[0], two.update(loaded)[0]
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(loaded), strict=True))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_full(precision):
    X = random.normal(random.key(1), (32, 4))
    loss = lambda w, p, x: ((x @ w - 1) ** 2).mean() + p.exp() * (w**2).sum()  # noqa: E731
    top = Level(lambda p, w, x: ((x @ w - 1) ** 2).mean(), sgd(0.1), reads=("w",))
    start = {"p": torch.tensor(-1.0), "w": torch.ones(4, 1)}
    found = {}
    for kind in (None, precision):
        low = Level(loss, sgd(0.1), reads=("p",), steps=60, precision=kind)  # float16 skips some until its scale fits
        two = graph({"p": top, "w": low}, [Edge("p", "w")])
        state, _ = two.update(two.init(random.key(0), start), {"w": X, "p": X})
        found[kind] = state.params["w"]
        assert state.params["w"].dtype == torch.float32
    assert_close(found[precision], found[None], rtol=0.03, atol=0.03)
    assert not torch.equal(found[precision], found[None])


def test_a_gradient_out_of_range_halves_the_scale_and_skips_the_step():
    huge = Level(lambda w, batch: 1e30 * (w**2).sum(), sgd(0.1), precision=torch.float16)
    alone = graph({"w": huge})
    state = alone.init(random.key(0), {"w": torch.full((3,), 1e5)})
    new, _ = alone.update(state)
    assert torch.equal(new.params["w"], state.params["w"])
    assert new.scales["w"].scale == state.scales["w"].scale / 2


def test_parameters_and_batches_belong_to_levels():
    _, two = quadratic_pair()
    with pytest.raises(ValueError, match=r"params must name the levels \['a', 'b'\]; got \['a'\]"):
        two.init(random.key(0), {"a": torch.ones(2)})
    with pytest.raises(TypeError, match="floating-point"):
        two.init(random.key(0), {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)})
    state = two.init(random.key(0), params())
    with pytest.raises(ValueError, match="batch for 'c', which is no level"):
        two.update(state, {"c": torch.ones(1)})
    with pytest.raises(ValueError, match="no level 'c'"):
        two.hypergrad("c")


def test_compiled_updates_are_the_same():
    X = random.normal(random.key(1), (3, 2), dtype=torch.float64)
    levels, _ = quadratic_pair()
    low = Level(lambda b, a, x: ((b - a * x) ** 2).sum(), sgd(0.2, momentum=0.9), reads=("a",), steps=3)
    two = graph({**levels, "b": low}, [Edge("a", "b", Implicit(CG(max_steps=2)))])
    state, batches = two.init(random.key(0), params(1.0)), {"b": PerStep(X)}
    compiled = two.compiled(chunk=2, backend="eager")
    plain, metrics = two.update(state, batches)
    found, seen = compiled(state, batches)
    assert_close(found, plain)
    assert_close(seen["a"], metrics["a"], equal_nan=True)
    assert_close(compiled(found, batches)[0], two.update(plain, batches)[0])
    with pytest.raises(ValueError, match="`chunk` must be at least 1"):
        two.compiled(0)


@pytest.mark.parametrize("start", ["warm", "reset", "rollback"])
@pytest.mark.parametrize("method", [Implicit(), Unrolled()])
def test_a_donated_state_gives_the_same(method, start):
    levels, _ = quadratic_pair(3, start=start)
    two = graph({**levels, "a": Level(levels["a"].loss, adam(0.1), reads=("b",))}, [Edge("a", "b", method)])
    plain = donated = two.init(random.key(0), params())
    donated = tree.map(torch.clone, donated)
    for _ in range(3):
        plain, donated = two.update(plain)[0], two.update(donated, donate=True)[0]
        assert_close(donated, plain)


def test_a_donated_state_is_written_over():
    _, two = quadratic_pair(3)
    state = two.init(random.key(0), params())
    new, _ = two.update(state, donate=True)
    assert new.params["b"].data_ptr() == state.params["b"].data_ptr()


def test_memory_that_levels_share_is_not_donated():
    """Each level alone owns its tensors here, so its own step cannot see it."""
    _, two = quadratic_pair(3)
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for shared in ({"a": x, "b": x}, {"a": x[:2], "b": x[1:]}):
        with pytest.raises(ValueError, match="share no memory"):
            two.update(two.init(random.key(0), shared), donate=True)
    apart = two.init(random.key(0), {"a": x[:1], "b": x[1:2]})
    two.update(apart, {"b": x[2:]}, donate=True)
    with pytest.raises(ValueError, match="share no memory"):
        two.update(two.init(random.key(0), {"a": x[:1], "b": x[1:2]}), {"b": x}, donate=True)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda b, a, batch: (b - a) ** 2, r"shape \(2,\) of torch.float64"),
        (lambda b, a, batch: 1.0, "float"),
        (lambda b, a, batch: (b > a).sum(), r"shape \(\) of torch.int64"),
        (lambda b, a, batch: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_is_named(loss, found, accumulate):
    levels, _ = quadratic_pair()
    low = Level(loss, sgd(0.5), reads=("a",), accumulate=accumulate)
    two = graph({**levels, "b": low}, [Edge("a", "b", OneStep(0.5))])
    state = two.init(random.key(0), params())
    for call in (two.update, two.hypergrad("a")):
        with pytest.raises(TypeError, match=f"loss of level 'b' must return a 0-d floating-point .* got {found}"):
            call(state)


@pytest.mark.parametrize("project", [lambda b: b[:1], lambda b: b.float(), lambda b: None])
def test_projections_keep_shapes(project):
    _, two = quadratic_pair(1, project=project)
    with pytest.raises((TypeError, ValueError), match="projection of level 'b'"):
        two.update(two.init(random.key(0), params()))


def test_states_and_batches_are_those_of_the_program():
    _, two = quadratic_pair()
    state = two.init(random.key(0), params())
    alone = graph({"w": Level(lambda w, batch: (w**2).sum(), sgd(0.1))})
    for call in (two.update, two.hypergrad("a"), two.compiled(backend="eager")):
        with pytest.raises(TypeError, match="state must be a GraphState"):
            call(state.params)
        with pytest.raises(ValueError, match=r"state is of another program: \['w'\], not \['a', 'b'\]"):
            call(alone.init(random.key(0), {"w": torch.ones(2)}))
        for batches in (torch.ones(2), [torch.ones(2)]):
            with pytest.raises(TypeError, match="batches must be a dict from levels"):
                call(state, batches)


def test_a_program_serves_all_sizes():
    levels, _ = quadratic_pair(3)
    two = graph(levels, [Edge("a", "b", OneStep(0.5))])
    compiled = two.compiled(backend="eager")
    for size in (2, 5, 1):
        state = two.init(random.key(0), {"a": torch.ones(size), "b": torch.full((size,), 0.3)})
        assert_close(compiled(state)[0], two.update(state)[0])


def test_a_compiled_program_has_any_number_of_pieces():
    loss = lambda w, *rest: (w**2).sum() + sum((w * r).sum() for r in rest[:-1])  # noqa: E731
    reads = {"a": ("b",), "b": ("a", "c"), "c": ("b", "d"), "d": ("c", "e"), "e": ("d",)}
    levels = {name: Level(loss, sgd(0.1), reads=read, steps=3) for name, read in reads.items()}
    chain = graph(levels, [Edge(u, v, Detached()) for u, v in itertools.pairwise(reads)])
    state = chain.init(random.key(0), {name: torch.ones(2) for name in reads})
    assert_close(chain.compiled(2, backend="eager")(state)[0], chain.update(state)[0])


@pytest.mark.parametrize("optimizer", [sgd(0.2), sgd(0.2, momentum=0.9), adam(0.1)], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("where", ["warm", "reset", "rollback"])
def test_a_block_of_steps_is_that_of_compiled_ones(optimizer, where):
    """The lowest level's blocks begin anew within an update."""
    levels = {
        "a": Level(lambda a, b, batch: ((a - b) ** 2).sum(), sgd(0.1), reads=("b",)),
        "b": Level(lambda b, a, c, batch: ((b - a - c) ** 2).sum(), sgd(0.1), reads=("a", "c"), steps=2),
        "c": Level(
            lambda c, b, x: (torch.tanh(c - b * x) ** 2 + c**2).sum(), optimizer, reads=("b",), steps=5, start=where
        ),
    }
    three = graph(levels, [Edge("a", "b", Detached()), Edge("b", "c", Detached())])
    at = {name: torch.linspace(0.5, 1.5, 3, dtype=torch.float64) + i for i, name in enumerate("abc")}
    state, batches = three.init(random.key(0), at), {"c": torch.tensor(0.5, dtype=torch.float64)}
    kept, compiled = tree.map(torch.clone, state), three.compiled(1, backend="eager")
    found, _ = three.update(three.update(state, batches)[0], batches)
    expected, _ = compiled(compiled(state, batches)[0], batches)
    assert_close((found.params, found.optimizers), (expected.params, expected.optimizers), rtol=1e-12, atol=1e-12)
    assert_close(state, kept, rtol=0, atol=0)
    assert (found.params["b"] - state.params["b"]).abs().min() > 1e-3


def test_what_a_loss_captures_is_differentiated_through_a_block():
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    one = graph({"w": Level(lambda w, batch: (scale * w**2).sum(), sgd(0.1, momentum=0.5), steps=6)})
    state = one.init(random.key(0), {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)})
    found = torch.autograd.grad(one.update(state)[0].params["w"].sum(), scale)[0]
    w, trace = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.0
    for _ in range(6):
        trace = 0.5 * trace + 2 * scale * w
        w = w - 0.1 * trace
    assert_close(found, torch.autograd.grad(w.sum(), scale)[0])


def test_what_goes_wrong_in_a_loss_names_its_level():
    one = graph({"w": Level(lambda w, batch: ((w - batch["x"]) ** 2).sum(), sgd(0.1))})
    state = one.init(random.key(0), {"w": torch.ones(2)})
    with pytest.raises(TypeError, match="not subscriptable") as caught:
        one.update(state)
    assert caught.value.__notes__ == [
        "This is the loss of level 'w', called as (own, *reads, batch) with (Tensor, NoneType)."
    ]
    assert repr(one) == "Graph(w: 1)"


def test_modules_are_no_trees_and_no_losses():
    net = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match="loss is a Linear, a module"):
        Level(net, sgd(0.1))
    one = graph({"w": Level(lambda w, batch: (w["weight"] ** 2).sum(), sgd(0.1))})
    with pytest.raises(TypeError, match="is a Linear, a module: give the parameters"):
        one.init(random.key(0), {"w": net})
    with pytest.raises(TypeError, match=r"write Implicit\(CG\("):
        Edge("a", "b", CG(max_steps=3))
