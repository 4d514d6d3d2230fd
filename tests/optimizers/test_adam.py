"""diffopt.optimizers.adam against torch.optim.Adam."""

import pytest
import torch

from diffopt import tree
from diffopt.optimizers import adam
from diffopt.transforms import step
from optimizers.problems import loss, start, torch_trajectory


@pytest.mark.parametrize("options", [{}, {"b1": 0.5, "b2": 0.8, "eps": 1e-3}, {"b1": 0.0, "b2": 0.0}])
def test_trajectory_of_torch(options):
    full = {"b1": 0.9, "b2": 0.999, "eps": 1e-8} | options
    want = torch_trajectory(torch.optim.Adam, lr=0.05, betas=(full["b1"], full["b2"]), eps=full["eps"])
    optimizer, params = adam(0.05, **options), start()
    state = optimizer.init(params)
    for expected in want:
        params, state = step(optimizer, torch.func.grad(loss)(params), state, params)
        for p, q in zip(tree.leaves(params), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_bad_hyperparameters_raise():
    with pytest.raises(ValueError, match=r"`b2` must be at least 0\.0 and below 1\.0"):
        adam(0.1, b2=1.0)
    with pytest.raises(TypeError, match="`learning_rate` must be a number"):
        adam(None)
