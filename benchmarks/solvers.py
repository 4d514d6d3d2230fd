"""Solvers and their implicit derivatives against their peers: python benchmarks/solvers.py.

The peers are no dependencies: `pip install jaxopt optimistix` into an environment of your own; rows of those that are
missing are left out. JAX runs compiled, in float64, in a process of its own, so that its threads end with it. Both
sides meet the same tolerance on the same data from the same start.
"""

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from sklearn.datasets import load_digits
from timing import alternate, median_us, record
from torch.func import grad, hessian, vmap
from torch.nn.functional import cross_entropy

from diffopt import value_and_grad
from diffopt.implicit import Implicit
from diffopt.linalg import CG, function_operator, linear_solve
from diffopt.solvers import BFGS, LBFGS, Newton, Zoom, minimize, root

L2 = 1e-3
TOLERANCE = {"atol": 1e-6, "rtol": 0.0}
BATCH, UNKNOWNS = 256, 10
ROOTS = 1024


def row(case: str, value: float, unit: str = "x", bar: str = "none") -> dict[str, Any]:
    """One row of the results."""
    return {"case": case, "value": value, "unit": unit, "bar": bar}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The images, in [0, 1], and the labels."""
    images, labels = load_digits(return_X_y=True)
    return images / 16, labels


def rng() -> np.random.Generator:
    """The same numbers on both sides."""
    return np.random.default_rng(0)


def ridge() -> tuple[np.ndarray, np.ndarray]:
    """A least-squares problem of 1000 rows and 100 unknowns."""
    r = rng()
    return r.standard_normal((1000, 100)), r.standard_normal(1000)


def jax_us(case: str) -> dict[str, float]:
    """Median times of JAX's peers; called in a process of its own."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp

    return {name: median_us(lambda fn=fn: jax.block_until_ready(fn())) for name, fn in JAX[case](jax, jnp).items()}


def jax_digits(jax, jnp) -> dict[str, Callable]:
    import jaxopt

    X, y = map(jnp.asarray, digits())

    def loss(w, l2):
        logits = X @ w["W"] + w["b"]
        nll = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
        return nll.mean() + l2 * (w["W"] ** 2).sum() / 2

    start = {"W": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    cg = lambda matvec, b: jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-6)[0]  # noqa: E731
    options = {"tol": TOLERANCE["atol"], "maxiter": 1000, "linesearch": "zoom", "implicit_diff_solve": cg}
    solver = jaxopt.LBFGS(loss, stop_if_linesearch_fails=True, **options)

    def outer(l2):
        return (solver.run(start, l2).params["W"] ** 2).sum()

    solve, slope = jax.jit(lambda l2: solver.run(start, l2)), jax.jit(jax.value_and_grad(outer))
    print("jaxopt L-BFGS:", solve(L2).state.iter_num, "steps, gradient norm", solve(L2).state.error)
    return {"solve": lambda: solve(L2), "hypergradient": lambda: slope(L2)}


def jax_ridge(jax, jnp) -> dict[str, Callable]:
    A, b = map(jnp.asarray, ridge())

    def solution(lam):
        return jax.scipy.sparse.linalg.cg(lambda v: A.T @ (A @ v) / 1000 + lam * v, A.T @ b / 1000, tol=1e-6)[0]

    forward, slope = jax.jit(solution), jax.jit(jax.value_and_grad(lambda lam: (solution(lam) ** 2).sum()))
    return {"solve": lambda: forward(1.0), "hypergradient": lambda: slope(1.0)}


def jax_rosenbrock(jax, jnp) -> dict[str, Callable]:
    import optimistix

    def fn(x, args):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    solver = optimistix.BFGS(rtol=0.0, atol=TOLERANCE["atol"])
    starts = jnp.asarray(rng().standard_normal((BATCH, UNKNOWNS)))
    run = jax.jit(jax.vmap(lambda x: optimistix.minimise(fn, solver, x, max_steps=1000, throw=False)))
    end = run(starts)
    slopes = jnp.abs(jax.vmap(jax.grad(lambda x: fn(x, None)))(end.value)).max(1)
    print("optimistix BFGS: at most", end.stats["num_steps"].max(), "steps, worst gradient", slopes.max())
    return {"solve": lambda: run(starts).value}


