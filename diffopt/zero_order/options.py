"""How a function is probed: the options that estimators share, and the population that they make of a key."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Numeric
from diffopt.zero_order.members import Evaluate, Members
from diffopt.zero_order.samplers import Sampler

__all__ = ["Losses", "Options", "check_options", "draw", "flatten_sigma", "joined", "kept", "probe"]

Method = Literal["antithetic", "forward", "naive"]


@dataclass(frozen=True)
class Options:
    """The options of an estimator; `smoothed` documents them."""

    sigma: Any
    num_samples: int
    sampler: Sampler
    method: Method = "antithetic"
    baseline: Literal["leave_one_out"] | None = None
    clip: float | None = None
    sign: bool = False
    nan: Literal["propagate", "drop", "raise"] = "propagate"
    chunk_size: int | None = None
    batching: Evaluate = "vmap"
    start: int = 0
    reduce: Callable[[Tensor], Tensor] | None = None

    @property
    def paired(self) -> bool:
        """Whether each direction is probed on both sides."""
        return self.method == "antithetic"

    @property
    def directions(self) -> int:
        """How many directions are drawn."""
        return self.num_samples // 2 if self.paired else self.num_samples

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The first direction of each chunk, and how many it holds."""
        first = self.start // 2 if self.paired else self.start
        size = self.directions if self.chunk_size is None else self.chunk_size // 2 if self.paired else self.chunk_size
        size = max(size, 1)
        for begin in range(0, self.directions, size):
            yield first + begin, min(size, self.directions - begin)


class Losses(NamedTuple):
    """The values of a population: of members on the two sides of each direction, or on one, shape (p, k) each."""

    plus: Tensor
    minus: Tensor | None
    aux: Any


def check_options(options: Options) -> None:
    """Raise where options make no estimator."""
    o = options
    check_count("num_samples", o.num_samples)
    check_count("start", o.start, at_least=0)
    if o.chunk_size is not None:
        check_count("chunk_size", o.chunk_size)
    _check_choice("method", o.method, ("antithetic", "forward", "naive"))
    _check_choice("batching", o.batching, ("vmap", "sequential", "batched"))
    _check_choice("nan", o.nan, ("propagate", "drop", "raise"))
    _check_choice("baseline", o.baseline, (None, "leave_one_out"))
    if o.paired and (o.num_samples % 2 or o.start % 2):
        raise ValueError(
            f"antithetic samples come in pairs: num_samples and start must be even; got {o.num_samples} and {o.start}. "
            'Use one more, or method="forward"'
        )
    if not isinstance(o.sampler, Sampler):
        raise TypeError(f"`sampler` must be a Sampler, such as gaussian(); got {o.sampler!r}")
    _check_baseline(o)
    if o.clip is not None and not o.clip > 0:
        raise ValueError(f"`clip` must be positive; got {o.clip}")
    if o.clip is not None and o.sign:
        raise ValueError("`clip` and `sign` both shape the differences; give one of them")
    for leaf in tree.leaves(o.sigma):
        _check_positive(leaf)


def flatten_sigma(sigma: Any, members: Members) -> float | Tensor:
    """Sigma as a number, a 0-d tensor or a vector, checked."""
    x = members.vector
    for leaf in tree.leaves(sigma):
        _check_positive(leaf)
    if isinstance(sigma, int | float):
        return float(sigma)
    if isinstance(sigma, Tensor) and sigma.ndim == 0:
        return sigma.to(x.device, x.dtype)
    tree.check_same_structure(sigma, members.tree, name="sigma", reference_name="x")
    pairs = zip(tree.leaves(sigma), members.shapes, strict=True)
    return torch.cat([_expand(leaf, shape, x) for leaf, shape in pairs])


def probe(options: Options, members: Members, key: Tensor, sigma: float | Tensor) -> Iterator[tuple[Tensor, Losses]]:
    """Yield the directions of each chunk, shape (c, n), and the values on their sides. No derivative passes to x."""
    center = members.vector.detach()
    scale = sigma.detach() if isinstance(sigma, Tensor) else sigma
    for first, count in options.chunks():
        directions = draw(options, members, key, first, count)
        steps = scale * directions
        population = torch.cat([center + steps, center - steps]) if options.paired else center + steps
        rows, aux = members(population)
        plus, minus = (rows[:count], rows[count:]) if options.paired else (rows, None)
        yield directions, Losses(plus, minus, aux)


