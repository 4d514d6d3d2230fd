"""Checks for differentiable operators, yours included: every transform at any nesting, and finite differences.

`check_composition` is how diffopt tests its own promise: an operator is compared with a plainly differentiable
reference in every cell of the composition matrix. A cell is right, or it raises an error that says what to do.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from diffopt import tree

__all__ = ["CELLS", "Cell", "Report", "check_composition", "check_hypergradient"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the matrix: its name, "right", "wrong" or "raises", and the error or the message."""

    name: str
    status: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The cells of one operator; `str` prints them, wrong ones first."""

    cells: tuple[Cell, ...]

    @property
    def bad(self) -> tuple[Cell, ...]:
        """The cells that are wrong, or raise where they must not."""
        return tuple(cell for cell in self.cells if cell.status == "wrong")

    def __str__(self) -> str:
        width = max(len(cell.name) for cell in self.cells)
        ordered = sorted(self.cells, key=lambda cell: cell.status != "wrong")
        return "\n".join(f"{c.name:{width}}  {c.status:6}  {c.detail}" for c in ordered)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """An operator as a function of one vector, with all that the cells apply it to."""

    fn: Callable[[Tensor], Tensor]
    z: Tensor
    first: int  # elements of the first argument, which shared cells map over
    backend: str

    @property
    def v(self) -> Tensor:
        return torch.linspace(-0.7, 0.9, self.z.numel(), dtype=self.z.dtype, device=self.z.device)

    @property
    def batch(self) -> Tensor:
        return torch.stack([self.z * scale for scale in (1.0, 0.94, 1.07, 1.02)])

    def scalar(self, z: Tensor) -> Tensor:
        y = self.fn(z)
        weights = torch.linspace(0.6, 1.4, y.numel(), dtype=y.dtype, device=y.device)
        return (weights * y).sum() + 0.5 * (y * y).sum()

    def slope(self, z: Tensor) -> Tensor:
        return grad(self.scalar)(z) @ self.v

    def shared(self, heads: Tensor, tail: Tensor) -> Tensor:
        """The sum over lanes, the first argument mapped and the rest shared."""
        return vmap(lambda head: self.scalar(torch.cat([head, tail])))(heads).sum()

    def compile(self, fn, *args):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script_method.*", category=DeprecationWarning)
            return torch.compile(fn, fullgraph=True, backend=self.backend)(*args)


def _backward_twice(p: _Problem, fn, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        fn(z).backward(create_graph=True, inputs=[z])
    first = z.grad
    assert first is not None
    z.grad = None  # breaks the reference cycle that the warning is about
    (second,) = torch.autograd.grad((first * first).sum(), z, create_graph=True)
    (third,) = torch.autograd.grad(second.sin().sum(), z)
    return third


def _dual_level(p: _Problem) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(p.fn(forward_ad.make_dual(p.z, p.z.cos()))).tangent
    assert tangent is not None
    return tangent


def _gradcheck(p: _Problem) -> Tensor:
    z = p.z.clone().requires_grad_()
    passed = torch.autograd.gradcheck(p.fn, (z,), check_forward_ad=True, atol=1e-5)
    return torch.tensor(float(passed))


def _gradgradcheck(p: _Problem) -> Tensor:
    z = p.z.clone().requires_grad_()
    passed = torch.autograd.gradgradcheck(p.scalar, (z,), check_fwd_over_rev=True, atol=1e-4, rtol=1e-3)
    return torch.tensor(float(passed))


def _heads(p: _Problem) -> tuple[Tensor, Tensor]:
    return p.batch[:, : p.first], p.z[p.first :]


CELLS: Mapping[str, Callable[[_Problem], Tensor]] = {
    "forward": lambda p: p.fn(p.z),
    "grad": lambda p: grad(p.scalar)(p.z),
    "vjp": lambda p: vjp(p.fn, p.z)[1](torch.ones_like(p.fn(p.z)))[0],
    "jvp": lambda p: jvp(p.fn, (p.z,), (p.v,))[1],
    "jacrev": lambda p: jacrev(p.fn)(p.z),
    "jacfwd": lambda p: jacfwd(p.fn)(p.z),
    "hessian": lambda p: hessian(p.scalar)(p.z),
    "jacrev(jacrev)": lambda p: jacrev(jacrev(p.scalar))(p.z),
    "jacfwd(jacfwd)": lambda p: jacfwd(jacfwd(p.scalar))(p.z),
    "jacrev(jacfwd)": lambda p: jacrev(jacfwd(p.scalar))(p.z),
    "jvp(grad)": lambda p: jvp(grad(p.scalar), (p.z,), (p.v,))[1],
    "grad(grad)": lambda p: grad(p.slope)(p.z),
    "grad(grad(grad))": lambda p: grad(lambda z: grad(p.slope)(z) @ p.v)(p.z),
    "jvp(jvp(jvp))": lambda p: jvp(
        lambda z: jvp(lambda z: jvp(p.scalar, (z,), (p.v,))[1], (z,), (p.v,))[1], (p.z,), (p.v,)
    )[1],
    "vmap": lambda p: vmap(p.fn)(p.batch),
    "vmap(in_dims=1)": lambda p: vmap(p.fn, in_dims=1)(p.batch.T),
    "vmap, shared": lambda p: vmap(lambda h, t: p.fn(torch.cat([h, t])), in_dims=(0, None))(*_heads(p)),
    "vmap(vmap)": lambda p: vmap(vmap(p.fn))(p.batch.reshape(2, 2, -1)),
    "vmap(grad)": lambda p: vmap(grad(p.scalar))(p.batch),
    "vmap(jacfwd)": lambda p: vmap(jacfwd(p.fn))(p.batch),
    "grad(vmap)": lambda p: grad(lambda Z: vmap(p.scalar)(Z).sum())(p.batch),
    "grad(vmap), shared": lambda p: torch.cat([g.flatten() for g in grad(p.shared, argnums=(0, 1))(*_heads(p))]),
    "jvp(vmap)": lambda p: jvp(vmap(p.fn), (p.batch,), (p.batch.cos(),))[1],
    "vmap(hessian)": lambda p: vmap(hessian(p.scalar))(p.batch),
    "hessian(vmap)": lambda p: hessian(lambda z: vmap(lambda s: p.scalar(s * z))(p.batch[:, 0] / p.z[0]).sum())(p.z),
    "vmap(jvp(grad))": lambda p: vmap(lambda z: jvp(grad(p.scalar), (z,), (p.v,))[1])(p.batch),
    "grad(vmap(grad))": lambda p: grad(lambda Z: (vmap(grad(p.scalar))(Z) ** 2).sum())(p.batch),
    "grad(vmap(vmap))": lambda p: grad(lambda Z: vmap(vmap(p.scalar))(Z).sum())(p.batch.reshape(2, 2, -1)),
    "backward, thrice": lambda p: _backward_twice(p, p.scalar, p.z),
    "backward(vmap), thrice": lambda p: _backward_twice(p, lambda Z: vmap(p.scalar)(Z).sum(), p.batch),
    "dual_level": _dual_level,
    "dual_level(vmap)": lambda p: _dual_level(dataclasses.replace(p, fn=vmap(p.fn), z=p.batch)),
    "gradcheck": _gradcheck,
    "gradgradcheck": _gradgradcheck,
    "compile": lambda p: p.compile(p.fn, p.z),
    "compile(grad)": lambda p: p.compile(grad(p.scalar), p.z),
    "compile(grad(grad))": lambda p: p.compile(grad(p.slope), p.z),
    "compile(vmap(grad))": lambda p: p.compile(vmap(grad(p.scalar)), p.batch),
}
"""The cells of the composition matrix: each applies an operator under one nesting of transforms."""


_EAGER = {
    "compile": "forward",
    "compile(grad)": "grad",
    "compile(grad(grad))": "grad(grad)",
    "compile(vmap(grad))": "vmap(grad)",
}


def check_composition(
    fn: Callable[..., Any],
    args: Sequence[Any],
    reference: Callable[..., Any],
    *,
    tol: float = 1e-8,
    may_raise: Mapping[str, str] | None = None,
    backend: str | None = "aot_eager",
    cells: Sequence[str] | None = None,
) -> Report:
    r"""Compare an operator with a reference under every transform, and raise if a cell is wrong.

    .. math:: \max |D f - D f_{\text{ref}}| \le \text{tol}\,(1 + \max |D f_{\text{ref}}|)

    Args:
        fn: the operator, `(*args) -> tree of tensors`.
        args: trees of float64 tensors, away from zeros; the first is mapped over where the others are shared.
        reference: the same function in plain differentiable operations: a closed form or an unrolled loop.
        tol: the tolerance.
        may_raise: for cells that cannot be right, by name: a regular expression that the error's message, which must
            say what to do instead, has to match.
        backend: the `torch.compile` backend of the compiled cells; None leaves them out.
        cells: names of `CELLS` to check; all of them by default.

    Returns:
        The report, to print or to write down.

    Raises:
        AssertionError: if a cell is wrong, or raises where it may not; the message is the report.
        TypeError: if an argument is not float64.

    Example:
        >>> report = check_composition(
        ...     torch.sinh,
        ...     (torch.ones(2, dtype=torch.float64),),
        ...     lambda x: (x.exp() - (-x).exp()) / 2,
        ...     cells=["grad", "vmap(hessian)"],
        ... )
        >>> [cell.status for cell in report.cells]
        ['right', 'right']
    """
    vectors = [tree.ravel(a)[0] for a in args]
    if any(v.dtype != torch.float64 for v in vectors):
        raise TypeError(f"the matrix is checked in float64; got {[str(v.dtype) for v in vectors]}")
    sizes = [v.numel() for v in vectors]

    def flattened(operator):
        def on_vector(z):
            parts = z.split(sizes) if len(sizes) > 1 else (z,)
            # raveled again, because dynamo cannot use a treespec made outside
            return tree.ravel(operator(*(tree.ravel(a)[1](part) for a, part in zip(args, parts, strict=True))))[0]

        return on_vector

    z = torch.cat(vectors).detach()
    ours, theirs = (_Problem(flattened(f), z, sizes[0], backend or "eager") for f in (fn, reference))
    for name in (*(cells or ()), *(may_raise or {})):
        if name not in CELLS:
            raise ValueError(f"there is no cell {name!r}; the cells are {', '.join(CELLS)}")
    names = [n for n in (CELLS if cells is None else cells) if backend is not None or not n.startswith("compile")]
    found = tuple(_check_cell(name, ours, theirs, tol, (may_raise or {}).get(name)) for name in names)
    report = Report(found)
    if report.bad:
        raise AssertionError(f"{len(report.bad)} of {len(found)} cells are wrong:\n{report}")
    return report


def _check_cell(name: str, ours: _Problem, theirs: _Problem, tol: float, allowed: str | None) -> Cell:
    cell = CELLS[name]
    try:
        value = cell(ours)
    except Exception as error:
        text = re.sub(r".*Developer debug context:", "", str(error), count=1, flags=re.DOTALL)  # what dynamo wraps
        message = f"{type(error).__name__}: {' '.join(text.split())}"
        advice = re.search(allowed, message) if allowed is not None else None
        return Cell(name, "raises", advice.group()) if advice else Cell(name, "wrong", message[:400])
    expected = CELLS[_EAGER.get(name, name)](theirs)
    if not bool(expected.isfinite().all()) and bool(value.isfinite().all()):
        return Cell(name, "wrong", "the reference is not finite here; move the arguments")
    error = (value - expected).abs().max().item() if value.shape == expected.shape and value.numel() else float("nan")
    right = error <= tol * (1 + expected.abs().max().item())
    return Cell(name, "right" if right else "wrong", f"{error:.1e}")


def check_hypergradient(
    fn: Callable[..., Tensor], args: Sequence[Any], *, step: float = 1e-5, tol: float = 1e-6
) -> float:
    r"""Compare the gradient of a scalar function with central differences, and raise if they disagree.

    .. math:: \left|\nabla f(x)_i - \frac{f(x + h e_i) - f(x - h e_i)}{2 h}\right|
              \le \text{tol}\,(1 + |\nabla f|_\infty)

    Args:
        fn: `(*args) -> scalar tensor`, for instance an outer loss through an inner optimization.
        args: trees of float64 tensors.
        step: the difference h, relative to the magnitude of each element (at least absolute h).
        tol: the tolerance.

    Returns:
        The largest error.

    Raises:
        AssertionError: if an element disagrees; the message names it.
        TypeError: if an argument is not float64.

    Example:
        >>> check_hypergradient(lambda x: (x**3).sum(), (torch.ones(2, dtype=torch.float64),)) < 1e-8
        True
    """
    worst = 0.0
    for n, value in enumerate(args):
        vector, unravel = tree.ravel(value)
        if vector.dtype != torch.float64:
            raise TypeError(f"hypergradients are checked in float64; argument {n} is {vector.dtype}")

        def at(vector, n=n, unravel=unravel):
            return fn(*args[:n], unravel(vector), *args[n + 1 :])

        gradient = grad(at)(vector)
        with torch.no_grad():
            steps = torch.diag(step * vector.abs().clamp(min=1.0))
            differences = torch.stack([(at(vector + h) - at(vector - h)) / (2 * h.sum()) for h in steps])
        errors = (gradient - differences).abs()
        limit = tol * (1 + gradient.abs().max().item())
        if not bool((errors <= limit).all()):
            i = int(errors.nan_to_num(torch.inf).argmax())
            raise AssertionError(
                f"argument {n}{_place(value, i)}: gradient {gradient[i].item():.10g}, central difference "
                f"{differences[i].item():.10g}, allowed error {limit:.1e}"
            )
        worst = max(worst, errors.max().item())
    return worst


def _place(value: Any, index: int) -> str:
    """Where an element of the raveled tree stands: the path of its leaf, and its place in it."""
    for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True):
        if index < leaf.numel():
            return f"{path}, element {index}"
        index -= leaf.numel()
    return ""
