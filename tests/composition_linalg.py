"""Rows of the composition matrix: linear solves and least squares, against inverses and the explicit series."""

import torch

from diffopt.linalg import (
    LSMR,
    LU,
    QR,
    SVD,
    BiCGStab,
    IterativeRefinement,
    Neumann,
    Tridiagonal,
    block_jacobi,
    linear_solve,
    lstsq,
    matrix_operator,
)
from problems import W

__all__ = ["LINALG_ROWS"]

COMPILED = ("compile", "compile(grad)", "compile(grad(grad))", "compile(vmap(grad))")
ITERATIVE = dict.fromkeys(COMPILED, r"cannot be compiled[^'\")]*")
TIGHT = 1e-13


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


THETA, SIDE = f64(0.4, -0.3, 0.5), f64(1.0, -2.0, 0.5)
SIDES = f64([1.0, 0.3], [-2.0, 0.7], [0.5, -0.4])
EYE = torch.eye(3, dtype=torch.float64)


def general(theta):
    return 2 * EYE + torch.outer(theta, theta.sin()) + W


def banded(theta):
    return torch.tril(torch.triu(general(theta), -1), 1)


def tall(theta):
    return general(theta)[:, :2] + torch.outer(theta, theta[:2] ** 2)


def wide(theta):
    return tall(theta).mT


def deficient(theta):
    """Of rank two, at every theta."""
    return tall(theta) @ (tall(theta.cos()) + 0.3).mT


def solve_row(solver, may_raise=None, matrix=general, tags=(), side=SIDE):
    """x(theta, b) of A(theta) x = b, with the matrix a nonlinear function of theta."""
    return (
        lambda theta, b: linear_solve(matrix_operator(matrix(theta), tags=tags), b, solver),
        (THETA, side),
        lambda theta, b: torch.linalg.inv(matrix(theta)) @ b,
        may_raise,
    )


def by_normal_equations(A, b):
    return torch.linalg.inv(A.mT @ A) @ (A.mT @ b)


def by_dual_equations(A, b):
    return A.mT @ torch.linalg.inv(A @ A.mT) @ b


def by_factors_of_full_rank(theta, b):
    """The pseudo-inverse of a product of a tall and a wide factor, both of full rank."""
    return by_dual_equations((tall(theta.cos()) + 0.3).mT, by_normal_equations(tall(theta), b))


def lstsq_row(solver, matrix, reference, may_raise=None, side=SIDE):
    return (
        lambda theta, b: lstsq(matrix(theta), b, solver),
        (THETA, side),
        lambda theta, b: reference(matrix(theta), b),
        may_raise,
    )


def neumann_row():
    """Far from converged: the derivative is that of the series."""

    def series(theta, b, alpha):
        term = alpha * b
        total = term
        for _ in range(4):
            term = term - alpha * (general(theta) @ term)
            total = total + term
        return total

    def operator(theta, b, alpha):
        return linear_solve(matrix_operator(general(theta)), b, Neumann(4, alpha))

    return operator, (THETA, SIDE, f64(0.3)[0]), series, None


def preconditioned_row():
    def operator(theta, b):
        A = matrix_operator(general(theta))
        return linear_solve(A, b, BiCGStab(rtol=TIGHT, preconditioner=block_jacobi(A, 2)))

    return operator, (THETA, SIDE), lambda theta, b: torch.linalg.inv(general(theta)) @ b, ITERATIVE


def damped_row(solver, may_raise=None):
    def reference(theta, b, damping):
        A = tall(theta)
        return torch.linalg.inv(A.mT @ A + damping * EYE[:2, :2]) @ (A.mT @ b)

    args = THETA, SIDE, f64(0.6)[0]
    return lambda theta, b, damping: lstsq(tall(theta), b, solver, damping=damping), args, reference, may_raise


LINALG_ROWS = {
    "linear_solve, BiCGStab": lambda: solve_row(BiCGStab(rtol=TIGHT), ITERATIVE),
    "linear_solve, BiCGStab, block Jacobi": preconditioned_row,
    "linear_solve, LSMR": lambda: solve_row(LSMR(rtol=TIGHT), ITERATIVE),
    "linear_solve, Neumann": neumann_row,
    "linear_solve, tridiagonal": lambda: solve_row(Tridiagonal(), matrix=banded, tags=["tridiagonal"]),
    "linear_solve, QR": lambda: solve_row(QR()),
    "linear_solve, SVD": lambda: solve_row(SVD()),
    "linear_solve, refined LU": lambda: solve_row(IterativeRefinement(LU())),
    "linear_solve, several right sides": lambda: solve_row(None, side=SIDES),
    "linear_solve, several right sides, BiCGStab": lambda: solve_row(BiCGStab(rtol=TIGHT), ITERATIVE, side=SIDES),
    "lstsq, QR, tall": lambda: lstsq_row(QR(), tall, by_normal_equations),
    "lstsq, QR, wide": lambda: lstsq_row(QR(), wide, by_dual_equations, side=SIDE[:2]),
    "lstsq, SVD, rank-deficient": lambda: (
        lambda theta, b: lstsq(deficient(theta), b, SVD(rcond=1e-9)),
        (THETA, SIDE),
        by_factors_of_full_rank,
        None,
    ),
    "lstsq, LSMR, tall": lambda: lstsq_row(LSMR(rtol=TIGHT), tall, by_normal_equations, ITERATIVE),
    "lstsq, LSMR, wide": lambda: lstsq_row(LSMR(rtol=TIGHT), wide, by_dual_equations, ITERATIVE, SIDE[:2]),
    "lstsq, several right sides": lambda: lstsq_row(None, tall, by_normal_equations, side=SIDES),
    "lstsq, damped": lambda: damped_row(QR()),
    "lstsq, damped, LSMR": lambda: damped_row(LSMR(rtol=TIGHT), ITERATIVE),
}
