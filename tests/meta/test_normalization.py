import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from diffopt.meta.normalization import sound_norms

GENERATOR = torch.Generator().manual_seed(6)
X, WEIGHT, BIAS = (torch.randn(s, dtype=torch.float64, generator=GENERATOR) for s in ((3, 5, 4, 6), (4,), (4,)))
CALLS = {
    "batch": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "batch, positional": lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-4),
    "batch, no weight": lambda x, w, b: F.batch_norm(x, None, None, bias=b, training=True),
    "layer": lambda x, w, b: F.layer_norm(x.mT, (4,), w, b, 1e-4).mT,
    "layer, keywords": lambda x, w, b: F.layer_norm(x.mT, normalized_shape=(4,), weight=w, bias=b, eps=1e-4).mT,
    "instance": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "instance, positional": lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.1, 1e-4),
}


def meta_slopes(norm):
    """The gradient of the loss after a step on scales of the input and weights: under vmap, and by a loop."""

    def loss(params, x):
        scales, weight = params
        return (norm(x * scales + x.sin() * scales**2, weight, BIAS) ** 3).mean()

    def after(scales, weight, x):
        by_scales, by_weight = grad(loss)((scales, weight), x)
        return loss((scales - 0.5 * by_scales, weight - 0.5 * by_weight), x)

    scales = torch.cos(X[0, 0, :, :1])
    batched = lambda *args: vmap(after, in_dims=(None, None, 0))(*args, X).sum()  # noqa: E731
    loop = lambda *args: torch.stack([after(*args, x) for x in X]).sum()  # noqa: E731
    return tuple(grad(fn, argnums=(0, 1))(scales, WEIGHT) for fn in (batched, loop))


@pytest.mark.parametrize("name", CALLS)
def test_values_stay_and_second_derivatives_under_vmap_are_the_loop(name):
    call = CALLS[name]

    def sound(*args):
        with sound_norms(True):
            return call(*args)

    torch.testing.assert_close(sound(X[0], WEIGHT, BIAS), call(X[0], WEIGHT, BIAS))
    got, want = meta_slopes(sound)[0], meta_slopes(call)[1]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["batch", "layer", "instance"])
def test_torch_alone_is_still_wrong(name):
    """Fails once torch is right: then `sound_norms` may go."""
    got, want = meta_slopes(CALLS[name])
    assert (got[0] - want[0]).abs().max() > 1e-2 * want[0].abs().max()


def test_running_statistics_are_updated_in_place():
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    want = mean.clone(), var.clone()
    with sound_norms(True):
        F.batch_norm(X[0], mean, var, WEIGHT, BIAS, training=True)
    F.batch_norm(X[0], *want, WEIGHT, BIAS, training=True)
    torch.testing.assert_close((mean, var), want)
