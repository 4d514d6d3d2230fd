"""What every method promises."""

import dataclasses
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from diffopt import random, tree
from diffopt.multilevel.single_loop import BilevelProblem, draw, run
from multilevel.single_loop.methods import METHODS, assert_close, drawn, moved, small
from multilevel.single_loop.quadratic_benchmark import F64, loss

pytestmark = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_vmap_over_seeds_is_the_loop(method):
    made, keys = small(), random.split(random.key(2), 3)
    start = method.init(made.problem, made.z, made.x)

    def after(key):
        return run(method, made.problem, start, key, 3, batch_size=4)

    lanes = [after(key) for key in keys]
    assert_close(vmap(after)(keys), tree.map(lambda *leaves: torch.stack(leaves), *lanes))
    assert not torch.equal(lanes[0].x, lanes[1].x)


def test_vmap_over_starts_and_step_sizes_is_the_loop(method):
    made = small()
    xs, sizes = made.x + torch.tensor([[0.0], [1.0]], dtype=F64), torch.tensor([0.1, 0.2], dtype=F64)

    def after(x, size):
        sized = dataclasses.replace(method, outer_step_size=size)
        return run(sized, made.problem, sized.init(made.problem, made.z, x), random.key(0), 2, batch_size=4)

    lanes = [after(x, size) for x, size in zip(xs, sizes, strict=True)]
    assert_close(vmap(after)(xs, sizes), tree.map(lambda *leaves: torch.stack(leaves), *lanes))


def test_a_saved_run_goes_on_exactly(method):
    made, key = small(), random.key(4)
    start, file = method.init(made.problem, made.z, made.x), io.BytesIO()
    whole = run(method, made.problem, start, key, 5, batch_size=4)
    torch.save(tuple(run(method, made.problem, start, key, 2, batch_size=4)), file)
    file.seek(0)
    resumed = run(method, made.problem, type(start)(*torch.load(file)), key, 3, batch_size=4)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(whole), tree.leaves(resumed), strict=True))
    assert whole.count == 5


def test_states_hold_tensors_and_steps_leave_them_as_they_were(method):
    state = moved(method, small())
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(state))
    before = tree.map(torch.clone, state)
    after = method.step(small().problem, state, *drawn(method, small()))
    assert_close(state, before, tol=0.0)
    assert tree.flatten(after)[1] == tree.flatten(state)[1]
    assert [leaf.dtype for leaf in tree.leaves(after)] == [leaf.dtype for leaf in tree.leaves(state)]


def test_trees_step_as_vectors_do(method):
    made = small()
    problem = BilevelProblem(
        lambda z, x, batch: loss(torch.cat([z["a"], z["b"].reshape(-1)]), x[0], batch),
        lambda z, x, batch: loss(torch.cat([z["a"], z["b"].reshape(-1)]), x[0], batch),
        made.problem.inner_data,
        made.problem.outer_data,
    )
    z = {"a": made.z[:1], "b": made.z[1:].reshape(2, 1)}
    vectors = run(method, made.problem, method.init(made.problem, made.z, made.x), random.key(0), 3, batch_size=4)
    trees = run(method, problem, method.init(problem, z, (made.x,)), random.key(0), 3, batch_size=4)
    assert_close(torch.cat([trees.z["a"], trees.z["b"].reshape(-1)]), vectors.z)
    assert_close(trees.x[0], vectors.x)


def test_schedules_are_read_at_the_step_count(method):
    made = small()
    sized = dataclasses.replace(method, outer_step_size=lambda count: 0.2 / (1 + count.double()))
    state = moved(method, made)
    plain, scheduled = (m.step(made.problem, state, *drawn(method, made)) for m in (method, sized))
    assert_close(scheduled.x - state.x, (plain.x - state.x) / 3)


def test_step_sizes_carry_gradient(method):
    made = small()

    def reached(sizes):
        sized = dataclasses.replace(method, inner_step_size=sizes[0], outer_step_size=sizes[1])
        state = sized.init(made.problem, made.z, made.x)
        return made.gradient(run(sized, made.problem, state, random.key(0), 3, batch_size=4).x).square().sum()

    at, step = torch.tensor([0.3, 0.2], dtype=F64), 1e-5
    slope = torch.func.grad(reached)(at)
    units = step * torch.eye(2, dtype=F64)
    differences = torch.stack([(reached(at + e) - reached(at - e)) / (2 * step) for e in units])
    assert_close(slope, differences, tol=1e-6)  # central differences: an error of step^2 and of eps / step
    leaf = at.clone().requires_grad_()
    reached(leaf).backward()
    assert_close(leaf.grad, slope)