def jax_newton(jax, jnp) -> dict[str, Callable]:
    import optimistix

    fn = lambda x, a: x**3 + x + 0.1 * jnp.roll(x, 1) - a  # noqa: E731
    A = jnp.asarray(rng().standard_normal((ROOTS, UNKNOWNS)))

    def solution(a):
        solver = optimistix.Newton(rtol=1e-10, atol=1e-10)
        return optimistix.root_find(fn, solver, jnp.zeros_like(a), args=a, max_steps=50).value

    total = lambda a: solution(a).sum()  # noqa: E731
    forward, slope = jax.jit(jax.vmap(solution)), jax.jit(jax.vmap(jax.grad(total)))
    runs = {"solve": lambda: forward(A), "gradient": lambda: slope(A)}
    try:
        curvature = jax.jit(jax.vmap(jax.hessian(total)))
        curvature(A)
    except Exception as error:  # a peer without second derivatives has no row
        print("optimistix has no Hessian here:", type(error).__name__)
        return runs
    return {**runs, "Hessian": lambda: curvature(A)}


JAX = {"digits": jax_digits, "ridge": jax_ridge, "rosenbrock": jax_rosenbrock, "newton": jax_newton}


def against(case: str, name: str, ours: dict[str, float], bars: dict[str, str]) -> list[dict]:
    """Our times, and as ratios of JAX's where it is installed."""
    rows = []
    theirs: dict[str, float] = {}
    if importlib.util.find_spec("jaxopt") and importlib.util.find_spec("optimistix"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            theirs = pool.apply(jax_us, (case,))
    for what, us in ours.items():
        if what in theirs:
            rows.append(row(f"{name}, {what} / JAX jitted", us / theirs[what], bar=bars.get(what, "none")))
            rows.append(row("- JAX", theirs[what] / 1e3, "ms"))
        rows.append(row(f"{'- ours' if what in theirs else f'{name}, {what}'}", us / 1e3, "ms"))
    return rows


def our_digits() -> list[dict]:
    """L-BFGS on multinomial logistic regression, its hypergradient, and torch's and SciPy's L-BFGS."""
    X, y = map(torch.tensor, digits())

    def loss(w, l2):
        return cross_entropy(X @ w["W"] + w["b"], y) + l2 * (w["W"] ** 2).sum() / 2

    start = {"W": torch.zeros(64, 10, dtype=X.dtype), "b": torch.zeros(10, dtype=X.dtype)}
    l2 = torch.tensor(L2, dtype=X.dtype)

    def solve():
        return minimize(loss, start, (l2,), solver=LBFGS(), adjoint=Implicit(CG(rtol=1e-6)), **TOLERANCE)

    def outer(l2):
        adjoint = Implicit(CG(rtol=1e-6))
        return (minimize(loss, start, (l2,), adjoint=adjoint, **TOLERANCE).value["W"] ** 2).sum()

    def by_torch():
        w = {name: p.clone().requires_grad_() for name, p in start.items()}
        options = {"tolerance_grad": TOLERANCE["atol"], "tolerance_change": 0.0, "history_size": 10}
        optimizer = torch.optim.LBFGS(w.values(), max_iter=1000, line_search_fn="strong_wolfe", **options)

        def closure():
            optimizer.zero_grad()
            value = loss(w, l2)
            value.backward()
            return value

        optimizer.step(closure)
        return optimizer.state[w["W"]]["n_iter"]

    def by_scipy():
        def fn(v):
            w = torch.from_numpy(v)
            value, slope = value_and_grad(lambda v: loss({"W": v[:640].reshape(64, 10), "b": v[640:]}, l2))(w)
            return value.item(), slope.numpy()

        options = {"gtol": TOLERANCE["atol"], "ftol": 0.0, "maxiter": 1000, "maxcor": 10}
        return scipy.optimize.minimize(fn, np.zeros(650), jac=True, method="L-BFGS-B", options=options)

    print("ours:", solve().stats.steps, "steps; torch.optim.LBFGS:", by_torch(), "steps; SciPy:", by_scipy().nit)
    runs = [solve, lambda: grad(outer)(l2), by_torch, by_scipy]
    ours, slope, theirs, scipys = alternate(runs, repeats=7, budget_s=2.0)
    rows = against(
        "digits", "L-BFGS on digits", {"solve": ours, "hypergradient": slope},
        {"solve": "<= 1", "hypergradient": "<= 1"},
    )  # fmt: skip
    rows.append(row("L-BFGS on digits / torch.optim.LBFGS", ours / theirs, bar="<= 1"))
    return [*rows, row("L-BFGS on digits / SciPy's L-BFGS-B", ours / scipys)]


def our_ridge() -> list[dict]:
    """Ridge regression by conjugate gradients, and its derivative in the penalty."""
    A, b = map(torch.tensor, ridge())

    def solution(lam):
        op = function_operator(lambda lam, v: A.T @ (A @ v) / 1000 + lam * v, lam, A[0], tags=["positive_definite"])
        return linear_solve(op, A.T @ b / 1000, CG(rtol=1e-6))

    lam = torch.tensor(1.0, dtype=A.dtype)
    runs = [lambda: solution(lam), lambda: value_and_grad(lambda lam: (solution(lam) ** 2).sum())(lam)]
    forward, slope = alternate(runs)
    bars = {"solve": "<= 2", "hypergradient": "<= 4"}
    return against("ridge", "ridge 1000 x 100 by CG", {"solve": forward, "hypergradient": slope}, bars)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def compiled_rosenbrock(starts: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same batch by one compiled step for all lanes, which has a fixed number of trials in its line search."""
    solver = BFGS(line_search=Zoom(max_steps=6))
    begin = vmap(lambda x: solver.init(rosenbrock, x))(starts)
    step = torch.compile(vmap(lambda state: solver.step(rosenbrock, state)), fullgraph=True)

    def run():
        state = begin
        for k in range(1000):
            state = step(state)
            if k % 8 == 7 and bool((state.residual.abs().amax(1) <= TOLERANCE["atol"]).all()):
                break
        return state.residual.abs().amax()

    return run


def our_rosenbrock() -> list[dict]:
    """A batch of Rosenbrock functions by BFGS, and a loop over SciPy's."""
    starts = torch.tensor(rng().standard_normal((BATCH, UNKNOWNS)))
    run = vmap(lambda x: minimize(rosenbrock, x, solver=BFGS(), throw=False, **TOLERANCE))

    def by_scipy():
        def fn(x):
            value, slope = value_and_grad(rosenbrock)(torch.from_numpy(x))
            return value.item(), slope.numpy()

        for x in starts.numpy():
            scipy.optimize.minimize(fn, x, jac=True, method="BFGS", options={"gtol": TOLERANCE["atol"]})

    end = run(starts)
    print("ours: at most", end.stats.steps.max().item(), "steps; failed lanes:", (end.result != 0).sum().item())
    compiled = compiled_rosenbrock(starts)
    print("compiled: worst gradient", compiled().item())
    eager, stepped = alternate([lambda: run(starts), compiled], repeats=7, budget_s=2.0)
    began = time.perf_counter()
    by_scipy()  # once: it takes seconds
    loop = (time.perf_counter() - began) * 1e6
    name = f"{BATCH} Rosenbrock, {UNKNOWNS}-d, by BFGS"
    rows = against("rosenbrock", f"{name}, a compiled step", {"solve": stepped}, {"solve": "<= 2"})
    rows.append(row("- ours in eager code", eager / 1e3, "ms"))
    return [*rows, row(f"a loop over SciPy's BFGS / {BATCH} in an eager batch", loop / eager, bar=">= 10")]


def our_newton() -> list[dict]:
    """A batch of systems by Newton's method, with derivatives."""
    A = torch.tensor(rng().standard_normal((ROOTS, UNKNOWNS)))
    fn = lambda x, a: x**3 + x + 0.1 * x.roll(1) - a  # noqa: E731

    def solution(a):
        return root(fn, torch.zeros_like(a), (a,), solver=Newton(), rtol=0.0, atol=1e-10).value

    total = lambda a: solution(a).sum()  # noqa: E731
    runs = {
        "solve": lambda: vmap(solution)(A),
        "gradient": lambda: vmap(grad(total))(A),
        "Hessian": lambda: vmap(hessian(total))(A),
    }
    times = dict(zip(runs, alternate(list(runs.values()), repeats=10, budget_s=1.0), strict=True))
    return against("newton", f"{ROOTS} Newton roots, {UNKNOWNS}-d", times, dict.fromkeys(runs, "<= 2"))


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rows = [*our_digits(), *our_ridge(), *our_rosenbrock(), *our_newton()]
    record("solvers", rows, packages=("jax", "jaxopt", "optimistix", "scipy"))


if __name__ == "__main__":
    main()
