"""diffopt.solvers.lbfgs: the product with the inverse Hessian, minimizers, scikit-learn, batches, derivatives."""

import pytest
import scipy.optimize
import torch

from diffopt.solvers import LBFGS, HagerZhang, Zoom, minimize
from diffopt.solvers.lbfgs import inverse_hessian_product
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import PROBLEMS, digits, rosenbrock

LOOSE = {"powell_singular": 1e-2}


def pairs(m, n=8):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(m, n, dtype=torch.float64, generator=generator)
    A = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return steps, steps @ (A @ A.mT + torch.eye(n, dtype=torch.float64))


def explicit_inverse(steps, changes):
    """The recursion H+ = V' H V + rho s s', V = I - rho y s', from gamma I."""
    eye = torch.eye(steps.shape[1], dtype=steps.dtype)
    H = (steps[-1] @ changes[-1]) / (changes[-1] @ changes[-1]) * eye
    for s, y in zip(steps, changes, strict=True):
        rho = 1 / (s @ y)
        V = eye - rho * torch.outer(y, s)
        H = V.mT @ H @ V + rho * torch.outer(s, s)
    return H


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("empty", [0, 3])
def test_product_is_the_explicit_recursion(m, empty):
    steps, changes = pairs(m)
    H = explicit_inverse(steps, changes)
    none = torch.zeros(empty, 8, dtype=torch.float64)
    product = torch.func.vmap(lambda v: inverse_hessian_product(
        torch.cat([none, steps]), torch.cat([none, changes]), v))  # fmt: skip
    torch.testing.assert_close(product(torch.eye(8, dtype=torch.float64)), H, rtol=1e-9, atol=1e-9)


def test_secant_equation_holds_for_the_last_pair():
    steps, changes = pairs(4)
    torch.testing.assert_close(inverse_hessian_product(steps, changes, changes[-1]), steps[-1])


def test_no_pairs_are_the_identity():
    v = torch.tensor([1.0, -2.0])
    for m in (0, 3):
        torch.testing.assert_close(inverse_hessian_product(torch.zeros(m, 2), torch.zeros(m, 2), v), v)


def test_memory_0_is_gradient_descent():
    start = PROBLEMS["matyas"].start
    fn, search = PROBLEMS["matyas"].fn, Zoom()
    state = LBFGS(memory=0).init(fn, start)
    for _ in range(3):
        slope, before = state.residual, state.x
        state = LBFGS(memory=0, line_search=search).step(fn, state)
        moved = state.x - before
        torch.testing.assert_close(moved / moved.norm(), -slope / slope.norm())


def test_negative_memory_is_refused():
    with pytest.raises(ValueError, match="memory must be a non-negative int"):
        LBFGS(memory=-1)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "rosenbrock_100"])
def test_minimizers(name):
    check_minimizer(LBFGS(), name, within=LOOSE.get(name, 1e-5))


def test_a_hundred_unknowns():
    check_minimizer(LBFGS(), "rosenbrock_100", max_steps=2000)


def test_hager_zhang():
    check_minimizer(LBFGS(line_search=HagerZhang()), "rosenbrock_10")


def test_as_few_steps_as_scipy():
    start = PROBLEMS["rosenbrock_10"].start
    found = minimize(rosenbrock, start, rtol=0.0, atol=1e-5)
    peer = scipy.optimize.minimize(scipy.optimize.rosen, start.numpy(), jac=scipy.optimize.rosen_der, method="L-BFGS-B")
    assert int(found.stats.steps) <= 1.3 * peer.nit


def test_multinomial_regression_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    images, labels = digits()
    l2 = 1e-2

    def loss(params):
        logits = images @ params["w"] + params["b"]
        return torch.nn.functional.cross_entropy(logits, labels) + l2 / 2 * (params["w"] ** 2).sum()

    start = {"w": torch.zeros(64, 10, dtype=torch.float64), "b": torch.zeros(10, dtype=torch.float64)}
    found = minimize(loss, start)
    peer = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=2000).fit(images.numpy(), labels.numpy())
    torch.testing.assert_close(found.value["w"], torch.as_tensor(peer.coef_.T), rtol=0, atol=1e-4)


def test_logistic_regression_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    images, labels = digits(300)
    odd = (labels % 2).to(images.dtype)

    def loss(w):
        return torch.nn.functional.binary_cross_entropy_with_logits(images @ w, odd, reduction="sum") + w @ w / 2

    found = minimize(loss, torch.zeros(64, dtype=torch.float64))
    peer = LogisticRegression(tol=1e-10, max_iter=2000, fit_intercept=False).fit(images.numpy(), odd.numpy())
    torch.testing.assert_close(found.value, torch.as_tensor(peer.coef_[0]), rtol=0, atol=1e-5)


def test_by_hand():
    check_by_hand(LBFGS())


def test_256_lanes_equal_the_loop_at_every_16th():
    steps = check_lanes(LBFGS(), count=256, every=16)
    assert steps.unique().numel() > 5  # each lane stops on its own


@pytest.mark.slow
def test_256_lanes_equal_the_loop():
    check_lanes(LBFGS(), count=256)


def test_derivatives():
    check_derivatives(LBFGS())


def test_memory_does_not_grow():
    check_memory(LBFGS())
