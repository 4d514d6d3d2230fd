r"""Total gradients through best responses, by one adjoint solve for each level on the way.

.. math:: \bar x_b = \partial_{x_b} L_a + \sum_c \bar x_c^\top \partial_{x_b} x_c^\star, \qquad
          \bar x_c^\top \partial_\theta x_c^\star = -\,u^\top \partial_\theta \nabla \Phi_c, \quad
          \nabla^2 \Phi_c\, u = \bar x_c

Reverse mode over the graph: cotangents are pulled from the lowest level up, each through its response, in products
with vectors alone. :math:`\Phi_c` is the loss of a level as a function of its own parameters, where the levels below
it move with them (or stay, with `response="partial"`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import grad, jvp, unroll, value_and_grad
from diffopt.implicit.protocol import Equation, Info, Response
from diffopt.multilevel.level import Edge, Level
from diffopt.multilevel.precision import autocast
from diffopt.multilevel.topology import Group, Topology
from diffopt.transforms import clip_by_global_norm, step
from diffopt.transforms.fusion import by_pieces
from diffopt.typing import Tree

__all__ = ["Block", "Context", "PerStep", "Report", "moved", "total_gradient"]


class PerStep(NamedTuple):
    """Batches for the single steps of a level, a tree with a leading axis; without, all steps see one batch.

    Attributes:
        batches: The tree. Its axis has one entry for each step that the level takes in an update (`Graph.counts`).
    """

    batches: Tree


class Block(NamedTuple):
    """The last steps of a level: where they started, with which state of the optimizer, and on what."""

    params: Tree
    optimizer: Any
    batch: Any


class Context(NamedTuple):
    """All that a gradient may look at: parameters, the states of optimizers and of methods, batches, and last steps.

    With `follow`, the levels below one that is moved from its parameters move with it, to first order.
    """

    params: Mapping[str, Tree]
    optimizers: Mapping[str, Any]
    methods: Mapping[tuple[str, str], Any]
    batches: Mapping[str, Any]
    blocks: Mapping[str, Block]
    follow: bool = False


class Report(NamedTuple):
    r"""How far a level's gradient can be trusted, as far as it came through one lower level.

    Attributes:
        residual: The relative residual of the adjoint system; NaN where the method solves none.
        steps: The products that its solver took; -1 where it has none.
        error: The norm of the error that this residual means for the gradient: a bound where the edge gives
            `strong_convexity` and `coupling`, else an estimate, as if both systems were equally conditioned.
        bound: Whether `error` is a bound.
        distance: How far the lower level is from its solution at most, :math:`|\nabla \Phi| / \mu`; NaN without
            `strong_convexity`.
    """

    residual: Tensor
    steps: Tensor
    error: Tensor
    bound: Tensor
    distance: Tensor


class Program(NamedTuple):
    """Levels and their topology."""

    levels: Mapping[str, Level]
    shape: Topology


def total_gradient(
    program: Program, name: str, context: Context, scale: Tensor | None = None
) -> tuple[Tensor, Tree, dict[tuple[str, str], Any], dict[str, Report]]:
    """The gradient of a level's loss in its own parameters, through the responses of all levels below.

    Args:
        program: The program.
        name: The level.
        context: Where everything is.
        scale: What the loss is multiplied by before it is differentiated, or None.

    Returns:
        The loss, its gradient, the new states of the methods that it used, and reports by lower level.
    """
    level, shape = program.levels[name], program.shape
    if not shape.groups[name] and level.plain and scale is None:
        loss, gradient = level.value_and_grad(
            context.params[name], *(context.params[read] for read in level.reads), context.batches.get(name)
        )
        return loss, gradient, {}, {}
    family = [name, *(read for read in level.reads if read in shape.below[name])]
    loss, slopes = _slopes(level, name, family, context, scale)
    cotangents = dict(zip(family, slopes, strict=True))
    del slopes  # each is as large as a level: it is freed when it was pulled
    after, reports = {}, {}
    for group in shape.groups[name]:
        held = [cotangents[member] for member in group.members if member in cotangents]
        if not held:
            continue
        pair, edge = (name, group.name), group.edge
        response = _response(program, group, context._replace(follow=context.follow or edge.method.moves))
        size = None if edge.gain is None else tree.norm(held)
        del held
        parts, after[pair], info = edge.method.pull(response, _taken(cotangents, response.x), context.methods[pair])
        reports[group.name] = _report(edge, info, response, size, parts)
        for outside, part in zip(group.outside, parts, strict=True):
            if outside == name or outside in shape.below[name]:
                cotangents[outside] = tree.add(cotangents[outside], part) if outside in cotangents else part
    return loss, cotangents[name], after, reports


def _taken(cotangents: dict[str, Tree], x: dict[str, Tree]) -> dict[str, Tree]:
    """The cotangents of a group, which are held here no longer: each is as large as a level."""
    return {m: cotangents.pop(m) if m in cotangents else tree.zeros_like(params) for m, params in x.items()}


def moved(program: Program, name: str, gradient: Tree, optimizer: Any, params: Tree, **extra: Any) -> tuple[Tree, Any]:
    """The parameters and the optimizer's state of a level after a step along a gradient."""
    level = program.levels[name]
    params, optimizer = step(level.optimizer, _clipped(level, gradient), optimizer, params, **extra)
    if level.project is None:
        return params, optimizer
    projected = level.project(params)
    tree.check_like(projected, params, name=f"the projection of level {name!r}", reference_name="params")
    return projected, optimizer


