"""Where noise is made: the one place that decides, and the operators with their derivatives by rule.

CUDA tensors take one launch of the Triton kernel, CPU tensors chunks of draws. A `vmap` puts all its lanes into one
call. Compiled functions take the plain references, and so do other devices.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff.custom_derivative import Rules, Tensors, by_rule
from diffopt.autodiff.fused_op import fold, shaped
from diffopt.autodiff.levels import transforms_active
from diffopt.zero_order import on_cpu
from diffopt_kernels import perturb as kernel

__all__ = ["accumulate", "noise", "perturb", "perturb_in_place", "project"]


def noise(key: Tensor, start: Tensor, count: int, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """The noises of consecutive members, shape (count, size)."""

    def run(keys: Tensor, starts: Tensor) -> Tensor:
        members = starts[:, None] + torch.arange(count, device=keys.device)
        rows = keys[:, None].expand(*members.shape, 2).reshape(-1, 2)
        noises = _home(keys).noise(rows, members.reshape(-1), size, dtype, distribution)
        return noises.unflatten(0, members.shape)

    def plain(key: Tensor, start: Tensor) -> Tensors:
        members = start + torch.arange(count, device=key.device)
        return (kernel.noise_reference(key.expand(count, 2), members, size, dtype, distribution),)

    def vjp(inputs, outputs, cotangents, wanted):
        return None, None

    def jvp(inputs, outputs, tangents):
        return (torch.zeros_like(outputs[0]),)

    if not torch.compiler.is_compiling() and not transforms_active():
        return run(key[None], start[None])[0]
    return _operator(run, vjp, jvp, plain)(key, start)


def perturb(key: Tensor, x: Tensor, sigma: Tensor, member: Tensor, distribution: str) -> Tensor:
    """x + sigma * noise; sigma is of shape () or that of x, and in the dtype of the arithmetic."""
    real = kernel.compute_dtype(x.dtype)

    def run(keys: Tensor, x: Tensor, sigma: Tensor, members: Tensor) -> Tensor:
        sigma = sigma if sigma.ndim == 2 else sigma[:, None].expand(x.shape)
        return _home(keys).perturb(keys, x, sigma, members, distribution)

    def plain(key: Tensor, x: Tensor, sigma: Tensor, member: Tensor) -> Tensors:
        sigma = sigma.expand(x.shape)
        return (kernel.perturb_reference(key[None], x[None], sigma[None], member[None], distribution)[0],)

    def vjp(inputs, outputs, cotangents, wanted):
        key, x, sigma, member = inputs
        slope = None
        if wanted[2]:
            slope = cotangents[0].to(real) * noise(key, member, 1, x.shape[0], real, distribution)[0]
            slope = slope if sigma.ndim else slope.sum()
        return None, cotangents[0], slope, None

    def jvp(inputs, outputs, tangents):
        key, x, _, member = inputs
        moved = tangents[2] * noise(key, member, 1, x.shape[0], real, distribution)[0]
        return (tangents[1] + moved.to(x.dtype),)

    return _operator(run, vjp, jvp, plain)(key, x, sigma, member)


def perturb_in_place(key: Tensor, x: Tensor, sigma: Tensor, member: Tensor, distribution: str) -> None:
    """Write x + sigma * noise over x; plain tensors only."""
    out = x[None]
    with torch.no_grad():
        _home(key).perturb(key[None], out, sigma.expand(x.shape)[None], member[None], distribution, out)


def accumulate(key: Tensor, weights: Tensor, start: Tensor, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """The sum of weights times noises, shape (size,)."""
    count = weights.shape[0]

    def run(keys: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
        return _home(keys).accumulate(keys, weights, starts, size, dtype, distribution)

    def plain(key: Tensor, weights: Tensor, start: Tensor) -> Tensors:
        return (kernel.accumulate_reference(key[None], weights[None], start[None], size, dtype, distribution)[0],)

    def vjp(inputs, outputs, cotangents, wanted):
        key, weights, start = inputs
        return None, project(key, cotangents[0], start, count, weights.dtype, distribution), None

    def jvp(inputs, outputs, tangents):
        return (accumulate(inputs[0], tangents[1], inputs[2], size, dtype, distribution),)

    return _operator(run, vjp, jvp, plain)(key, weights, start)


def project(key: Tensor, vector: Tensor, start: Tensor, count: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """The inner products of a vector with the noises of consecutive members, shape (count,)."""
    size = vector.shape[0]
    real = kernel.compute_dtype(vector.dtype)

    def run(keys: Tensor, vectors: Tensor, starts: Tensor) -> Tensor:
        return _home(keys).project(keys, vectors, starts, count, dtype, distribution)

    def plain(key: Tensor, vector: Tensor, start: Tensor) -> Tensors:
        members = start + torch.arange(count, device=key.device)
        noises = kernel.noise_reference(key.expand(count, 2), members, size, real, distribution)
        return ((noises * vector.to(real)).sum(1).to(dtype),)

    def vjp(inputs, outputs, cotangents, wanted):
        key, vector, start = inputs
        return None, accumulate(key, cotangents[0], start, size, vector.dtype, distribution), None

    def jvp(inputs, outputs, tangents):
        return (project(inputs[0], tangents[1], inputs[2], count, dtype, distribution),)

    return _operator(run, vjp, jvp, plain)(key, vector, start)


class Home(NamedTuple):
    """A way to work on lanes of plain tensors: functions with the arguments of `diffopt_kernels.perturb`."""

    noise: Callable[..., Tensor]
    perturb: Callable[..., Tensor]
    accumulate: Callable[..., Tensor]
    project: Callable[..., Tensor]


KERNEL = Home(kernel.noise, kernel.perturb, kernel.accumulate, kernel.project)
REFERENCE = Home(
    kernel.noise_reference, kernel.perturb_reference, kernel.accumulate_reference, kernel.project_reference
)
CPU = Home(on_cpu.noise, on_cpu.perturb, on_cpu.accumulate, on_cpu.project)


def _home(keys: Tensor) -> Home:
    if keys.is_cpu:
        return CPU
    return KERNEL if keys.is_cuda and _has_triton() else REFERENCE


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Lanes(NamedTuple):
    """A function of lanes, as one of single inputs mapped over any number of vmaps, outermost first."""

    run: Callable[..., Tensor]
    levels: tuple[tuple[tuple[int | None, ...], int], ...] = ()

    def __call__(self, *inputs: Tensor) -> Tensors:
        sizes = tuple(size for _, size in self.levels)
        flat = [self._lanes_first(x, i) for i, x in enumerate(inputs)]
        out = self.run(*(x.reshape(math.prod(sizes), *x.shape[len(sizes) :]) for x in flat))
        return (shaped(out, (*sizes, *out.shape[1:])),)

    def _lanes_first(self, x: Tensor, place: int) -> Tensor:
        for k, (dims, size) in enumerate(self.levels):
            dim = dims[place]
            x = x.unsqueeze(k).expand(*x.shape[:k], size, *x.shape[k:]) if dim is None else x.movedim(dim + k, k)
        return x


def _operator(run: Callable[..., Tensor], vjp: Callable, jvp: Callable, plain: Callable) -> Callable[..., Tensor]:
    operator = by_rule(Rules(Lanes(run), vjp, jvp, fold, forgets_outputs=True), plain)
    return lambda *inputs: operator(*inputs)[0]
