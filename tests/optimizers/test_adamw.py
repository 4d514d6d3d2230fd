"""diffopt.optimizers.adamw against torch.optim.AdamW."""

import pytest
import torch

from diffopt import tree
from diffopt.optimizers import adam, adamw
from diffopt.transforms import step
from optimizers.problems import loss, start, torch_trajectory


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trajectory_of_torch(weight_decay):
    want = torch_trajectory(torch.optim.AdamW, lr=0.05, weight_decay=weight_decay)
    optimizer, params = adamw(0.05, weight_decay=weight_decay), start()
    state = optimizer.init(params)
    for expected in want:
        params, state = step(optimizer, torch.func.grad(loss)(params), state, params)
        for p, q in zip(tree.leaves(params), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_masked_leaves_do_not_decay():
    params = start()
    grads = torch.func.grad(loss)(params)
    mask = {"w": True, "b": (False, True)}
    got, plain, decayed = (
        step(optimizer, grads, optimizer.init(params), params)[0]
        for optimizer in (
            adamw(0.1, weight_decay=0.5, mask=mask),
            adam(0.1),
            adamw(0.1, weight_decay=0.5),
        )
    )
    assert torch.equal(got["w"], decayed["w"])
    assert torch.equal(got["b"][0], plain["b"][0])
    assert torch.equal(got["b"][1], decayed["b"][1])


def test_update_without_params_raises():
    params = start()
    optimizer = adamw(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(params, optimizer.init(params))
