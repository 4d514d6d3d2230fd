"""Rows of the composition matrix: projections and proxes, against closed forms on active sets written down by hand."""

import torch

from diffopt import convex

__all__ = ["CONVEX_ROWS"]


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def on(*places, size):
    """The indicator of some places."""
    return f64([float(i in places) for i in range(size)])


def onto_rows(x, C, d):
    """The projection onto C y = d."""
    return x - C.T @ torch.linalg.inv(C @ C.T) @ (C @ x - d)


X = f64([0.6, 0.1, -0.4, 0.55])
CLEAR = f64([0.6, 0.2, -0.4, 0.55])  # each entry far from the threshold of the simplex
RADIUS = f64(0.9)
HALVES = f64([0.5, -0.4, 0.8])
NORMAL = f64([0.7, -0.5, 0.4])
SQUARE = f64([[0.9, 0.2, -0.5], [0.4, -0.7, 0.3], [0.1, 0.6, 0.35]])
ORTHOGONAL = torch.linalg.qr(f64([[1.0, 0.3, -0.5], [0.4, -0.7, 0.3], [0.1, 0.6, 0.9]]))[0]
SUPPORT = f64([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
PATTERN = f64([[0.8, 0.5, -3.0], [-3.0, -2.5, 0.9], [-2.0, 0.7, 0.6]])


def on_simplex(x, value, support):
    return support * (x - ((x * support).sum() - value) / support.sum())


def simplex_row():
    return convex.projection_simplex, (CLEAR, f64(1.0)), lambda x, s: on_simplex(x, s, on(0, 1, 3, size=4)), None


def kl_simplex_row():
    return convex.kl_projection_simplex, (X, f64(1.3)), lambda x, s: s * x.exp() / x.exp().sum(), None


def non_negative_row():
    return convex.projection_non_negative, (X,), lambda x: x * on(0, 1, 3, size=4), None


def box_row():
    def reference(x, low, high):
        return x * on(1, size=4) + low * on(2, size=4) + high * on(0, 3, size=4)

    return convex.projection_box, (X, f64(-0.2), f64([0.3, 0.35, 0.4, 0.25])), reference, None


def box_section_row():
    """One entry at each bound, one of weight 0, two free, of weights of both signs."""
    w = f64([0.8, -0.6, 0.0, 0.5, 0.4])

    def operator(x, bounds, w, c):
        return convex.projection_box_section(x, bounds[0], bounds[1], w * w0, c)

    w0 = on(0, 1, 3, 4, size=5)

    def reference(x, bounds, w, c):
        w = w * w0
        low, high, free = on(1, size=5) * 0 + on(4, size=5), on(3, size=5), on(0, 1, size=5)
        pinned = low * bounds[0] + high * bounds[1]
        tau = ((free * w * x).sum() + (w * pinned).sum() - c) / (free * w * w).sum()
        return free * (x - tau * w) + pinned + on(2, size=5) * x

    return operator, (f64([0.5, 0.3, 0.4, 3.0, -3.0]), f64([-1.1, 1.2]), w, f64(0.6)), reference, None


def l1_ball_row():
    def reference(x, r):
        return x.sign().detach() * on_simplex(x.abs(), r, on(0, 2, 3, size=4))

    return convex.projection_l1_ball, (X, RADIUS), reference, None


def l1_sphere_row():
    sign = f64([1.0, -1.0, 1.0])
    return (
        convex.projection_l1_sphere,
        (HALVES, f64(2.3)),
        lambda x, r: sign * on_simplex(sign * x, r, on(0, 1, 2, size=3)),
        None,
    )


def l2_row(projection):
    return projection, (HALVES, f64(0.7)), lambda x, r: r * x / (x * x).sum().sqrt(), None


def linf_row():
    def reference(x, r):
        return r * f64([1.0, 0.0, 0.0, 1.0]) + x * on(1, 2, size=4)

    return convex.projection_linf_ball, (X, f64(0.48)), reference, None


def hyperplane_row(projection):
    def reference(x, a, b):
        return x - ((a * x).sum() - b) / (a * a).sum() * a

    return projection, (HALVES, NORMAL, f64(0.3)), reference, None


A = f64([[0.5, -0.4, 0.8, 0.3], [0.2, 0.7, -0.3, 0.6]])


def affine_row():
    return convex.projection_affine_set, (X, A, f64([0.4, -0.3])), onto_rows, None


def polyhedron_row():
    """One equation, and three inequalities of which the second holds with equality."""
    G = f64([[0.3, 0.2, -0.1, 0.5], [-0.9, 0.3, 0.2, -0.4], [0.1, 0.6, 0.4, -0.2]])

    def operator(x, A, b, G, h):
        return convex.projection_polyhedron(x, A, b, G, h, max_steps=4)

    def reference(x, A, b, G, h):
        return onto_rows(x, torch.cat([A, G[1:2]]), torch.cat([b, h[1:2]]))

    return operator, (X, A[:1], f64([0.4]), G, f64([2.0, -1.3, 2.5])), reference, None


def on_pattern(X, a, b):
    """The plan on a support without cycles but one, from the equations of its multipliers but the last."""
    system = torch.cat([torch.cat([torch.diag(SUPPORT.sum(1)), SUPPORT], 1),
                        torch.cat([SUPPORT.T, torch.diag(SUPPORT.sum(0))], 1)])[:-1, :-1]  # fmt: skip
    side = torch.cat([a - (SUPPORT * X).sum(1), b - (SUPPORT * X).sum(0)])[:-1]
    shifts = torch.cat([torch.linalg.inv(system) @ side, side.new_zeros(1)])
    return SUPPORT * (X + shifts[:3, None] + shifts[3:])


def transport_row():
    def marginals(theta):
        return torch.softmax(theta[:3], 0), torch.softmax(theta[3:], 0)

    def operator(X, theta):
        return convex.projection_transport(X, marginals(theta), max_steps=12)

    theta = f64([0.2, -0.1, 0.1, -0.15, 0.1, 0.3])
    return operator, (PATTERN, theta), lambda X, theta: on_pattern(X, *marginals(theta)), None


def birkhoff_row():
    ones = torch.ones(3, dtype=torch.float64)

    def reference(X):
        return on_pattern(X, ones, ones)

    return lambda X: convex.projection_birkhoff(X, max_steps=12), (PATTERN,), reference, None


def sinkhorn(X, a, b):
    """Rounds enough to be the limit, whose derivatives are those of the limit."""
    alpha = torch.zeros_like(a)
    for _ in range(40):
        beta = b.log() - (X + alpha[:, None]).logsumexp(0)
        alpha = a.log() - (X + beta).logsumexp(1)
    return (X + alpha[:, None] + beta).exp()


SMALL = f64([[0.5, -0.2], [0.1, 0.4], [-0.3, 0.2]])


def kl_transport_row():
    def marginals(theta):
        return torch.softmax(theta[:3], 0), torch.softmax(theta[3:], 0)

    def operator(X, theta):
        return convex.kl_projection_transport(X, marginals(theta), max_steps=5)

    theta = f64([0.2, -0.1, 0.1, -0.15, 0.1])
    return operator, (SMALL, theta), lambda X, theta: sinkhorn(X, *marginals(theta)), None


def kl_birkhoff_row():
    ones = torch.ones(2, dtype=torch.float64)
    return (
        lambda X: convex.kl_projection_birkhoff(X, max_steps=5),
        (SMALL[:2],),
        lambda X: sinkhorn(X, ones, ones),
        None,
    )


def second_order_cone_row():
    def reference(x, t):
        length = (x * x).sum().sqrt()
        height = (length + t) / 2
        return height * x / length, height

    return lambda x, t: convex.projection_second_order_cone((x, t)), (HALVES, f64(0.4)), reference, None


def positive_part(X, steps=12):
    """By Newton's iteration for the sign of a matrix, plainly differentiable."""
    X = (X + X.mT) / 2
    sign = X / torch.linalg.matrix_norm(X.detach())
    for _ in range(steps):
        sign = (sign + torch.linalg.inv(sign)) / 2
    return (X + X @ sign) / 2


def psd_row():
    """A matrix with a repeated positive eigenvalue, whose eigenvectors torch cannot differentiate."""
    X = ORTHOGONAL @ torch.diag(f64([1.3, 1.3, -0.8])) @ ORTHOGONAL.T
    return convex.projection_psd_cone, (X,), positive_part, None


def nuclear_row():
    """Singular values 1.5 twice, which stay, and 0.2, which goes."""
    X = ORTHOGONAL @ torch.diag(f64([1.5, 1.5, 0.2])) @ SQUARE.matrix_exp()
    U, _, V = torch.linalg.svd(X)
    X = U @ torch.diag(f64([1.5, 1.5, 0.2])) @ V

    def reference(x, strength, scaling):
        top = torch.cat([x.new_zeros(3, 3), x], 1)
        both = torch.cat([top, torch.cat([x.T, x.new_zeros(3, 3)], 1)])
        both = both - strength * scaling * torch.eye(6, dtype=x.dtype)
        return 2 * positive_part(both)[:3, 3:]

    return convex.prox_nuclear, (X, f64(0.6), f64(0.9)), reference, None


def entrywise_row(prox, formula, hyper):
    return prox, (X, f64(hyper), f64(0.8)), formula, None


def lasso(x, strength, s):
    return x.sign().detach() * (x.abs() - s * strength) * on(0, 2, 3, size=4)


def group_lasso_row():
    def reference(x, strength, s):
        return x * (1 - s * strength / (x * x).sum().sqrt())

    return convex.prox_group_lasso, (HALVES, f64(0.4), f64(0.8)), reference, None


def elastic_net_row():
    def reference(x, lam, gamma, s):
        return lasso(x, lam, s) / (1 + s * lam * gamma)

    return convex.prox_elastic_net, (X, f64(0.3), f64(0.7), f64(0.8)), reference, None


def from_projection_row():
    def operator(x, value, s):
        return convex.prox_from_projection(lambda x: convex.projection_simplex(x, value))(x, s)

    return operator, (CLEAR, f64(1.0), f64(0.8)), lambda x, v, s: on_simplex(x, v, on(0, 1, 3, size=4)) + 0 * s, None


def isotonic_row():
    blocks = f64([[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]])

    def reference(y, w):
        return blocks.T @ ((blocks @ (w * y)) / (blocks @ w))

    return convex.isotonic_regression, (f64([0.1, 0.6, 0.3, 1.2, 0.9]), f64([0.5, 1.2, 0.8, 0.9, 1.1])), reference, None


MASK = on(0, 1, 3, size=4)
CONVEX_ROWS = {
    "projection_non_negative": non_negative_row,
    "projection_box": box_row,
    "projection_box_section": box_section_row,
    "projection_simplex": simplex_row,
    "kl_projection_simplex": kl_simplex_row,
    "projection_l1_ball": l1_ball_row,
    "projection_l1_sphere": l1_sphere_row,
    "projection_l2_ball": lambda: l2_row(convex.projection_l2_ball),
    "projection_l2_sphere": lambda: l2_row(convex.projection_l2_sphere),
    "projection_linf_ball": linf_row,
    "projection_hyperplane": lambda: hyperplane_row(convex.projection_hyperplane),
    "projection_halfspace": lambda: hyperplane_row(convex.projection_halfspace),
    "projection_affine_set": affine_row,
    "projection_polyhedron": polyhedron_row,
    "projection_transport": transport_row,
    "projection_birkhoff": birkhoff_row,
    "kl_projection_transport": kl_transport_row,
    "kl_projection_birkhoff": kl_birkhoff_row,
    "projection_second_order_cone": second_order_cone_row,
    "projection_psd_cone": psd_row,
    "prox_none": lambda: (convex.prox_none, (X, f64(0.8)), lambda x, s: x + 0 * s, None),
    "prox_lasso": lambda: entrywise_row(convex.prox_lasso, lasso, 0.3),
    "prox_elastic_net": elastic_net_row,
    "prox_group_lasso": group_lasso_row,
    "prox_ridge": lambda: entrywise_row(convex.prox_ridge, lambda x, l, s: x / (1 + s * l), 0.3),
    "prox_nuclear": nuclear_row,
    "prox_non_negative_lasso": lambda: entrywise_row(
        convex.prox_non_negative_lasso, lambda x, l, s: (x - s * l) * on(0, 3, size=4), 0.3
    ),
    "prox_non_negative_ridge": lambda: entrywise_row(
        convex.prox_non_negative_ridge, lambda x, l, s: x * MASK / (1 + s * l), 0.3
    ),
    "prox_from_projection": from_projection_row,
    "isotonic_regression": isotonic_row,
}
