"""What every strategy promises: purity, trees, resuming, vmap, failures, bounds, derivatives, errors."""

import io

import pytest
import torch
from torch.func import vmap

import diffopt
from diffopt import random, tree
from diffopt.zero_order import make_generation, run
from zero_order.strategies.cases import RANKED, STRATEGIES, sphere, start

NAMES = list(STRATEGIES)


def flat(value):
    return tree.ravel(value)[0]


def tensors(state):
    """All numbers of a state, as one float64 vector."""
    return torch.cat([leaf.reshape(-1).double() for leaf in tree.leaves(state)])


def advanced(strategy, state, key, generations, f=sphere):
    advance = make_generation(strategy, f)
    for _ in range(generations):
        state, _ = advance(key, state)
    return state


@pytest.mark.parametrize("name", NAMES)
def test_states_are_named_tuples_of_tensors(name):
    state = advanced(STRATEGIES[name](), STRATEGIES[name]().init(start()), random.key(0), 1)
    assert state._fields[:4] == ("mean", "best", "best_loss", "generation")
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(state))
    assert None not in tuple(state)
    assert state.generation.dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_population_is_a_tree_with_the_members_first(name, dtype):
    strategy, params = STRATEGIES[name](), start(dtype)
    population = strategy.ask(random.key(0), strategy.init(params))
    for leaf, like in zip(tree.leaves(population), tree.leaves(params), strict=True):
        assert leaf.shape == (8, *like.shape)
        assert leaf.dtype == dtype
    state = advanced(strategy, strategy.init(params), random.key(0), 2)
    tree.check_like(state.mean, params)
    tree.check_like(state.best, params)


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_is_searched_like_its_vector(name):
    params = start()
    vector, unravel = tree.ravel(params)
    one = run(STRATEGIES[name](), sphere, params, random.key(1), 5)
    other = run(STRATEGIES[name](), lambda x: sphere(unravel(x)), vector, random.key(1), 5)
    torch.testing.assert_close(tensors(one.state), tensors(other.state), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_mutated(name):
    strategy = STRATEGIES[name]()
    state = advanced(strategy, strategy.init(start()), random.key(0), 1)
    before = tensors(state).clone()
    population = strategy.ask(random.key(3), state)
    members = tensors(population).clone()
    losses = torch.arange(8.0, dtype=torch.float64) + 1
    strategy.tell(population, losses, state)
    assert torch.equal(tensors(state), before)
    assert torch.equal(tensors(population), members)
    assert torch.equal(losses, torch.arange(8.0, dtype=torch.float64) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_run_resumes_bit_for_bit(name):
    key = random.key(7)
    whole = run(STRATEGIES[name](), sphere, start(), key, 6)
    again = run(STRATEGIES[name](), sphere, start(), key, 6)
    file = io.BytesIO()
    torch.save(run(STRATEGIES[name](), sphere, start(), key, 2).state, file)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    rest = run(STRATEGIES[name](), sphere, start(), key, 4, state=state)
    assert torch.equal(tensors(whole.state), tensors(again.state))
    assert torch.equal(tensors(whole.state), tensors(rest.state))
    assert not torch.equal(tensors(whole.state), tensors(run(STRATEGIES[name](), sphere, start(), key + 1, 6).state))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_runs_is_the_loop(name):
    strategy = STRATEGIES[name]()
    starts = tree.map(lambda x: torch.stack([x, 2 * x, x - 0.3]), start())
    keys = random.split(random.key(5), 3)
    states = vmap(strategy.init)(starts)
    advance = make_generation(strategy, sphere)
    for _ in range(4):
        states, losses = vmap(advance)(keys, states)
    assert losses.shape == (3, 8)
    for i in range(3):
        one = advanced(strategy, strategy.init(tree.map(lambda x, i=i: x[i], starts)), keys[i], 4)
        torch.testing.assert_close(
            tensors(tree.map(lambda x, i=i: x[i], states)), tensors(one), rtol=1e-9, atol=1e-9
        )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_step_sizes_and_whole_runs(name):
    sigmas, key = torch.tensor([0.1, 0.4], dtype=torch.float64), random.key(2)
    found = vmap(lambda sigma: run(STRATEGIES[name](sigma), sphere, start(), key, 3, history=True))(sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        one = run(STRATEGIES[name](sigma), sphere, start(), key, 3, history=True)
        torch.testing.assert_close(found.loss[i], one.loss)
        torch.testing.assert_close(found.history.mean[i], one.history.mean)


@pytest.mark.parametrize("name", NAMES)
def test_the_best_member_is_remembered(name):
    strategy, seen = STRATEGIES[name](), []

    def f(x):
        loss = sphere(x)
        seen.append((loss.item(), flat(x)))
        return loss

    found = run(strategy, f, start(), random.key(0), 6, batching="sequential", history=True)
    loss, member = min(seen, key=lambda pair: pair[0])
    assert float(found.loss) == loss
    assert torch.equal(flat(found.params), member)
    assert torch.equal(found.history.best, found.history.lowest.cummin(0).values)


@pytest.mark.parametrize("name", NAMES)
def test_failures_are_survived(name):
    def f(x):
        loss = sphere(x)
        loss = torch.where(x["b"] < -1.0, torch.nan, loss)
        return torch.where(x["b"] > -0.8, torch.inf, torch.where(x["w"][0, 0] > 0.9, -torch.inf, loss))

    found = run(STRATEGIES[name](size=16), f, start(), random.key(0), 10)
    assert torch.isfinite(tensors(found.state)).all()
    assert found.loss > 0
    assert -1.0 <= found.params["b"] <= -0.8


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_failures_leaves_numbers(name):
    found = run(STRATEGIES[name](), lambda x: sphere(x) * torch.nan, start(), random.key(0), 5)
    assert found.loss == torch.inf
    assert torch.equal(flat(found.params), flat(start()))
    assert torch.isfinite(flat(found.state.mean)).all()


@pytest.mark.parametrize("name", ["open_es", "plain open_es", "pgpe", "snes", "xnes", "ars"])
def test_a_flat_function_gives_no_direction(name):
    found = run(STRATEGIES[name](), lambda x: 0 * sphere(x) + 1, start(), random.key(0), 3)
    torch.testing.assert_close(flat(found.state.mean), flat(start()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_members_is_of_no_account(name):
    strategy = STRATEGIES[name]()
    state = advanced(strategy, strategy.init(flat(start())), random.key(0), 2)
    population = strategy.ask(random.key(3), state)
    losses = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0, 1.0, 7.0, 4.0], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    order = torch.cat([order, order + 4])  # pairs stay pairs
    one, other = strategy.tell(population, losses, state), strategy.tell(population[order], losses[order], state)
    torch.testing.assert_close(
        tensors(one._replace(best=state.best)), tensors(other._replace(best=state.best)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", RANKED)
def test_an_increasing_function_of_f_changes_nothing(name):
    one = run(STRATEGIES[name](), sphere, start(), random.key(4), 12)
    other = run(STRATEGIES[name](), lambda x: sphere(x).exp() - 7, start(), random.key(4), 12)
    rest = {"best_loss": torch.zeros(())}
    assert torch.equal(tensors(one.state._replace(**rest)), tensors(other.state._replace(**rest)))


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_and_an_optimum_on_them_is_found(name):
    lower = {"w": torch.tensor([[0.5, -1.0], [0.2, -1.0]], dtype=torch.float64), "b": torch.tensor(-1.0).double()}

    def f(x):
        inside = [((leaf >= low) & (leaf <= 2.0)).all() for leaf, low in zip(x.values(), lower.values(), strict=True)]
        return torch.where(inside[0] & inside[1], sphere(x), -1e9)

    found = run(STRATEGIES[name](size=16), f, start(), random.key(0), 60, bounds=(lower, 2.0))
    assert 0.29 <= found.loss < 0.29 + 0.2  # 0.5^2 + 0.2^2, from 1.45
    torch.testing.assert_close(f(found.params), found.loss)


@pytest.mark.parametrize("name", NAMES)
def test_step_sizes_carry_gradient(name):
    losses = torch.tensor([3.0, 1.0, 2.5, 2.0, 5.0, 1.5, 7.0, 4.0], dtype=torch.float64)
    x = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)

    def searched(sigma):
        strategy = STRATEGIES[name](sigma)
        state = strategy.init(x)
        state = strategy.tell(strategy.ask(random.key(1), state), losses, state)
        return strategy.ask(random.key(2), state).square().sum() + state.mean.sum()

    sigma = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(searched, (sigma,), fast_mode=True)
    torch.testing.assert_close(torch.func.grad(searched)(sigma), torch.autograd.grad(searched(sigma), sigma)[0])
    assert torch.func.grad(searched)(sigma) != 0


def check_compiled(name, f, x, backend):
    torch.compiler.reset()
    strategy, key = STRATEGIES[name](), random.key(0)
    advance = make_generation(strategy, f)
    compiled = diffopt.compile(advance, backend=backend)
    state, other = (advanced(strategy, strategy.init(x), key, 1) for _ in range(2))  # as all following ones look
    for _ in range(3):
        state, other = advance(key, state)[0], compiled(key, other)[0]
    torch.testing.assert_close(tensors(other), tensors(state), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["open_es", "pgpe", "snes"])
def test_a_generation_compiles(name):
    check_compiled(name, sphere, flat(start()), "eager")  # what it takes in all is in the slow test below


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_generation_of_trees_compiles(name):
    check_compiled(name, sphere, start(), "aot_eager")


@pytest.mark.parametrize("name", NAMES)
def test_losses_leave_no_graph(name):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    params = tree.map(lambda x: x.requires_grad_(), start())
    found = run(STRATEGIES[name](), lambda x: scale * sphere(x), params, random.key(0), 2)
    assert not tensors(found.state).requires_grad
    strategy = STRATEGIES[name]()
    state = strategy.init(start())
    population = strategy.ask(random.key(0), state)
    state = strategy.tell(population, scale * vmap(sphere)(population), state)
    assert not tensors(state).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_floats_of_one_dtype(name):
    strategy = STRATEGIES[name]()
    for bad in (torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="float32 or float64; got"):
            strategy.init(bad)
    with pytest.raises(TypeError, match="one dtype"):
        strategy.init([torch.ones(2), torch.ones(2, dtype=torch.float64)])
    with pytest.raises(ValueError, match="at least one unknown"):
        strategy.init(torch.ones(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 0, -4])
def test_a_population_of_one_is_refused(name, size):
    with pytest.raises(ValueError, match="`population_size` must be at least"):
        STRATEGIES[name](size=size)


@pytest.mark.parametrize("name", NAMES)
def test_a_size_is_an_int(name):
    with pytest.raises(TypeError, match="`population_size` must be an int"):
        STRATEGIES[name](size=8.0)


@pytest.mark.parametrize("name", ["open_es", "pgpe", "ars"])
def test_an_odd_population_has_no_pairs(name):
    with pytest.raises(ValueError, match=r"must be even.*got 7\. Take 6 or 8"):
        STRATEGIES[name](size=7)
    strategy = STRATEGIES[name]()
    state = strategy.init(torch.ones(3))
    with pytest.raises(ValueError, match="must be even"):
        strategy.tell(strategy.ask(random.key(0), state)[:7], torch.ones(7), state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", [0.0, -1.0, torch.tensor(0.0), torch.tensor(-0.5), torch.tensor(float("nan"))])
def test_a_step_size_is_positive(name, sigma):
    with pytest.raises(ValueError, match="`sigma` must be above"):
        STRATEGIES[name](sigma)


@pytest.mark.parametrize("name", NAMES)
def test_what_tell_is_told_has_the_right_shape(name):
    strategy = STRATEGIES[name]()
    state = strategy.init(start())
    population = strategy.ask(random.key(0), state)
    with pytest.raises(ValueError, match=r"one number for each of 8 members, shape \(8,\); got \(8, 1\)"):
        strategy.tell(population, torch.ones(8, 1), state)
    with pytest.raises(TypeError, match="`losses` must be a tensor"):
        strategy.tell(population, [1.0] * 8, state)
    with pytest.raises(TypeError, match="`losses` must be real"):
        strategy.tell(population, torch.ones(8, dtype=torch.complex64), state)
    with pytest.raises(ValueError, match="must have the structure of `params`"):
        strategy.tell(population["w"], torch.ones(8), state)
    with pytest.raises(ValueError, match=r"`population\['w'\]` must have the members first"):
        strategy.tell({**population, "w": population["w"][:4]}, torch.ones(8), state)
    counts = torch.tensor([5, 4, 3, 2, 1, 6, 7, 8])
    assert strategy.tell(population, counts, state).best_loss == 1
