r"""Meta-gradient reinforcement learning: the discount and the trace decay, learned while the agent learns.

.. math:: \theta_{k+1} = \text{step}\bigl(\nabla_1 L(\theta_k, \theta_k, \eta, \tau_k)\bigr), \qquad
          \eta \leftarrow \text{step}\bigl(\nabla_\eta J(\theta_K(\eta), \tau')\bigr)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import grad, unroll, value_and_grad
from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms import GradientTransformation, step
from diffopt.transforms.base import check_optimizer
from diffopt.transforms.leaves import flatten_floating
from diffopt.typing import Numeric, Tree

__all__ = ["MGRL", "MGRLInfo", "MGRLState", "lambda_return", "mgrl"]


class MGRLState(NamedTuple):
    """The agent's parameters and the meta-parameters, each with the state of its optimizer."""

    params: Tree
    meta: Tree
    optimizer_state: Any
    meta_optimizer_state: Any


class MGRLInfo(NamedTuple):
    """What a step of `mgrl` found.

    Attributes:
        loss: The outer loss after the inner steps, a 0-d tensor.
        hypergradient: Its gradient in the meta-parameters, a tree like them.
    """

    loss: Tensor
    hypergradient: Tree


class MGRL(NamedTuple):
    """Two pure functions, as `mgrl` makes them.

    Attributes:
        init: ``init(params, meta) -> MGRLState``.
        step: ``step(state, batches, held_out) -> (MGRLState, MGRLInfo)``. The leaves of `batches` have a leading
            dimension, that of the inner steps: 1 for the published method. `held_out` is for the outer loss.
    """

    init: Callable[[Tree, Tree], MGRLState]
    step: Callable[[MGRLState, Tree, Tree], tuple[MGRLState, MGRLInfo]]


def mgrl(
    inner_loss: Callable[[Tree, Tree, Tree, Any], Tensor],
    outer_loss: Callable[[Tree, Any], Tensor],
    optimizer: GradientTransformation,
    meta_optimizer: GradientTransformation,
) -> MGRL:
    r"""Learn the meta-parameters of an agent's update online, from what the update does to an outer objective.

    .. math:: \theta_{k+1} = \text{step}\bigl(\nabla_1 L(\theta_k, \theta_k, \eta, \tau_k)\bigr),
              \qquad \eta \leftarrow \text{step}\bigl(\nabla_\eta J(\theta_K(\eta), \tau')\bigr)

    After each window of K updates the meta-parameters take one step, along the derivative through these updates; the
    next window starts from the parameters they led to, as constants. The update may be any, not of reinforcement
    learning alone: what is tuned is whatever `inner_loss` makes of the meta-parameters.

    The derivative sees K updates ahead. What only pays later, such as a low variance of the average of many updates,
    it values too little; larger windows cost time in proportion, and see more.

    Args:
        inner_loss: `inner_loss(params, frozen, meta, batch)`, a scalar whose gradient in `params` alone the agent
            follows. `frozen` are the same parameters: values to bootstrap from and advantages are taken from them,
            so that the update is the usual semi-gradient, while its derivative is right without any `detach`.
            Map meta-parameters to their range here, for instance a discount by `torch.sigmoid(meta["discount"])`.
        outer_loss: `outer_loss(params, held_out)`, a scalar, which must not use the meta-parameters: an outer return of
            a learned discount would be small for discount 0.
        optimizer: What takes the agent's steps.
        meta_optimizer: What takes the steps of the meta-parameters.

    Returns:
        An `MGRL` of two pure functions; vmap them over seeds.

    Raises:
        TypeError: If a loss is not a function, or optimizers are not transformations. In `init` if a leaf is not a
            floating-point tensor, in `step` if a loss is not a scalar.
        ValueError: In `init`, if there are no meta-parameters; in `step`, if leaves of `batches` have no leading
            dimension in common.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> inner = lambda v, frozen, discount, rewards: (lambda_return(rewards, 0 * rewards, discount)[0] - v) ** 2 / 2
        >>> learner = mgrl(inner, lambda v, target: (v - target) ** 2, sgd(1.0), sgd(0.1))
        >>> state = learner.init(torch.tensor(0.0), torch.tensor(0.5))
        >>> rewards = torch.tensor([[1.0, 2.0]])  # worth 3: the discount should be 1
        >>> for _ in range(20):
        ...     state, info = learner.step(state, rewards, torch.tensor(3.0))
        >>> state.meta
        tensor(1.0000)

    References:
        Xu, van Hasselt and Silver (2018), Meta-gradient reinforcement learning, eq. 3 to 9 (with the trace decay
        :math:`\mu = 0` of its experiments). Xu et al. (2020), Meta-gradient reinforcement learning with an objective
        discovered online, for windows. Wu et al. (2018), Understanding short-horizon bias in stochastic
        meta-optimization.
    """
    _check_options(inner_loss, outer_loss, optimizer, meta_optimizer)

    def init(params: Tree, meta: Tree) -> MGRLState:
        flatten_floating(params, "params")
        if not flatten_floating(meta, "meta")[0]:
            raise ValueError("`meta` must have at least one leaf: there is nothing to learn.")
        return MGRLState(params, meta, optimizer.init(params), meta_optimizer.init(meta))

    def update(carry: tuple[Tree, Any], meta: Tree, batch: Any) -> tuple[tuple[Tree, Any], None]:
        params, state = carry
        return step(optimizer, grad(inner_loss)(params, params, meta, batch), state, params), None

    def learn(state: MGRLState, batches: Tree, held_out: Any) -> tuple[MGRLState, MGRLInfo]:
        _check_rows(batches)

        def after_window(meta: Tree) -> tuple[Tensor, tuple[Tree, Any]]:
            start = (state.params, state.optimizer_state)
            carry, _ = unroll(lambda carry, batch: update(carry, meta, batch), start, batches)
            return outer_loss(carry[0], held_out), carry

        (loss, carry), hypergradient = value_and_grad(after_window, has_aux=True)(state.meta)
        meta, meta_state = step(meta_optimizer, hypergradient, state.meta_optimizer_state, state.meta)
        return MGRLState(carry[0], meta, carry[1], meta_state), MGRLInfo(loss, hypergradient)

    return MGRL(init, learn)


