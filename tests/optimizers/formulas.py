"""The update equations of all optimizers, on NumPy arrays or on tensors; they share no code with diffopt.

A formula takes a leaf p, its gradient g, its memory s (a dict that it fills), the step t from 1 and hyperparameters by
the optimizer's names for them; it gives the new leaf. `advance` applies one to all leaves.
"""

import numpy as np
import torch

__all__ = ["FORMULAS", "advance"]


def advance(name, leaves, gradients, memory, t, **hyper):
    """The leaves after step t; `gradients` maps leaves to gradients, `memory` is a dict for this run."""
    rate = hyper.get("learning_rate")
    if callable(rate):
        hyper["learning_rate"] = rate(torch.tensor(t - 1)).item()
    if name in WHOLE:
        return WHOLE[name](leaves, gradients, memory, t, **hyper)
    pairs = zip(leaves, gradients(leaves), strict=True)
    return [FORMULAS[name](p, g, memory.setdefault(i, {}), t, **hyper) for i, (p, g) in enumerate(pairs)]


def namespace(x):
    return torch if isinstance(x, torch.Tensor) else np


def norm(x):
    return (x * x).sum() ** 0.5


def mean(s, name, value, decay):
    """The running mean of a value."""
    s[name] = decay * s.get(name, 0.0) + (1 - decay) * value
    return s[name]


def sgd(p, g, s, t, *, learning_rate, momentum=0.0, nesterov=False):
    """Sutskever et al. 2013 in the form of torch.optim.SGD."""
    s["m"] = momentum * s.get("m", 0.0) + g
    return p - learning_rate * (g + momentum * s["m"] if nesterov else s["m"])


def adam_direction(g, s, t, b1, b2, eps, eps_root, nesterov=False):
    m, v = mean(s, "m", g, b1), mean(s, "v", g * g, b2)
    m_hat = m / (1 - b1**t)
    if nesterov:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    return m_hat / ((v / (1 - b2**t) + eps_root) ** 0.5 + eps)


def adam(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False):
    """Algorithm 1 of Kingma and Ba; Dozat's momentum with a constant b1."""
    return p - learning_rate * adam_direction(g, s, t, b1, b2, eps, eps_root, nesterov)


def adamw(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=1e-4, nesterov=False):
    """Algorithm 2 of Loshchilov and Hutter, with the rate on the decay too."""
    return p - learning_rate * (adam_direction(g, s, t, b1, b2, eps, eps_root, nesterov) + weight_decay * p)


