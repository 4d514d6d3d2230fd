import pytest
import torch

from diffopt.multilevel.single_loop import BilevelProblem
from diffopt.multilevel.single_loop.problem import products_of
from multilevel.single_loop.methods import Matrices, assert_close, small
from multilevel.single_loop.quadratic_benchmark import F64, START, benchmark

I, J = torch.tensor([3, 17, 5, 3]), torch.tensor([2, 11])


@pytest.fixture
def at():
    made = small()
    v = torch.tensor([0.3, -1.2, 0.7], dtype=F64)
    return made, *products_of(made.problem, made.z, made.x), v


def test_products_are_those_of_explicit_matrices(at):
    made, products, z, x, v = at
    by_matrix = Matrices(made, I, J)
    assert_close(products.inner_z(z, x, I), by_matrix.inner_z(z, x))
    assert_close(products.inner_x(z, x, I), by_matrix.inner_x(z, x))
    assert_close(products.outer_z(z, x, J), by_matrix.outer_z(z, x))
    assert_close(products.outer_x(z, x, J), by_matrix.outer_x(z, x))
    assert_close(products.outer(z, x, J), (by_matrix.outer_z(z, x), by_matrix.outer_x(z, x)))
    assert_close(products.hessian(z, x, v, I), by_matrix.hessian @ v)
    assert_close(products.cross(z, x, v, I), by_matrix.cross @ v)
    assert_close(products.inner(z, x, v, I), (by_matrix.inner_z(z, x), by_matrix.hessian @ v, by_matrix.cross @ v))


def test_rows_are_those_of_single_samples(at):
    _, products, z, x, v = at
    inner, outer = products.inner_rows(z, x, v, I), products.outer_rows(z, x, J)
    for row, i in zip(inner, I, strict=True):
        assert_close(row, torch.cat(products.inner(z, x, v, i[None])))
    for row, j in zip(outer, J, strict=True):
        assert_close(row, torch.cat(products.outer(z, x, j[None])))


def test_the_gradient_of_the_benchmark_is_that_of_its_value():
    made = small()

    def value(x):
        return made.problem.outer(made.solution(x), x, made.problem.outer_data)

    assert_close(made.gradient(made.x), torch.func.grad(value)(made.x))
    slope = torch.func.grad(lambda z: made.problem.inner(z, made.x, made.problem.inner_data))(made.solution(made.x))
    assert slope.abs().max() < 1e-12


def test_the_benchmark_starts_where_it_says_with_its_spectra():
    made = benchmark()
    assert made.error(made.x) == pytest.approx(START)
    eigenvalues = torch.linalg.eigvalsh(made.inner["zz"])
    assert 0.09 < eigenvalues[0] < 0.11  # sampled from a spectrum in [0.1, 1]
    assert 0.9 < eigenvalues[-1] < 1.15


def test_bad_problems_raise():
    loss, data = small().problem.inner, torch.ones(3)
    with pytest.raises(TypeError, match="`outer` must be a function"):
        BilevelProblem(loss, None, data, data)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"`inner_data.*must be a tensor"):
        BilevelProblem(loss, loss, {"a": 3.0}, data)
    for empty in ({}, torch.ones(()), torch.ones(0, 2), (torch.ones(3), torch.ones(4))):
        with pytest.raises(ValueError, match="`outer_data` must have the samples first"):
            BilevelProblem(loss, loss, data, empty)