def lambda_return(rewards: Tensor, values: Tensor, discount: Numeric, trace_decay: Numeric = 1.0) -> Tensor:
    r"""Take the returns from each time on that mix observed rewards with estimated values.

    .. math:: g_t = r_t + \gamma_t \bigl[ (1 - \lambda_t)\, v_{t+1} + \lambda_t\, g_{t+1} \bigr], \qquad g_T = v_T

    With :math:`\lambda = 1` it is the discounted sum of rewards, and :math:`\lambda = 0` looks one step ahead. It is
    differentiable in all its arguments.

    Args:
        rewards: The rewards :math:`r_0, \dots, r_{T-1}`, shape (..., T).
        values: The values :math:`v_1, \dots, v_T` of the states that follow, of the same shape; 0 after the end.
        discount: The factor :math:`\gamma`: a number or a 0-d tensor, or a tensor that broadcasts to (..., T), which
            may depend on the state and is 0 where an episode ends.
        trace_decay: The mixture :math:`\lambda`, likewise.

    Returns:
        The returns :math:`g_0, \dots, g_{T-1}`, shape (..., T).

    Raises:
        TypeError: If rewards or values are not floating-point tensors, or a factor is no number.
        ValueError: If shapes do not fit, there is no time, or a number is outside of [0, 1].

    Example:
        >>> lambda_return(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 8.0]), 0.5)
        tensor([2.7500, 3.5000, 5.0000])

    References:
        Sutton and Barto (2018), Reinforcement learning, eq. 12.18. Xu, van Hasselt and Silver (2018), Meta-gradient
        reinforcement learning, section 1.1.
    """
    flatten_floating((rewards, values), "(rewards, values)")
    if rewards.shape != values.shape or rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(
            "`rewards` and `values` must both be of shape (..., T) with T of at least 1, values being those of the "
            f"states that follow; got {tuple(rewards.shape)} and {tuple(values.shape)}."
        )
    discounts = _over_time("discount", discount, rewards)
    decays = _over_time("trace_decay", trace_decay, rewards)
    now, found = values[..., -1], []
    for t in range(rewards.shape[-1] - 1, -1, -1):
        mixed = values[..., t] + decays[..., t] * (now - values[..., t])
        now = rewards[..., t] + discounts[..., t] * mixed
        found.append(now)
    return torch.stack(found[::-1], -1)


def _over_time(name: str, factor: Numeric, rewards: Tensor) -> Tensor:
    """A factor for each time."""
    if not isinstance(factor, Tensor):
        check_hyperparameter(name, factor, at_least=0.0, at_most=1.0)
        return torch.full_like(rewards, factor)
    flatten_floating(factor, name)
    try:
        return factor.expand(rewards.shape)
    except RuntimeError as error:
        shapes = f"{tuple(factor.shape)} for rewards {tuple(rewards.shape)}"
        raise ValueError(f"`{name}` must be a number or broadcast to the shape of `rewards`; got {shapes}.") from error


def _check_rows(batches: Tree) -> None:
    leaves = tree.leaves(batches)
    rows = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
    if len(rows) != 1 or None in rows:
        found = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        raise ValueError(
            "`batches` must be a tree of tensors that share their first dimension, that of the inner steps; got "
            f"{found or 'an empty tree'}."
        )


def _check_options(inner_loss: Any, outer_loss: Any, optimizer: Any, meta_optimizer: Any) -> None:
    for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
        if not callable(loss):
            raise TypeError(f"`{name}` must be a function; got {type(loss).__name__}.")
    for name, value in (("optimizer", optimizer), ("meta_optimizer", meta_optimizer)):
        check_optimizer(value, name)
