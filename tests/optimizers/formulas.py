"""The update equations in NumPy, one leaf at a time, as references that share no code with diffopt."""

import numpy as np

__all__ = ["FORMULAS"]


def orthogonal(m):
    """Five Newton-Schulz iterations of Muon."""
    tall = m.shape[0] > m.shape[1]
    x = (m.T if tall else m) / np.linalg.norm(m)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x.T if tall else x


def adabelief(p, g, s, t, lr=0.05, b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-4):
    """Algorithm 2 of Zhuang et al."""
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["s"] = b2 * s.get("s", 0) + (1 - b2) * (g - s["m"]) ** 2 + eps_root
    return p - lr * (s["m"] / (1 - b1**t)) / (np.sqrt(s["s"] / (1 - b2**t)) + eps)


def lion(p, g, s, t, lr=0.02, b1=0.8, b2=0.9, wd=0.1):
    """Algorithm 2 of Chen et al."""
    m = s.get("m", 0 * g)
    s["m"] = b2 * m + (1 - b2) * g
    return p - lr * (np.sign(b1 * m + (1 - b1) * g) + wd * p)


def lamb(p, g, s, t, lr=0.05, b1=0.8, b2=0.9, eps=1e-3, wd=0.1):
    """Algorithm 2 of You et al. 2020, with phi the identity."""
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    u = (s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + eps) + wd * p
    return p - lr * np.sqrt((p**2).sum()) / np.sqrt((u**2).sum()) * u


def lars(p, g, s, t, lr=0.05, wd=0.1, trust=0.7, momentum=0.6):
    """Algorithm 1 of You et al. 2017, with the decay inside the norm."""
    u = g + wd * p
    s["v"] = momentum * s.get("v", 0) + lr * trust * np.sqrt((p**2).sum()) / np.sqrt((u**2).sum()) * u
    return p - s["v"]


def yogi(p, g, s, t, lr=0.05, b1=0.8, b2=0.9, eps=1e-3, start=1e-2):
    """Algorithm 2 of Zaheer et al., with Adam's bias corrections."""
    v = s.get("v", start + 0 * g)
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = v - (1 - b2) * np.sign(v - g**2) * g**2
    return p - lr * (s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + eps)


def adan(p, g, s, t, lr=0.05, b1=0.8, b2=0.9, b3=0.7, eps=1e-3, wd=0.1):
    """Algorithm 1 of Xie et al., with bias corrections and decoupled decay."""
    d = g - s.get("g", g)
    s["g"] = g
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * d
    s["n"] = b3 * s.get("n", 0) + (1 - b3) * (g + b2 * d) ** 2
    m, v, n = s["m"] / (1 - b1**t), s["v"] / (1 - b2**t), s["n"] / (1 - b3**t)
    return p - lr * ((m + b2 * v) / (np.sqrt(n) + eps) + wd * p)


def muon(p, g, s, t, lr=0.05, momentum=0.6, wd=0.1, b1=0.8, b2=0.9, eps=1e-3):
    """Jordan et al. for matrices, AdamW for all else."""
    if p.ndim == 2:
        s["m"] = momentum * s.get("m", 0) + (1 - momentum) * g
        d = (1 - momentum) * g + momentum * s["m"]
        return p - lr * (np.sqrt(max(1, p.shape[0] / p.shape[1])) * orthogonal(d) + wd * p)
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return p - lr * ((s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + eps) + wd * p)


def schedule_free(y, g, s, t, lr=0.05, beta=0.8):
    """Equations 5 to 7 of Defazio et al., with a constant rate, for which c = 1/t."""
    s["z"] = s.get("z", y) - lr * g
    s["x"] = (1 - 1 / t) * s.get("x", y) + s["z"] / t
    return (1 - beta) * s["z"] + beta * s["x"]


FORMULAS = {f.__name__: f for f in (adabelief, lion, lamb, lars, yogi, adan, muon, schedule_free)}