def draw(options: Options, members: Members, key: Tensor, first: int, count: int) -> Tensor:
    """The directions first, ..., first + count - 1, shape (count, n)."""
    return options.sampler.draw(key, members.shapes, count, first, members.vector.dtype)


def joined(found: Sequence[Losses]) -> Losses:
    """The values of all chunks."""
    plus = torch.cat([losses.plus for losses in found])
    minus = (
        None if found[0].minus is None else torch.cat([m for m in (losses.minus for losses in found) if m is not None])
    )
    return Losses(plus, minus, _join_aux([losses.aux for losses in found], paired=minus is not None))


def kept(options: Options, losses: Losses) -> tuple[Losses, Tensor]:
    """The values with zeros in place of directions that the NaN policy drops, and which are kept, shape (p, 1)."""
    sides = [side for side in losses[:2] if side is not None]
    if options.nan == "propagate":
        return losses, torch.ones_like(losses.plus[:, :1])
    finite = torch.stack([side.detach().isfinite().all(1, keepdim=True) for side in sides]).all(0)
    if options.nan == "raise":
        if torch.compiler.is_compiling():
            raise RuntimeError('nan="raise" depends on data and cannot be compiled: use "drop" or "propagate"')
        if any_lane(~finite):
            raise FloatingPointError(
                'a sample gave NaN or an infinite value. Use a smaller sigma, or nan="drop" to leave such samples out'
            )
    zeroed = [torch.where(finite, side, 0) for side in sides]
    return Losses(zeroed[0], zeroed[1] if len(zeroed) > 1 else None, losses.aux), finite.to(losses.plus.dtype)


def _join_aux(found: list[Any], *, paired: bool) -> Any:
    """The aux of all members: first those on the plus sides, then those on the minus sides."""
    if found[0] is None:
        return None
    parts, merges = zip(*map(tree.partition, found), strict=True)
    if not paired:
        return merges[0]([torch.cat(column) for column in zip(*parts, strict=True)])
    halves = [[part.chunk(2) for part in column] for column in zip(*parts, strict=True)]
    return merges[0]([torch.cat([*(h[0] for h in column), *(h[1] for h in column)]) for column in halves])


def _check_baseline(o: Options) -> None:
    if o.baseline is None:
        return
    if o.method == "forward":
        raise ValueError('method="forward" has f(x) as its baseline; use "naive" or "antithetic" with leave_one_out')
    if not o.sampler.independent:
        raise ValueError(
            f"a leave-one-out baseline needs independent directions, which {o.sampler.name} has not: it would bias the "
            'estimate. Use method="forward" or "antithetic" without a baseline'
        )
    if o.directions < 2 and o.reduce is None:
        raise ValueError(f"a leave-one-out baseline needs two directions or more; got num_samples={o.num_samples}")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_positive(sigma: Any) -> None:
    if isinstance(sigma, Tensor):
        if not sigma.is_floating_point():
            raise TypeError(f"`sigma` must be floating-point; got {sigma.dtype}")
        if not torch.compiler.is_compiling() and sigma.is_cpu and any_lane(~(sigma.detach() > 0)):
            raise ValueError("`sigma` must be positive; a tensor of it is not everywhere")
    elif not isinstance(sigma, int | float) or isinstance(sigma, bool):
        raise TypeError(f"`sigma` must be a number, a tensor or a tree of them like x; got {type(sigma).__name__}")
    elif not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"`sigma` must be positive and finite; got {sigma}")


def _expand(leaf: Numeric, shape: tuple[int, ...], x: Tensor) -> Tensor:
    scale = (
        leaf.to(x.device, x.dtype) if isinstance(leaf, Tensor) else torch.full((), leaf, dtype=x.dtype, device=x.device)
    )
    try:
        return scale.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(f"`sigma` of shape {tuple(scale.shape)} does not expand to the shape of x, {shape}") from None
