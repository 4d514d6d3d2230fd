"""diffopt.meta.reweight: weights against the closed form of a linear model and differences of the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from diffopt import adam, random, sgd, tree
from diffopt.meta import reweight
from diffopt.testing import check_composition, check_hypergradient

F64 = torch.float64


def squares(w, data):
    X, y = data
    return (X @ w - y) ** 2 / 2


def mean_square(w, data):
    return squares(w, data).mean()


def draw(seed, n, d=3):
    key_x, key_y = random.split(random.key(seed), 2)
    return random.normal(key_x, (n, d), dtype=F64), random.normal(key_y, (n,), dtype=F64)


def linear_weights(w, batch, meta):
    """The gradient of example i is r_i x_i; its weight is its product with the mean gradient of the meta set."""
    (X, y), (Z, t) = batch, meta
    agreement = (X @ w - y) * (X @ (Z.T @ (Z @ w - t)))
    positive = agreement.clamp(min=0)
    return positive / positive.sum()


W = torch.tensor([0.4, -0.9, 0.6], dtype=F64)


@given(seed=st.integers(0, 1000), n=st.integers(2, 12))
@settings(max_examples=25)
def test_a_linear_model_has_the_closed_form(seed, n):
    batch, meta = draw(seed, n), draw(seed + 5000, 4)
    found = reweight(squares, mean_square)(W, batch, meta)
    want = linear_weights(W, batch, meta).nan_to_num(0.0)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(found, reweight(squares, mean_square, sgd(0.3))(W, batch, meta, sgd(0.3).init(W)))


def test_weights_are_minus_the_differences_of_the_meta_loss_in_the_examples_weights():
    """By the definition, through a step of an optimizer that has moved before."""
    batch, meta = draw(0, 6), draw(1, 4)
    for optimizer in (sgd(0.2, momentum=0.9), adam(0.1, eps_root=1e-3)):
        _, state = optimizer.update(torch.tensor([0.5, -0.3, 0.2], dtype=F64), optimizer.init(W), W)

        def after(epsilon, optimizer=optimizer, state=state):
            slopes = grad(lambda w: epsilon @ squares(w, batch))(W)
            return mean_square(tree.add(W, optimizer.update(slopes, state, W)[0]), meta)

        h = 1e-6
        helpful = torch.stack([(after(-h * e) - after(h * e)) / (2 * h) for e in torch.eye(6, dtype=F64)]).clamp(min=0)
        found = reweight(squares, mean_square, optimizer)(W, batch, meta, state)
        torch.testing.assert_close(found, helpful / helpful.sum(), rtol=1e-6, atol=1e-8)


def test_flipped_labels_get_no_weight():
    """Two far clusters, an untrained classifier with a tree of parameters: the wrong labels all pull the wrong way."""
    labels = torch.arange(40) % 2
    images = torch.stack([2.0 * labels - 1, torch.ones(40)], 1) * (1 + 0.1 * random.normal(random.key(0), (40, 2)))
    wrong = torch.arange(40) % 5 == 0
    noisy = torch.where(wrong, 1 - labels, labels)

    def losses(params, data):
        return cross_entropy(data[0] @ params["w"] + params["b"], data[1], reduction="none")

    params = {"w": 0.01 * random.normal(random.key(1), (2, 2)), "b": torch.full((2,), 0.01)}
    weights = reweight(losses, lambda p, data: losses(p, data).mean())
    found = weights(params, (images, noisy), (images[:8], labels[:8]))
    assert (found[wrong] == 0).all()
    assert (found[~wrong] > 0).all()
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))


def test_where_no_example_helps_all_weights_are_zero():
    X, y = torch.ones(3, 1, dtype=F64), torch.full((3,), 2.0, dtype=F64)
    w = torch.tensor([0.5], dtype=F64)
    found = reweight(squares, mean_square)(w, (X, -y), (X, y))
    torch.testing.assert_close(found, torch.zeros(3, dtype=F64))
    slope = grad(lambda w: reweight(squares, mean_square)(w, (X, -y), (X, y)).sum())(w)
    torch.testing.assert_close(slope, torch.zeros(1, dtype=F64))


def test_weights_map_over_seeds_and_are_constants_to_the_training_step():
    batches = tuple(torch.stack(parts) for parts in zip(draw(0, 6), draw(2, 6), draw(4, 6), strict=True))
    meta = draw(1, 4)
    weights = reweight(squares, mean_square)
    mapped = vmap(weights, in_dims=(None, 0, None))(W, batches, meta)
    looped = torch.stack([weights(W, (batches[0][i], batches[1][i]), meta) for i in range(3)])
    torch.testing.assert_close(mapped, looped)
    assert not looped.requires_grad
    assert not reweight(squares, mean_square, sgd(0.1))(W, draw(0, 6), meta, sgd(0.1).init(W)).requires_grad


def test_weights_compose():
    batch = draw(0, 4)
    cells = ["forward", "grad", "vjp", "jvp", "hessian", "vmap(grad)", "dual_level", "grad(vmap(grad))"]
    operator = lambda w, Z, t: reweight(squares, mean_square)(w, batch, (Z, t))  # noqa: E731
    check_composition(operator, (W, *draw(1, 3)), lambda w, Z, t: linear_weights(w, batch, (Z, t)), cells=cells)


def test_derivatives_in_what_the_losses_captured():
    batch, meta = draw(0, 5), draw(1, 4)
    probe = torch.linspace(0.5, 1.5, 5, dtype=F64)

    def value(shift, rate):
        shifted = lambda w, data: squares(w + shift, data)  # noqa: E731
        optimizer = sgd(rate, momentum=0.5)
        state = optimizer.update(W, optimizer.init(W), W)[1]
        plain = reweight(shifted, mean_square)(W, batch, meta)
        return probe @ (plain + reweight(shifted, mean_square, optimizer)(W, batch, meta, state))

    check_hypergradient(value, (torch.tensor(0.2, dtype=F64), torch.tensor(0.1, dtype=F64)))


def test_weights_neither_overflow_nor_hide_what_is_not_finite():
    batch, meta = (torch.ones(9, 1), torch.ones(9)), (torch.ones(1, 1), torch.ones(1))
    scale = 5e37  # nine agreements of this size exceed what float32 has
    large = reweight(lambda w, data: scale * squares(w, data), mean_square)(torch.zeros(1), batch, meta)
    torch.testing.assert_close(large, torch.full((9,), 1 / 9))
    broken = (batch[0], torch.tensor([1.0] * 8 + [float("nan")]))
    assert reweight(squares, mean_square)(torch.zeros(1), broken, meta).isnan().all()


def test_errors_come_early():
    batch, meta = draw(0, 5), draw(1, 4)
    with pytest.raises(TypeError, match="meta_loss"):
        reweight(squares, 3.0)
    with pytest.raises(TypeError, match="GradientTransformation"):
        reweight(squares, mean_square, 0.1)
    with pytest.raises(ValueError, match="reduction"):
        reweight(mean_square, mean_square)(W, batch, meta)
    with pytest.raises(ValueError, match="reduction"):
        reweight(squares, mean_square)(W, (batch[0][:0], batch[1][:0]), meta)
    with pytest.raises(TypeError, match="scalar"):
        reweight(squares, squares)(W, batch, meta)
    with pytest.raises(TypeError, match="floating"):
        reweight(squares, mean_square)(torch.tensor([1, 2, 3]), batch, meta)
    with pytest.raises(ValueError, match="state"):
        reweight(squares, mean_square, sgd(0.1))(W, batch, meta)
    with pytest.raises(ValueError, match="state"):
        reweight(squares, mean_square)(W, batch, meta, sgd(0.1).init(W))
    with pytest.raises(ValueError, match="`state` must have the structure"):
        reweight(squares, mean_square, adam(0.1))(W, batch, meta, sgd(0.1).init(W))
    with pytest.raises(TypeError, match=r"`losses` must return floating-point numbers; got torch.int64"):
        reweight(lambda w, data: (squares(w, data) > 1).long(), mean_square)(W, batch, meta)
