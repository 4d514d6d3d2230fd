"""Rows of the composition matrix: meta-losses and bilevel problems, against plain loops over tasks and closed forms."""

import torch

from diffopt.implicit import Implicit
from diffopt.linalg import CG
from diffopt.meta import adapt_proximal, anil, bilevel, imaml, maml, task_batch
from diffopt.optimizers import adam, sgd

__all__ = ["META_ROWS"]

TIGHT = {"rtol": 0.0, "atol": 1e-12}
COMPILED = ("compile", "compile(grad)", "compile(grad(grad))", "compile(vmap(grad))")
RAISES = dict.fromkeys(
    COMPILED, r"depends on data[^'\")]*|can be compiled with a Dense[^'\")]*|cannot be compiled[^'\")]*"
)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


MIX = f64([[0.8, -0.5, 0.2], [0.3, 0.6, -0.4], [0.1, 0.2, 0.9]])
START = f64([0.7, -0.4, 0.9])
TASKS = f64([[0.3, -0.2, 0.5], [-0.6, 0.1, 0.4]]), f64([[0.2, -0.1, 0.6], [-0.5, 0.2, 0.3]])


def loss(w, centre):
    return 0.5 * ((MIX @ w - centre) ** 2).sum() + torch.cosh(w).sum()


def slope(w, centre):
    return MIX.mT @ (MIX @ w - centre) + torch.sinh(w)


def over_tasks(adapted):
    """The mean query loss after a plainly written adaptation."""
    return torch.stack([loss(adapted(s), q) for s, q in zip(*TASKS, strict=True)]).mean()


def descend(w, centre, rate, steps):
    for _ in range(steps):
        w = w - rate * slope(w, centre)
    return w


def unrolled(**options):
    def operator(w, rate):
        return maml(loss, sgd(rate), 3, **options)(w, TASKS)

    return operator, (START, f64(0.2)), lambda w, rate: over_tasks(lambda c: descend(w, c, rate, 3)), None


def with_adam():
    def operator(w, rate):
        return maml(loss, adam(rate, eps=0.01, eps_root=0.02), 2)(w, TASKS)

    def steps(w, c, rate, b1=0.9, b2=0.999):
        m = v = torch.zeros_like(w)
        for t in (1, 2):
            g = slope(w, c)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            w = w - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t) + 0.02).sqrt() + 0.01)
        return w

    return operator, (START, f64(0.2)), lambda w, rate: over_tasks(lambda c: steps(w, c, rate)), None


def head_alone():
    def inner(params, centre):
        return loss(torch.cat([params["body"], params["head"]]), centre)

    def operator(w, rate):
        return anil(inner, sgd(rate), 2, {"body": False, "head": True})({"body": w[:1], "head": w[1:]}, TASKS)

    keep = f64([0.0, 1.0, 1.0])

    def reference(w, rate):
        def adapted(c, w=w):
            for _ in range(2):
                w = w - rate * keep * slope(w, c)
            return w

        return over_tasks(adapted)

    return operator, (START, f64(0.2)), reference, None


def chunked():
    def operator(w, rate):
        fn = lambda w, s, q: loss(descend(w, s, rate, 2), q)  # noqa: E731
        return task_batch(fn, in_dims=(None, 0, 0), chunk_size=1)(w, *TASKS)

    return operator, (START, f64(0.2)), lambda w, rate: over_tasks(lambda c: descend(w, c, rate, 2)), None


def newton(w, c, strength):
    """The proximal minimizer by Newton's method with an explicit inverse."""
    phi = w
    for _ in range(10):
        hessian = MIX.mT @ MIX + torch.diag(torch.cosh(phi)) + strength * torch.eye(3, dtype=w.dtype)
        phi = phi - torch.linalg.inv(hessian) @ (slope(phi, c) + strength * (phi - w))
    return phi


def proximal(**options):
    def operator(w, strength):
        return imaml(loss, strength, **options, **TIGHT)(w, TASKS)

    return operator, (START, f64(0.9)), lambda w, s: over_tasks(lambda c: newton(w, c, s)), RAISES


def of_one_task():
    operator = lambda w, s: adapt_proximal(loss, w, TASKS[0][0], s, **TIGHT)  # noqa: E731
    return operator, (START, f64(0.9)), lambda w, s: newton(w, TASKS[0][0], s), RAISES


def ridge():
    inner = lambda x, theta: 0.5 * ((MIX @ x - TASKS[0][0]) ** 2).sum() + 0.5 * (theta.exp() * x**2).sum()  # noqa: E731
    outer = lambda x, theta: 0.5 * ((x - TASKS[1][0]) ** 2).sum() + 0.1 * theta.square().sum()  # noqa: E731

    def operator(theta):
        return bilevel(inner, outer, **TIGHT)(theta, torch.zeros_like(START))

    def reference(theta):
        return outer(torch.linalg.inv(MIX.mT @ MIX + torch.diag(theta.exp())) @ MIX.mT @ TASKS[0][0], theta)

    return operator, (START,), reference, RAISES


META_ROWS = {
    "maml, sgd": unrolled,
    "maml, sgd, chunks, checkpoint": lambda: unrolled(chunk_size=1, checkpoint="sqrt"),
    "maml, adam": with_adam,
    "anil": head_alone,
    "task_batch, chunks": chunked,
    "imaml": proximal,
    "imaml, CG": lambda: proximal(adjoint=Implicit(CG(rtol=1e-13))),
    "adapt_proximal": of_one_task,
    "bilevel": ridge,
}