def _clipped(level: Level, gradient: Tree) -> Tree:
    if level.clip is None:
        return gradient
    clipping = clip_by_global_norm(level.clip)
    return clipping.update(gradient, clipping.init(gradient))[0]


def _slopes(level: Level, name: str, family: list[str], context: Context, scale: Tensor | None):
    """The loss, and its gradients in the members of the family, under autocast if the level says so."""

    def value(batch: Any, *values: Tree) -> Tensor:
        known = dict(zip(family, values, strict=True))
        reads = [known[read] if read in known else context.params[read] for read in level.reads]
        with autocast(level.precision, known[name]):
            return level.loss(known[name], *reads, batch)

    def scaled(batch: Any, *values: Tree) -> tuple[Tensor, Tensor]:
        loss = value(batch, *values)
        return loss * factor, loss.detach() / level.accumulate

    batch, at = context.batches.get(name), [context.params[member] for member in family]
    argnums = tuple(range(1, 1 + len(family)))
    if level.accumulate == 1 and scale is None:
        return value_and_grad(value, argnums)(batch, *at)
    factor = 1 / level.accumulate if scale is None else scale / level.accumulate
    differentiate = value_and_grad(scaled, argnums, has_aux=True)
    found = [differentiate(part, *at) for part in _micro_batches(level, batch)]
    loss, slopes = functools.reduce(tree.add, [(loss, slopes) for (_, loss), slopes in found])
    return loss, slopes if scale is None else tree.map(lambda g: g / scale, slopes)


def _micro_batches(level: Level, batch: Any) -> list[Any]:
    if level.accumulate == 1:
        return [batch]
    tensors, merge = tree.partition(batch)
    if any(t.dim() == 0 or t.shape[0] != level.accumulate for t in tensors):
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(f"a batch of {level.accumulate} micro-batches needs that leading size; got shapes {shapes}")
    return [merge([t[i] for t in tensors]) for i in range(level.accumulate)]


def objective(program: Program, name: str, context: Context) -> Callable[..., Tensor]:
    """The loss of a level as a function `(own, *outside)`, where the levels below it answer, or stay."""
    level, shape = program.levels[name], program.shape

    def value(own: Tree, *outside: Tree) -> Tensor:
        known = {name: own, **dict(zip(shape.outside[name], outside, strict=True))}
        reads = [_found(program, name, context, known, read) for read in level.reads]
        batches = _micro_batches(level, context.batches.get(name))
        losses = [level.loss(own, *reads, batch) for batch in batches]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    return value


def _found(program: Program, name: str, context: Context, known: dict[str, Tree], read: str) -> Tree:
    """What a level reads: known already, or the response of a level below to what is known, remembered."""
    if read not in known:  # a function of its own, not a closure, which would keep all it knows alive in a cycle
        group = next(group for group in program.shape.groups[name] if read in group.members)
        if group.edge.response == "partial":
            known.update({member: context.params[member] for member in group.members})
        else:
            args = tuple(_found(program, name, context, known, other) for other in group.outside)
            known.update(_answer(program, name, group, context, args))
    return known[read]


def _answer(program: Program, name: str, group: Group, context: Context, args: tuple[Tree, ...]) -> dict[str, Tree]:
    """How a group answers to what it reads, which may have moved from the context's parameters."""

    def respond(args: tuple[Tree, ...]) -> dict[str, Tree]:
        return group.edge.method.respond(_response(program, group, context, args), context.methods[name, group.name])

    found = respond(args)
    if not context.follow:
        return found
    leaves, treespec = tree.flatten(found)
    flat, spec = tree.flatten(args)
    here = tree.leaves(tuple(context.params[outside] for outside in group.outside))
    away = [(new - old).detach() for new, old in zip(flat, here, strict=True)]
    _, change = jvp(lambda *flat: tuple(tree.leaves(respond(tree.unflatten(spec, flat)))), here, away)
    return tree.unflatten(treespec, [x + dx for x, dx in zip(leaves, change, strict=True)])


