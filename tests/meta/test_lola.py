"""diffopt.meta.lola: gradients through foreseen steps against closed forms and differences of the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from diffopt import random
from diffopt.meta import dice, lola
from diffopt.testing import check_composition, check_hypergradient

F64 = torch.float64
A = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=F64)
B = torch.tensor([[-0.7, 0.4], [1.1, 0.6]], dtype=F64)
X, Y = torch.tensor([0.5, -1.2], dtype=F64), torch.tensor([0.9, 0.4], dtype=F64)


def bilinear(players):
    x, y = players
    return x @ A @ y, x @ B @ y


def smooth(players, weight=0.7):
    """Three players with trees of parameters, each loss in all of them, not convex."""
    x, y, z = players[0]["x"], players[1], players[2][0]
    return (
        torch.sin(x * y.sum()).sum() + weight * (x * z).sum() ** 2,
        torch.cosh(y).sum() * torch.cos(x.sum()) + (y * z.sum()).sin().sum(),
        (z**3).sum() * y[0] + torch.tanh(z * x).sum(),
    )


def three_players():
    return {"x": X}, torch.tensor([0.3, -0.6], dtype=F64), [torch.tensor([0.8, -0.2], dtype=F64)]


def test_a_bilinear_game_has_the_closed_form_and_the_formula_of_the_paper():
    alpha, beta = 0.3, 0.2
    exact = lola(bilinear, (alpha, beta))((X, Y))
    torch.testing.assert_close(exact[0], A @ Y - beta * (A @ B.T + B @ A.T) @ X)
    torch.testing.assert_close(exact[1], B.T @ X - alpha * (B.T @ A + A.T @ B) @ Y)
    taylor = lola(bilinear, (alpha, beta), taylor=True)((X, Y))
    torch.testing.assert_close(taylor[0], A @ Y - beta * B @ A.T @ X)
    torch.testing.assert_close(taylor[1], B.T @ X - alpha * A.T @ B @ Y)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_against_differences_of_the_definition(steps):
    rates = (0.1, 0.2, 0.3)
    players = three_players()
    found = lola(smooth, rates, steps=steps)(players)

    def ahead(i, own):
        now = tuple(own if j == i else p for j, p in enumerate(players))
        for _ in range(steps):
            replaced = lambda p, j, now=now: smooth((*now[:j], p, *now[j + 1 :]))[j]  # noqa: E731
            slopes = [grad(replaced)(now[j], j) for j in range(3)]
            moved = (
                {"x": now[0]["x"] - rates[0] * slopes[0]["x"]},
                now[1] - rates[1] * slopes[1],
                [now[2][0] - rates[2] * slopes[2][0]],
            )
            now = tuple(now[j] if j == i else moved[j] for j in range(3))
        return smooth(now)[i]

    leaves = [lambda v: {"x": v}, lambda v: v, lambda v: [v]]
    for i, (wrap, found_i) in enumerate(zip(leaves, [found[0]["x"], found[1], found[2][0]], strict=True)):
        value = [players[0]["x"], players[1], players[2][0]][i]
        h = 1e-5
        for k, unit in enumerate(torch.eye(2, dtype=F64)):
            difference = (ahead(i, wrap(value + h * unit)) - ahead(i, wrap(value - h * unit))) / (2 * h)
            torch.testing.assert_close(found_i[k], difference, rtol=1e-7, atol=1e-8)


def test_the_first_order_formula_is_what_is_left_of_the_mixed_derivatives():
    players, rates = three_players(), (0.1, 0.2, 0.3)
    found = lola(smooth, rates, taylor=True)(players)[1]

    def loss(i, x, y, z):
        return smooth(({"x": x}, y, [z]))[i]

    point = (players[0]["x"], players[1], players[2][0])
    want = grad(lambda y: loss(1, point[0], y, point[2]))(point[1])
    for j in (0, 2):
        mixed = torch.func.jacrev(grad(lambda *p, j=j: loss(j, *p), argnums=j), argnums=1)(*point)
        want = want - rates[j] * mixed.T @ grad(lambda *p: loss(1, *p), argnums=j)(*point)
    torch.testing.assert_close(found, want)


def test_both_forms_agree_to_first_order_in_the_rate_but_for_the_point():
    """L_1 = x y^2, L_2 = y sin x, linear in y: what the formula leaves out is the step in L_1's slope, y^2."""
    losses = lambda players: (players[0] * players[1] ** 2, players[1] * torch.sin(players[0]))  # noqa: E731
    x, y = X[0], Y[0]
    left_out = [lola(losses, r)((x, y))[0] - lola(losses, r, taylor=True)((x, y))[0] for r in (1e-3, 1e-5)]
    want = -2 * y * torch.sin(x)  # the derivative of L_1's slope y^2 along the step -sin(x) of y
    # up to the next order in the rate, about as large as the rate itself
    torch.testing.assert_close(left_out[1] / 1e-5, want, rtol=1e-4, atol=0)
    torch.testing.assert_close(left_out[0] / 1e-3, want, rtol=1e-2, atol=0)