def test_one_batch_serves_in_place_of_all(method):
    made = small()
    inner, outer = torch.tensor([1, 8, 20]), torch.tensor([4, 5])
    state = moved(method, made)
    rows = method.step(made.problem, state, inner.expand(method.draws.inner, -1), outer.expand(method.draws.outer, -1))
    assert_close(method.step(made.problem, state, inner, outer), rows, tol=0.0)


@settings(max_examples=5)
@given(order=st.permutations(range(6)))
def test_the_order_of_a_batch_does_not_matter(method, order):
    made, state = small(), moved(method, small(), steps=1)
    batch = torch.tensor([0, 3, 9, 9, 14, 23])
    first = method.step(made.problem, state, batch, batch)
    assert_close(method.step(made.problem, state, batch[list(order)], batch[list(order)]), first)


def test_bad_batches_raise(method):
    made, state = small(), moved(method, small(), steps=0)
    inner, outer = drawn(method, made)
    for batch in (None, [0, 1], torch.tensor([0.5]), torch.tensor([True])):
        with pytest.raises(TypeError, match="`inner_batch` must be an int64 tensor of indices"):
            method.step(made.problem, state, batch, outer)
    wrong = (torch.tensor(3), inner[:0], torch.zeros(9, 4, dtype=torch.int64), inner[None])
    for batch in wrong:
        with pytest.raises(ValueError, match="`inner_batch` must have shape"):
            method.step(made.problem, state, batch, outer)
    for bad in (-1, 24):
        with pytest.raises(ValueError, match="`outer_batch` must hold indices from 0 to 23"):
            method.step(made.problem, state, inner, torch.tensor([0, bad]))
        with pytest.raises(ValueError, match="`inner_batch` must hold indices from 0 to 23"):
            vmap(lambda batch, bad: method.step(made.problem, state, batch, outer))(
                torch.tensor([[0, 1], [2, bad]]), torch.tensor([0, 1])
            )


def test_bad_starts_raise(method):
    made = small()
    with pytest.raises(TypeError, match=r"`z` must be a floating-point tensor; got torch\.int64"):
        method.init(made.problem, torch.tensor([1, 2, 3]), made.x)
    with pytest.raises(TypeError, match=r"`x` must be a floating-point tensor; got torch\.int64"):
        method.init(made.problem, made.z, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="`x` must have at least one element"):
        method.init(made.problem, made.z, ())
    with pytest.raises(TypeError, match="`problem` must be a BilevelProblem"):
        method.init(loss, made.z, made.x)
    with pytest.raises(TypeError, match=r"`state` must be a .*State"):
        method.step(made.problem, (made.z, made.x), *drawn(method, made))


def test_bad_step_sizes_raise(method):
    for name in ("inner_step_size", "outer_step_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be above 0.0; got -0.1"):
            dataclasses.replace(method, **{name: -0.1})
        with pytest.raises(TypeError, match=f"`{name}` must be a number or a 0-d tensor"):
            dataclasses.replace(method, **{name: "large"})
        with pytest.raises(ValueError, match=f"`{name}` must be a number or a 0-d tensor"):
            dataclasses.replace(method, **{name: torch.ones(2)})
    made = small()
    vector = dataclasses.replace(method, outer_step_size=lambda count: torch.ones(2))
    with pytest.raises(ValueError, match="`outer_step_size` must be a number or a 0-d tensor"):
        vector.step(made.problem, method.init(made.problem, made.z, made.x), *drawn(method, made))


def test_draws_are_batches_of_samples(method):
    inner, outer = draw(method, small().problem, random.key(0), 500)
    assert inner.shape == (method.draws.inner, 500)
    assert outer.shape == (method.draws.outer, 500)
    assert inner.unique().tolist() == list(range(24)) == outer.unique().tolist()
