"""diffopt.optimizers.interop.slots: parameters that step apart, and states that keep parameters."""

import pytest
import torch

from diffopt import random, tree
from diffopt.optimizers import adam, prodigy, sam, sgd, to_torch
from diffopt.transforms import (
    GradientTransformation,
    add_noise,
    chain,
    clip_by_global_norm,
    flatten,
    masked,
    scale,
    step,
)
from optimizers.torch_problems import assert_same, parameters, problem, train


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (lambda learning_rate: chain(clip_by_global_norm(0.1), adam(learning_rate)), {"lr": 0.05}),
        (lambda learning_rate: chain(add_noise(random.key(0), 0.1), adam(learning_rate)), {"lr": 0.05}),
        (lambda learning_rate: flatten(adam(learning_rate)), {"lr": 0.05}),
        (lambda learning_rate: sam(adam(learning_rate)), {"lr": 0.05}),
        (prodigy, {}),
    ],
)
def test_what_is_computed_over_all_cannot_step_apart(factory, options):
    params = parameters()
    optimizer = to_torch(factory, params, **options)

    def closure():
        problem(params).backward()
        params[0].grad = None

    optimizer.step(closure)
    problem(params).backward()
    with pytest.raises(ValueError, match="gradients at different steps"):
        optimizer.step()


def test_parameters_that_could_step_apart_are_checked_again():
    def clip(kind):
        return masked(clip_by_global_norm(0.1), lambda params: tree.map(lambda p: p.ndim == kind, params))

    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(2,), (2,), ()]]
    optimizer = to_torch(chain(clip(1), adam(0.1)), params)

    def run(*silent):
        for i, p in enumerate(params):
            p.grad = None if i in silent else torch.ones_like(p)
        optimizer.step()

    for silent in [(), (2,), (), (0, 1), ()]:
        run(*silent)
    run(0)
    with pytest.raises(ValueError, match="gradients at different steps"):
        run()


def test_clipping_is_over_the_parameters_with_gradients():
    params, (_, *others) = parameters(), parameters()
    optimizer = to_torch(chain(clip_by_global_norm(0.1), adam(0.05)), params)
    train(optimizer, params, 3, silent=lambda i, j: j == 0)
    reference = torch.optim.Adam(others, lr=0.05)
    for _ in range(3):
        reference.zero_grad()
        problem([params[0].detach(), *others]).backward()
        torch.nn.utils.clip_grad_norm_(others, 0.1)
        reference.step()
    assert_same(params[1:], others, 1e-4)  # torch adds 1e-6 to the norm


def test_states_do_not_alias_gradients_or_parameters():
    def remember_init(params):
        return (params, params)

    def remember(updates, state, params=None, **extra):
        return tree.map(lambda g: -0.1 * g, updates), (updates, params)

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = to_torch(GradientTransformation(remember_init, remember), [weight])
    for value in (3.0, 5.0):
        weight.grad = torch.tensor([value])
        before = weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        kept = list(optimizer.state[weight].values())
        assert [x.item() for x in kept] == [value, before.item()]


@pytest.mark.parametrize("last", [adam(0.1), sgd(0.1), scale(-0.1)])
def test_a_member_may_keep_the_parameters(last):
    def remember(updates, state, params=None, **extra):
        return tree.map(lambda g, p, old: g + p - old, updates, params, state), params

    weight, expected = torch.nn.Parameter(torch.ones(2)), torch.ones(2)
    transformation = chain(GradientTransformation(lambda params: params, remember), last)
    optimizer, state = to_torch(transformation, [weight]), transformation.init(expected)
    for _ in range(4):
        weight.grad = 2 * weight.detach()
        optimizer.step()
        expected, state = step(transformation, 2 * expected, state, expected)
    torch.testing.assert_close(weight.detach(), expected)