@given(rate=st.floats(0.01, 0.5), seed=st.integers(0, 100), steps=st.integers(1, 3))
@settings(max_examples=15)
def test_a_rate_of_zero_is_naive_and_vmap_is_the_loop(rate, seed, steps):
    keys = random.split(random.key(seed), 2)
    batch = tuple(random.normal(k, (3, 2), dtype=F64) for k in keys)
    naive = lola(bilinear, 0.0, steps=steps)((X, Y))
    torch.testing.assert_close(naive, (A @ Y, B.T @ X))
    gradients = lola(bilinear, rate, steps=steps)
    mapped = vmap(gradients)(batch)
    looped = [
        torch.stack(rows) for rows in zip(*[gradients((batch[0][i], batch[1][i])) for i in range(3)], strict=True)
    ]
    torch.testing.assert_close(mapped, tuple(looped))


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"taylor": True}])
def test_gradients_carry_derivatives_in_rates_and_arguments(options):
    rate, weight = torch.tensor(0.2, dtype=F64), torch.tensor(0.7, dtype=F64)

    def norm(rate, weight, y):
        players = three_players()
        found = lola(smooth, rate, **options)((players[0], y, players[2]), weight)
        return (found[0]["x"] ** 2).sum() + (found[1] ** 2).sum() + found[2][0].sum()

    check_hypergradient(norm, (rate, weight, three_players()[1]))


def test_gradients_compose():
    def operator(x, y, rate):
        return lola(lambda players: (torch.sin(players[0] @ A @ players[1]), bilinear(players)[1] ** 2), rate)((x, y))

    def reference(x, y, rate):
        first = lambda x, y: torch.sin(x @ A @ y)  # noqa: E731
        second = lambda x, y: (x @ B @ y) ** 2  # noqa: E731
        step_y = lambda x, y: y - rate * 2 * (x @ B @ y) * (B.T @ x)  # noqa: E731
        step_x = lambda x, y: x - rate * torch.cos(x @ A @ y) * (A @ y)  # noqa: E731
        return grad(lambda v: first(v, step_y(v, y)))(x), grad(lambda v: second(step_x(x, v), v))(y)

    cells = ["forward", "grad", "vjp", "jvp", "hessian", "vmap(grad)", "dual_level", "compile"]
    check_composition(operator, (X, Y, torch.tensor(0.3, dtype=F64)), reference, cells=cells)


def sampled_pennies(players, *, key):
    """Both toss a coin; the first pays 1 where they agree and 0.3 where it shows heads, the second the rest."""
    heads = torch.sigmoid(torch.stack([players[0], players[1]]))
    tosses = (random.uniform(key, (10_000, 2), dtype=F64) < heads.detach()).to(F64)
    log_probs = (tosses * heads.log() + (1 - tosses) * (1 - heads).log()).sum(1, keepdim=True)
    agree = (tosses[:, :1] == tosses[:, 1:]).to(F64)
    return dice(log_probs, agree + 0.3 * tosses[:, :1]), dice(log_probs, 1 - agree * tosses[:, 1:])


def expected_pennies(players):
    p, q = torch.sigmoid(players[0]), torch.sigmoid(players[1])
    return p * q + (1 - p) * (1 - q) + 0.3 * p, 1 - p * q


@pytest.mark.parametrize("taylor", [False, True])
def test_a_sampled_game_gives_the_gradients_of_the_expected_one(taylor):
    players = (torch.tensor(0.4, dtype=F64), torch.tensor(-0.3, dtype=F64))
    exact = torch.stack(lola(expected_pennies, 2.0, taylor=taylor)(players))
    gradients = lola(sampled_pennies, 2.0, taylor=taylor)
    sampled = torch.stack([torch.stack(gradients(players, key=random.key(s))) for s in range(20)])
    # the look ahead is a product of estimates, whose noise of 1/10000 biases it less than these errors
    errors = sampled.std(0) / 20**0.5
    assert ((sampled.mean(0) - exact).abs() < 4 * errors).all()
    assert (errors < 5e-3).all()


def test_every_evaluation_gets_a_key_of_its_own():
    seen = []

    def losses(players, *, key):
        seen.append(tuple(key.tolist()))
        return bilinear(players)

    gradients = lola(losses, 0.1, steps=2)
    gradients((X, Y), key=random.key(0))
    assert len(set(seen)) == 6  # three evaluations for each of two players
    again = list(seen)
    seen.clear()
    gradients((X, Y), key=random.key(0))
    assert seen == again


def test_errors_come_early():
    with pytest.raises(TypeError, match="function of the players"):
        lola(3, 0.1)
    with pytest.raises(TypeError, match="learning_rate"):
        lola(bilinear, "fast")
    with pytest.raises(ValueError, match="at least 1"):
        lola(bilinear, 0.1, steps=0)
    with pytest.raises(ValueError, match="taylor=False"):
        lola(bilinear, 0.1, steps=2, taylor=True)
    with pytest.raises(ValueError, match="two players"):
        lola(bilinear, 0.1)((X,))
    with pytest.raises(ValueError, match="two players"):
        lola(bilinear, 0.1)(X)
    with pytest.raises(ValueError, match="each of 2 players"):
        lola(bilinear, (0.1, 0.2, 0.3))((X, Y))
    with pytest.raises(TypeError, match=r"players\[1\]"):
        lola(bilinear, 0.1)((X, torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="one scalar for each"):
        lola(lambda players: bilinear(players)[:1], 0.1)((X, Y))
    with pytest.raises(ValueError, match="one scalar for each of the 2 players; got Tensor"):
        lola(lambda players: bilinear(players)[0], 0.1)((X, Y))
    with pytest.raises(TypeError, match="scalar"):
        lola(lambda players: players, 0.1)((X, Y))