def _response(program: Program, group: Group, context: Context, args: tuple[Tree, ...] | None = None) -> Response:
    """The response of a group: its iterate and arguments are dicts and tuples of levels' parameters."""
    x = {member: context.params[member] for member in group.members}
    args = tuple(context.params[outside] for outside in group.outside) if args is None else args
    slopes = {member: _slope(program, member, group, context) for member in group.members}

    def residual(x, *args):
        return {member: slope(x, args) for member, slope in slopes.items()}

    def value(x, *args):
        first, *others = group.members
        if others:
            raise ValueError(f"{group.name} minimize no common loss: use Implicit(GMRES()) for their joint response")
        return _value(program, first, group, context)(x, args)

    def retrace(truncate, checkpoint, *args):
        return _retraced(program, group, context, args, truncate, checkpoint)

    def change(gradient):
        return {m: _change(program, m, gradient[m], context.optimizers[m], params) for m, params in x.items()}

    def pull_change(gradient, cotangent):
        return {
            m: _pulled_change(program, m, gradient[m], cotangent[m], context.optimizers[m], params)
            for m, params in x.items()
        }

    symmetric = len(group.members) == 1
    return Response(x, args, Equation(residual, symmetric=symmetric), value, retrace, change, pull_change)


def _value(program: Program, name: str, group: Group, context: Context) -> Callable[[dict[str, Tree], tuple], Tensor]:
    """The loss of a member of a group as a function of the group's iterate and arguments."""
    of_vectors, outside = objective(program, name, context), program.shape.outside[name]

    def value(x: dict[str, Tree], args: tuple) -> Tensor:
        known = {**dict(zip(group.outside, args, strict=True)), **x}
        return of_vectors(x[name], *(known[other] for other in outside))

    return value


def _slope(program: Program, name: str, group: Group, context: Context) -> Callable[[dict[str, Tree], tuple], Tree]:
    value = _value(program, name, group, context)
    return lambda x, args: grad(lambda own: value({**x, name: own}, args))(x[name])


def _change(program: Program, name: str, gradient: Tree, optimizer: Any, params: Tree) -> Tree:
    """What a step adds to the parameters; by `update` where it can, which holds less than the step and a difference."""
    level = program.levels[name]
    if level.project is None:
        return level.optimizer.update(_clipped(level, gradient), optimizer, params)[0]
    return tree.sub(moved(program, name, gradient, optimizer, params)[0], params)


def _pulled_change(program: Program, name: str, gradient: Tree, cotangent: Tree, optimizer: Any, params: Tree) -> Tree:
    """The cotangent of the gradient for one of what a step adds: in pieces where that can be, which holds less."""
    level, found = program.levels[name], None
    if level.clip is None and level.project is None:
        along = grad(lambda g, piece, v: v @ level.optimizer.update(g, piece.state, piece.params)[0][0])
        pull = lambda piece, v: _settled(along(piece.gradient, piece, v)[0], piece.gradient[0])  # noqa: E731
        found = by_pieces(pull, level.optimizer, gradient, optimizer, params, cotangent)
    if found is None:
        found = grad(lambda g, v: tree.vdot(v, _change(program, name, g, optimizer, params)))(gradient, cotangent)
        found = tree.map(_settled, found, gradient)
    return found


def _settled(pulled: Tensor, gradient: Tensor) -> Tensor:
    """What is pulled to a gradient, 0 where that is 0 and the step has no derivative."""
    return torch.where(pulled.isnan() & (gradient == 0), 0.0, pulled)


def _retraced(program, group, context, args, truncate, checkpoint) -> dict[str, Tree]:
    """The last steps of a group once more, as a function of what they read; what lies below is taken as it is now."""
    blocks = {member: context.blocks[member] for member in group.members}
    steps = {program.levels[member].steps for member in group.members}
    if len(steps) > 1:
        raise ValueError(f"{group.name} answer each other and take different numbers of steps: use Implicit(GMRES())")
    xs = {m: block.batch.batches for m, block in blocks.items() if isinstance(block.batch, PerStep)}

    def one(carry, now):
        x, optimizers = carry
        here = context._replace(batches={**context.batches, **(now or {})})
        for member in group.members:
            slope = _slope(program, member, group, here)(x, args)
            params, optimizer = moved(program, member, slope, optimizers[member], x[member])
            x, optimizers = {**x, member: params}, {**optimizers, member: optimizer}
        return (x, optimizers), None

    begin = {m: block.params for m, block in blocks.items()}, {m: block.optimizer for m, block in blocks.items()}
    length = None if xs else steps.pop()
    (x, _), _ = unroll(one, begin, xs or None, length=length, checkpoint=checkpoint, truncate=truncate)
    return x


def _report(edge: Edge, info: Info, response: Response, size: Tensor | None, parts: tuple[Tree, ...]) -> Report:
    """The report of an edge; `size` is the norm of what was pulled, where the edge knows its gain."""
    mu, gain = edge.strong_convexity, edge.gain
    error = info.residual * (tree.norm(parts) if size is None or gain is None else size * gain)
    if mu is None:
        distance = torch.full_like(info.residual, torch.nan)
    else:
        distance = tree.norm(response.equation.residual(response.x, *response.args)) / mu
    bound = torch.full_like(info.steps, gain is not None, dtype=torch.bool)
    return Report(info.residual, info.steps, error, bound, distance)
