import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.func import grad, hessian, jacfwd, vmap

import diffopt
from diffopt.meta import task_batch, task_mean
from meta.problems import START, A, assert_trees_close, f64, quadratic, quadratic_tasks


def of_task(w, task):
    return {"loss": quadratic(w, task["centre"]) * task["weight"], "end": w - task["centre"]}


def tasks_of(count):
    return {"centre": quadratic_tasks(count)[0], "weight": torch.arange(1, count + 1, dtype=torch.float64)}


@hypothesis.settings(max_examples=25)
@hypothesis.given(count=st.integers(1, 7), chunk=st.integers(1, 8))
def test_chunks_are_the_whole_and_the_loop(count, chunk):
    tasks = tasks_of(count)
    loop = [of_task(START, {k: v[i] for k, v in tasks.items()}) for i in range(count)]
    for reduce in (task_mean, None):
        got = task_batch(of_task, in_dims=(None, 0), chunk_size=chunk, reduce=reduce)(START, tasks)
        want = {k: torch.stack([row[k] for row in loop]) for k in loop[0]}
        assert_trees_close(got, want if reduce is None else task_mean(want))
    scalar = lambda w, t, chunk: task_batch(  # noqa: E731
        lambda w, t: of_task(w, t)["loss"], in_dims=(None, 0), chunk_size=chunk
    )(w, t)
    for take in (grad, diffopt.grad):
        got, want = (take(scalar, argnums=(0, 1))(START, tasks, c) for c in (chunk, None))
        assert_trees_close(got, want)


def test_chunks_compose_with_other_transforms():
    tasks, scale = tasks_of(5), f64(1.3)
    fn = lambda s: lambda w, t: (s * of_task(w, t)["loss"]).cosh()  # noqa: E731
    build = lambda chunk: lambda w, s: task_batch(fn(s), in_dims=(None, 0), chunk_size=chunk)(w, tasks)  # noqa: E731
    w = 0.3 * START
    for take in (jacfwd, hessian, lambda f: grad(f, argnums=1)):
        torch.testing.assert_close(take(build(2))(w, scale), take(build(None))(w, scale))
    starts = torch.stack([w, -w])
    got, want = (vmap(grad(build(c)), in_dims=(0, None))(starts, scale) for c in (2, None))
    torch.testing.assert_close(got, want)
    leaf = scale.clone().requires_grad_()
    build(2)(w, leaf).backward()
    torch.testing.assert_close(leaf.grad, grad(build(None), argnums=1)(w, scale))


def test_chunks_bound_the_memory_of_the_backward_pass():
    """The bytes kept for the backward pass, of 16 tasks with 20 layers each."""

    def deep(w, x):
        for _ in range(20):
            x = torch.tanh(w * x)
        return x.sum()

    def kept(chunk):
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        w = f64(0.7).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            task_batch(deep, in_dims=(None, 0), chunk_size=chunk)(w, torch.ones(16, 50, dtype=torch.float64))
        return total

    assert kept(4) < 0.1 * kept(None)


def test_dimensions_and_shared_arguments():
    centres, starts = quadratic_tasks(4)[0], torch.stack([START * i for i in range(1, 5)])
    each = torch.stack([quadratic(w, c) for w, c in zip(starts, centres, strict=True)])
    none = {"reduce": None}
    torch.testing.assert_close(task_batch(quadratic, **none)(starts, centres), each)
    for chunk in (None, 3):
        got = task_batch(quadratic, in_dims=(1, -1), chunk_size=chunk, **none)(starts.T, centres.T)
        torch.testing.assert_close(got, each)
    named = task_batch(lambda w, task: task["scale"] * quadratic(w, task["c"]), in_dims=(0, 0), **none)
    torch.testing.assert_close(named(starts, {"c": centres, "scale": 2, "name": None}), 2 * each)


def test_reduce_sees_each_task_and_the_mean_keeps_counts():
    sums = lambda values: (values.sum(), values.shape[0])  # noqa: E731
    total, count = task_batch(quadratic, in_dims=(None, 0), reduce=sums)(START, quadratic_tasks(4)[0])
    assert count == 4
    torch.testing.assert_close(total / 4, task_batch(quadratic, in_dims=(None, 0))(START, quadratic_tasks(4)[0]))
    means = task_mean({"mask": torch.tensor([True, False]), "n": torch.tensor([3, 5]), "x": f64([1.0, 2.0])})
    assert means["mask"].dtype == torch.bool
    assert means["n"] == 5
    assert means["x"] == 1.5


def test_bad_arguments_raise():
    centres = quadratic_tasks(4)[0]
    batched = task_batch(lambda w, t: quadratic(w, t["a"]) + t["b"].sum(), in_dims=(None, 0))
    with pytest.raises(ValueError, match=r"`args\[1\]\['a'\]` has 4, `args\[1\]\['b'\]` has 3 in dimension 0"):
        batched(START, {"a": centres, "b": centres[:3]})
    with pytest.raises(ValueError, match=r"`args\[1\]\['b'\]` must have tasks in dimension 0; got shape \(\)"):
        batched(START, {"a": centres, "b": f64(1.0)})
    with pytest.raises(ValueError, match=r"empty: `args\[1\]\['a'\]` has none"):
        batched(START, {"a": centres[:0], "b": centres[:0]})
    with pytest.raises(ValueError, match="an entry for each of 2 arguments"):
        task_batch(quadratic, in_dims=(0,))(START, centres)
    with pytest.raises(ValueError, match="ints and None"):
        task_batch(quadratic, in_dims=(None, "0"))(START, centres)
    with pytest.raises(ValueError, match="runs over tasks"):
        task_batch(quadratic, in_dims=(None, None))(START, A[0])
    with pytest.raises(ValueError, match="chunk_size"):
        task_batch(quadratic, chunk_size=0)
    with pytest.raises(TypeError, match="`reduce` must be a function"):
        task_batch(quadratic, reduce="mean")
    with pytest.raises(TypeError, match="must return tensors; found float"):
        task_batch(lambda w, c: 1.0, in_dims=(None, 0))(START, centres)


def test_draws_without_a_key_say_what_to_do():
    with pytest.raises(RuntimeError, match="draw from a key"):
        task_batch(lambda x: torch.nn.functional.dropout(x).sum())(torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        task_batch(lambda x: x @ torch.ones(3))(torch.ones(3, 2))
