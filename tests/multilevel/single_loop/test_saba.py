import io
import itertools

import pytest
import torch

from diffopt import random, tree
from diffopt.multilevel.single_loop import SABA, BilevelProblem, draw
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, moved, small

METHOD = METHODS["SABA"]


def rows(made, z, x, v, i, j):
    """What the tables hold for one sample of each problem, by its matrices."""
    one = Matrices(made, torch.tensor([i]), torch.tensor([j]))
    inner = torch.cat([one.inner_z(z, x), one.hessian @ v, one.cross @ v])
    return inner, torch.cat([one.outer_z(z, x), one.outer_x(z, x)])


def tables(made, memory_inner, memory_outer):
    """The tables recomputed from the point at which each sample was last drawn."""
    inner = torch.stack([rows(made, *point, i, 0)[0] for i, point in enumerate(memory_inner)])
    return inner, torch.stack([rows(made, *point, 0, j)[1] for j, point in enumerate(memory_outer)])


@pytest.fixture(scope="module")
def followed():
    """States along a run, and beside each the points at which each sample was last drawn."""
    made = small()
    state = METHOD.init(made.problem, made.z, made.x)
    memory = [[(state.z, state.x, state.v)] * 24 for _ in range(2)]
    path = [(state, [list(m) for m in memory], None)]
    for step in range(6):
        batches = drawn(METHOD, made, step, batch_size=5)
        for points, indices in zip(memory, batches, strict=True):
            for index in indices.reshape(-1).tolist():
                points[index] = (state.z, state.x, state.v)
        state = METHOD.step(made.problem, state, *batches)
        path.append((state, [list(m) for m in memory], batches))
    return made, path


def test_tables_are_a_recomputation_at_the_points_remembered(followed):
    made, path = followed
    for state, memory, _ in path:
        assert_close((state.inner_table, state.outer_table), tables(made, *memory))


def test_the_step_is_its_formula_by_matrices(followed):
    made, path = followed
    for (state, memory, _), (after, _, batches) in itertools.pairwise(path):
        z, x, v = state.z, state.x, state.v
        old, directions = tables(made, *memory), []
        for side, indices in enumerate(batches):
            gaps = [rows(made, z, x, v, k, k)[side] - old[side][k] for k in indices.reshape(-1).tolist()]
            directions.append(torch.stack(gaps).mean(0) + old[side].mean(0))
        slope, hessian_v, cross_v = directions[0].split([3, 3, 2])
        outer_z, outer_x = directions[1].split([3, 2])
        assert_close((z - after.z) / 0.3, slope)
        assert_close((v - after.v) / 0.25, hessian_v + outer_z)
        assert_close((x - after.x) / 0.2, cross_v + outer_x)


def test_with_all_samples_it_is_soba():
    made, everyone = small(), torch.arange(24)
    states = {}
    for name in ("SOBA", "SABA"):
        state = METHODS[name].init(made.problem, made.z, made.x)
        for _ in range(3):
            state = METHODS[name].step(made.problem, state, everyone, everyone)
        states[name] = (state.z, state.x, state.v)
    assert_close(states["SABA"], states["SOBA"])


def test_directions_are_unbiased():
    made, state = small(), moved(METHOD, small())
    after = [METHOD.step(made.problem, state, torch.tensor([k]), torch.tensor([k])) for k in range(24)]
    mean = tree.map(lambda *leaves: torch.stack(leaves).mean(0), *[(s.z, s.x, s.v) for s in after])
    soba, everyone = METHODS["SOBA"], torch.arange(24)
    whole = soba.init(made.problem, state.z, state.x)._replace(v=state.v)
    whole = soba.step(made.problem, whole, everyone, everyone)
    assert_close(mean, (whole.z, whole.x, whole.v))


def test_chunks_make_the_same_tables():
    made = small()
    whole, chunked = (SABA(0.3, 0.2, chunk_size=c).init(made.problem, made.z, made.x) for c in (None, 7))
    assert_close(chunked, whole)


def test_blocks_of_samples_are_samples():
    made = small()
    blocks = BilevelProblem(
        lambda z, x, batch: made.problem.inner(z, x, tree.map(lambda leaf: leaf.flatten(0, 1), batch)),
        lambda z, x, batch: made.problem.outer(z, x, tree.map(lambda leaf: leaf.flatten(0, 1), batch)),
        *(
            tree.map(lambda leaf: leaf.unflatten(0, (6, 4)), data)
            for data in (made.problem.inner_data, made.problem.outer_data)
        ),
    )
    single, start = METHOD.init(made.problem, made.z, made.x), METHOD.init(blocks, made.z, made.x)
    assert_close(start.inner_table, single.inner_table.unflatten(0, (6, 4)).mean(1))
    after = METHOD.step(blocks, start, torch.tensor([2]), torch.tensor([5]))
    batches = torch.arange(8, 12), torch.arange(20, 24)
    expected = METHOD.step(made.problem, single, *batches)  # the same change: from equal points, the same directions
    assert_close((after.z, after.x, after.v), (expected.z, expected.x, expected.v))


def test_a_saved_state_holds_the_tables():
    made, file = small(), io.BytesIO()
    state = moved(METHOD, made)
    torch.save(state._asdict(), file)
    file.seek(0)
    loaded = type(state)(**torch.load(file))
    batches = draw(METHOD, made.problem, random.key(0), 4)
    first, second = (METHOD.step(made.problem, s, *batches) for s in (state, loaded))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_sum_in_place_of_a_mean_and_other_tables_raise():
    made = small()
    problem = made.problem
    summed = BilevelProblem(
        lambda z, x, batch: problem.inner(z, x, batch) * batch["z"].shape[0],
        problem.outer,
        problem.inner_data,
        problem.outer_data,
    )
    with pytest.raises(ValueError, match="`inner` must be the mean over the samples"):
        METHOD.init(summed, made.z, made.x)
    state, batches = moved(METHOD, made), drawn(METHOD, made)
    other = state._replace(outer_table=state.outer_table[:8])
    with pytest.raises(ValueError, match=r"a row for each sample, \(24, 24\); got \(24, 8\)"):
        METHOD.step(problem, other, *batches)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1"):
        SABA(0.3, 0.2, chunk_size=0)
