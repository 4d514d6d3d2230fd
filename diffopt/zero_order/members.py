"""A function at the members of a population: mapped, in a loop, or all at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane, check_closed, choose, hoist, rules_of, transforms_active
from diffopt.autodiff.custom_derivative import Rules, by_rule
from diffopt.autodiff.levels import derivative_wanted, first_lane, is_live

__all__ = ["Evaluate", "Members"]

Evaluate: TypeAlias = Literal["vmap", "sequential", "batched"]


class Members:
    """One call of a user's function, with the arguments to be perturbed raveled to one vector.

    Args:
        f: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        argnums: Which arguments the vector holds.
        batching: "vmap", "sequential" or "batched".
        has_aux: Whether f returns `(value, aux)`.

    Example:
        >>> members = Members(lambda x, a: a * x.sum(), (torch.ones(2), 3.0), {})
        >>> members(torch.tensor([[1.0, 2.0], [0.5, 0.5]]))[0]
        tensor([[9.],
                [3.]])
    """

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        *,
        argnums: int | tuple[int, ...] = 0,
        batching: Evaluate = "vmap",
        has_aux: bool = False,
    ):
        self.f, self.batching, self.has_aux = f, batching, has_aux
        places = argnums if isinstance(argnums, tuple) else (argnums,)
        for place in places:
            if not isinstance(place, int) or not -len(args) <= place < len(args):
                raise ValueError(f"`argnums` names argument {place}, but {len(args)} positional arguments were given")
        self.places = tuple(place % len(args) for place in places)
        if len(set(self.places)) < len(self.places):
            raise ValueError(f"`argnums` must name different arguments; got {argnums}")
        self.tree = tuple(args[place] for place in self.places) if isinstance(argnums, tuple) else args[places[0]]
        self.single = not isinstance(argnums, tuple)
        _check_floating(self.tree)
        self.vector, self.unravel = tree.ravel(self.tree)
        self.shapes = [tuple(leaf.shape) for leaf in tree.leaves(self.tree)]
        self.rest = tuple(None if i in self.places else arg for i, arg in enumerate(args)), kwargs
        self._spec, self._like, self._merge_aux = None, [], None

    def __call__(self, population: Tensor) -> tuple[Tensor, Any]:
        """Evaluate the members, shape (c, n): their values raveled, shape (c, k), and the aux of all of them."""
        if self.batching == "sequential" and transforms_active() and not torch.compiler.is_compiling():
            rows, *aux = self._by_rule(population)
        else:
            rows, *aux = self._evaluate(self.f, population, self.rest)
        if not self.has_aux:
            return rows, None
        assert self._merge_aux is not None
        return rows, self._merge_aux([a.detach() for a in aux])

    def restore(self, row: Tensor) -> Any:
        """The tree of values of one raveled row, shape (k,)."""
        assert self._spec is not None
        pieces = row.split([shape.numel() for shape, _ in self._like])
        leaves = [p.reshape(shape).to(dtype) for p, (shape, dtype) in zip(pieces, self._like, strict=True)]
        return tree.unflatten(self._spec, leaves)

    def scalar(self, rows: Tensor, name: str) -> Tensor:
        """The values of the members as one number each, shape (c,)."""
        if rows.shape[1] != 1:
            raise TypeError(
                f"`{name}` needs a function that returns one number; got {rows.shape[1]} numbers. Reduce them, for "
                "example by .sum(), or use `smoothed`, which takes functions of any output"
            )
        return rows[:, 0]

    def _evaluate(self, f: Callable[..., Any], population: Tensor, rest: tuple[tuple, dict]) -> tuple[Tensor, ...]:
        if self.batching == "batched":
            values = torch.func.vmap(self.unravel)(population)
            return self._flatten(self._call(f, values, rest), batch=population.shape[0])
        member = functools.partial(self._member, f, rest)
        if self.batching == "vmap":
            return torch.func.vmap(member)(population)
        columns = zip(*(member(row) for row in population.unbind()), strict=True)
        return tuple(map(torch.stack, columns))

    def _member(self, f: Callable[..., Any], rest: tuple[tuple, dict], row: Tensor) -> tuple[Tensor, ...]:
        return self._flatten(self._call(f, self.unravel(row), rest), batch=None)

    def _call(self, f: Callable[..., Any], values: Any, rest: tuple[tuple, dict]) -> Any:
        args, kwargs = list(rest[0]), rest[1]
        for place, value in zip(self.places, (values,) if self.single else values, strict=True):
            args[place] = value
        return f(*args, **kwargs)

    def _flatten(self, out: Any, batch: int | None) -> tuple[Tensor, ...]:
        """The value in one row, or one row a member, and the tensors of the aux."""
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"with has_aux=True the function must return (value, aux); got {type(out).__name__}")
        value, aux = out if self.has_aux else (out, None)
        leaves, self._spec = tree.flatten(value)
        found = [_as_tensor(leaf, self.vector) for leaf in leaves]
        if not found:
            raise TypeError("the function must return a number, a tensor or a tree of them; got nothing")
        lead = 0 if batch is None else 1
        if any(batch is not None and leaf.shape[:1] != (batch,) for leaf in found):
            raise ValueError(
                f'with batching="batched" the function must return one value for each of the {batch} members; got '
                f"shapes {[tuple(leaf.shape) for leaf in found]}"
            )
        floats = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
        self._like = [(t.shape[lead:], t.dtype if f else self.vector.dtype) for t, f in zip(found, floats, strict=True)]
        # differences of values are small: half precision would lose them
        real = functools.reduce(torch.promote_types, [t.dtype for t in (*found, self.vector)], torch.float32)
        rows = torch.cat([t.to(real).flatten(lead) if t.ndim > lead else t.to(real).unsqueeze(-1) for t in found], -1)
        if not self.has_aux:
            return (rows,)
        tensors, merge = tree.partition(aux)
        # the tensors of a member end with its vmap: others stand in their places
        self._merge_aux = tree.partition(merge([torch.empty(0) for _ in tensors]))[1]
        return rows, *tensors

    def _by_rule(self, population: Tensor) -> tuple[Tensor, ...]:
        """The loop on plain tensors, whatever transforms are live; derivatives by running it again."""
        rebuild, captured, complete = hoist(self.f)
        tensors, merge = tree.partition(self.rest)
        count = len(captured)

        def flat(population, *values):
            return self._evaluate(rebuild(*values[:count]), population, merge(values[count:]))

        def primal(*inputs):
            with torch.enable_grad():
                return flat(*(x.detach() for x in inputs))

        def vjp(inputs, outputs, cotangents, wanted):
            _check_connected(flat, inputs, wanted)
            return rules[0](inputs, outputs, cotangents, wanted)

        def jvp(inputs, outputs, tangents):
            _check_connected(flat, inputs, [t is not None and any_lane(t != 0) for t in tangents])
            return rules[1](inputs, outputs, tangents)

        inputs = (population, *captured, *tensors)
        if not complete and derivative_wanted():
            check_closed(flat, (population[:1], *inputs[1:]), name="the function")
        rules = rules_of(flat)
        return by_rule(Rules(primal, vjp, jvp, "sequential"))(*inputs)


def _check_connected(flat: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], wanted: Sequence[bool]) -> None:
    """Raise if a derivative is wanted that the function, as torch sees it, does not have."""
    if not any(wanted):
        return
    plain = [first_lane(x) for x in inputs]
    part, primals = choose(flat, (plain[0][:1], *plain[1:]), wanted)
    live = False

    def probe(*values):
        nonlocal live
        rows = part(*values)[0]
        live = is_live(rows)
        return rows

    try:
        torch.func.vjp(probe, *primals)
    except (RuntimeError, TypeError) as error:
        raise RuntimeError(_DISCONNECTED) from error
    if not live:
        raise RuntimeError(_DISCONNECTED)


def _check_floating(x: Any) -> None:
    tree.check_tensors(x, name="x")
    for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True):
        if not leaf.is_floating_point():
            raise TypeError(
                f"`x{path}` must be floating-point to be perturbed; got {leaf.dtype}. Pass what is discrete as another "
                "argument, or round inside the function"
            )


def _as_tensor(leaf: Any, like: Tensor) -> Tensor:
    dtype = torch.float64 if isinstance(leaf, float) else None
    found = leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf, dtype=dtype, device=like.device)
    if found.is_complex():
        raise TypeError("the function must return real numbers; got complex ones. Take .real or .abs()")
    return found


_DISCONNECTED = (
    "the function's value does not depend differentiably on an argument that carries gradient: detach the argument, or "
    "name it in `argnums` to have its derivative estimated"
)
