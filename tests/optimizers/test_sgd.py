"""diffopt.optimizers.sgd against torch.optim.SGD."""

import pytest
import torch

from diffopt import tree
from diffopt.optimizers import sgd
from diffopt.transforms import step
from optimizers.problems import loss, start, torch_trajectory


@pytest.mark.parametrize(("momentum", "nesterov"), [(None, False), (0.0, False), (0.9, False), (0.9, True)])
def test_trajectory_of_torch(momentum, nesterov):
    want = torch_trajectory(torch.optim.SGD, lr=0.05, momentum=momentum or 0.0, nesterov=nesterov)
    optimizer, params = sgd(0.05, momentum, nesterov), start()
    state = optimizer.init(params)
    for expected in want:
        params, state = step(optimizer, torch.func.grad(loss)(params), state, params)
        for p, q in zip(tree.leaves(params), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_nesterov_without_momentum_raises():
    with pytest.raises(ValueError, match="needs a momentum"):
        sgd(0.1, nesterov=True)


def test_no_momentum_keeps_no_tensors():
    assert tree.leaves(sgd(0.1).init(start())) == []