def amsgrad(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Algorithm 2 of Reddi et al., with Adam's corrections."""
    m, v = mean(s, "m", g, b1), mean(s, "v", g * g, b2)
    s["max"] = namespace(g).maximum(s.get("max", 0 * v), v)
    return p - learning_rate * (m / (1 - b1**t)) / ((s["max"] / (1 - b2**t) + eps_root) ** 0.5 + eps)


def adamax(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 2 of Kingma and Ba."""
    m = mean(s, "m", g, b1)
    s["u"] = namespace(g).maximum(b2 * s.get("u", 0 * g), abs(g) + eps)
    return p - learning_rate / (1 - b1**t) * m / s["u"]


def nadam(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, momentum_decay=4e-3):
    """Dozat's Nadam, with the schedule of the momentum."""
    now, ahead = (b1 * (1 - 0.5 * 0.96 ** (k * momentum_decay)) for k in (t, t + 1))
    s["product"] = s.get("product", 1.0) * now
    m, v = mean(s, "m", g, b1), mean(s, "v", g * g, b2)
    m_hat = ahead * m / (1 - s["product"] * ahead) + (1 - now) * g / (1 - s["product"])
    return p - learning_rate * m_hat / ((v / (1 - b2**t) + eps_root) ** 0.5 + eps)


def radam(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, threshold=5.0):
    """Algorithm 2 of Liu et al."""
    m, v = mean(s, "m", g, b1) / (1 - b1**t), mean(s, "v", g * g, b2)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    r = abs((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    rectified = m * r * (1 - b2**t) ** 0.5 / ((v + eps_root) ** 0.5 + eps)
    return p - learning_rate * namespace(g).where(rho > threshold, rectified, m)


def adabelief(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16):
    """Algorithm 2 of Zhuang et al."""
    m = mean(s, "m", g, b1)
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * (g - m) ** 2 + eps_root
    return p - learning_rate * (m / (1 - b1**t)) / ((s["v"] / (1 - b2**t)) ** 0.5 + eps)


def yogi(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-3, eps_root=0.0, initial_accumulator_value=1e-6):
    """Algorithm 2 of Zaheer et al., with Adam's corrections."""
    m, v = mean(s, "m", g, b1), s.get("v", initial_accumulator_value + 0 * g)
    s["v"] = v - (1 - b2) * namespace(g).sign(v - g**2) * g**2
    return p - learning_rate * (m / (1 - b1**t)) / ((s["v"] / (1 - b2**t) + eps_root) ** 0.5 + eps)


def rmsprop(
    p,
    g,
    s,
    t,
    *,
    learning_rate,
    decay=0.9,
    eps=1e-8,
    eps_root=0.0,
    initial_scale=0.0,
    centered=False,
    momentum=0.0,
    nesterov=False,
):
    """Tieleman and Hinton; equations 38 to 40 of Graves for the centered form."""
    s.setdefault("v", initial_scale + 0 * g)
    v = mean(s, "v", g * g, decay)
    if centered:
        v = v - mean(s, "m", g, decay) ** 2
    u = g / ((v + eps_root) ** 0.5 + eps)
    s["b"] = momentum * s.get("b", 0.0) + u
    return p - learning_rate * (u + momentum * s["b"] if nesterov else s["b"])


def adagrad(p, g, s, t, *, learning_rate, initial_accumulator_value=0.0, eps=1e-10, eps_root=0.0):
    """Figure 1 of Duchi et al., the diagonal form."""
    s["h"] = s.get("h", initial_accumulator_value) + g * g
    return p - learning_rate * g / ((s["h"] + eps_root) ** 0.5 + eps)


def adadelta(p, g, s, t, *, learning_rate=1.0, rho=0.9, eps=1e-6, weight_decay=0.0):
    """Algorithm 1 of Zeiler."""
    g = g + weight_decay * p
    u = (s.get("x", 0.0) + eps) ** 0.5 / (mean(s, "g", g * g, rho) + eps) ** 0.5 * g
    mean(s, "x", u * u, rho)
    return p - learning_rate * u


def lion(p, g, s, t, *, learning_rate, b1=0.9, b2=0.99, weight_decay=1e-3):
    """Algorithm 2 of Chen et al."""
    direction = namespace(g).sign(b1 * s.get("m", 0 * g) + (1 - b1) * g)
    mean(s, "m", g, b2)
    return p - learning_rate * (direction + weight_decay * p)


def lamb(p, g, s, t, *, learning_rate, b1=0.9, b2=0.999, eps=1e-6, eps_root=0.0, weight_decay=0.0):
    """Algorithm 2 of You et al. 2020, with phi the identity."""
    u = adam_direction(g, s, t, b1, b2, eps, eps_root) + weight_decay * p
    return p - learning_rate * norm(p) / norm(u) * u


def lars(p, g, s, t, *, learning_rate, weight_decay=0.0, trust_coefficient=1e-3, eps=0.0, momentum=0.9, nesterov=False):
    """Algorithm 1 of You et al. 2017, with the decay inside the norm."""
    g = g + weight_decay * p
    u = learning_rate * trust_coefficient * norm(p) / (norm(g) + eps) * g
    s["v"] = momentum * s.get("v", 0.0) + u
    return p - (u + momentum * s["v"] if nesterov else s["v"])


def adan(p, g, s, t, *, learning_rate, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, eps_root=0.0, weight_decay=0.0):
    """Algorithm 1 of Xie et al., with the authors' corrections and decoupled decay."""
    d = g - s.get("g", g)
    s["g"] = g
    m, v, n = mean(s, "m", g, b1), mean(s, "v", d, b2), mean(s, "n", (g + b2 * d) ** 2, b3)
    root = (n / (1 - b3**t) + eps_root) ** 0.5
    return p - learning_rate * ((m / (1 - b1**t) + b2 * v / (1 - b2**t)) / (root + eps) + weight_decay * p)


def orthogonal(m, steps, eps):
    """Newton-Schulz iterations of Jordan et al."""
    if m.shape[0] > m.shape[1]:
        return orthogonal(m.T, steps, eps).T
    x = m / namespace(m).maximum(norm(m), eps + 0 * norm(m))
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def muon(
    p,
    g,
    s,
    t,
    *,
    learning_rate,
    momentum=0.95,
    nesterov=True,
    ns_steps=5,
    eps=1e-7,
    weight_decay=0.1,
    adam_learning_rate=None,
    adam_b1=0.9,
    adam_b2=0.95,
    adam_eps=1e-8,
    adam_eps_root=0.0,
):
    """Jordan et al. for matrices, AdamW for all else."""
    if p.ndim != 2:
        rate = learning_rate if adam_learning_rate is None else adam_learning_rate
        return p - rate * (adam_direction(g, s, t, adam_b1, adam_b2, adam_eps, adam_eps_root) + weight_decay * p)
    m = mean(s, "m", g, momentum)
    d = momentum * m + (1 - momentum) * g if nesterov else m
    stretch = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
    return p - learning_rate * (stretch * orthogonal(d, ns_steps, eps) + weight_decay * p)


def schedule_free(y, g, s, t, *, learning_rate, b1=0.9, weight_lr_power=2.0, b2=None, eps=1e-8):
    """Algorithm 1 of Defazio et al., for SGD or, with b2, for Adam without momentum."""
    if b2 is not None:
        g = adam_direction(g, s, t, 0.0, b2, eps, 0.0)
    s["rate"] = namespace(learning_rate).maximum(s.get("rate", learning_rate), learning_rate)
    s["sum"] = s.get("sum", 0.0) + s["rate"] ** weight_lr_power
    c = s["rate"] ** weight_lr_power / s["sum"]
    s["z"] = s.get("z", y) - learning_rate * g
    s["x"] = (1 - c) * s.get("x", y) + c * s["z"]
    return (1 - b1) * s["z"] + b1 * s["x"]


def sam(leaves, gradients, memory, t, *, learning_rate, rho, momentum=0.0, adaptive=False):
    """Foret et al., and Kwon et al. for the adaptive form, around SGD."""
    grads = gradients(leaves)
    scales = [p if adaptive else 1.0 for p in leaves]
    length = sum(norm(a * g) ** 2 for a, g in zip(scales, grads, strict=True)) ** 0.5
    near = [p + rho * a * a * g / length for p, a, g in zip(leaves, scales, grads, strict=True)]
    pairs = zip(leaves, gradients(near), strict=True)
    options = {"learning_rate": learning_rate, "momentum": momentum}
    return [sgd(p, g, memory.setdefault(i, {}), t, **options) for i, (p, g) in enumerate(pairs)]


def prodigy(
    leaves,
    gradients,
    memory,
    t,
    *,
    learning_rate=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    b3=None,
    d0=1e-6,
    d_coefficient=1.0,
    weight_decay=0.0,
):
    """Mishchenko and Defazio's Prodigy for Adam, with the corrections of the authors' code."""
    b3 = b2**0.5 if b3 is None else b3
    first, d = memory.setdefault("first", leaves), memory.get("d", d0)
    a = learning_rate * d * (1 - b2**t) ** 0.5 / (1 - b1**t)
    r, total, new = b3 * memory.get("r", 0.0), 0.0, []
    for i, (p, g) in enumerate(zip(leaves, gradients(leaves), strict=True)):
        s = memory.setdefault(i, {})
        m, v = mean(s, "m", d * g, b1), mean(s, "v", d**2 * g**2, b2)
        s["s"] = b3 * s.get("s", 0.0) + d * a / d0**2 * g
        r, total = r + d * a / d0**2 * (g * (first[i] - p)).sum(), total + abs(s["s"]).sum()
        new.append(p - a * (m / ((v + d**2 * eps_root) ** 0.5 + d * eps) + weight_decay * p))
    memory["r"], memory["d"] = r, namespace(r).maximum(d + 0 * r, d_coefficient * r / total)
    return new


WHOLE = {f.__name__: f for f in (sam, prodigy)}
FORMULAS = {
    f.__name__: f
    for f in (
        *(sgd, adam, adamw, amsgrad, adamax, nadam, radam, adabelief, yogi, rmsprop, adagrad, adadelta, lion, lamb),
        *(lars, adan, muon, schedule_free, sam, prodigy),
    )
}
