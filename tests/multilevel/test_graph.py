import pytest
import torch

from diffopt import random
from diffopt.linalg import CG, Dense
from diffopt.multilevel import Implicit
from multilevel.quadratic_programs import SHAPES, program, start, true_gradient

EXACT = 1e-6
ROOTS = {"one lower level of two": "b"}


@pytest.mark.parametrize("method", [Implicit(Dense()), Implicit(CG(rtol=1e-12))], ids=["Dense", "CG"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hypergradients_are_exact(shape, method):
    known = start(shape)
    if shape == "diamond" and isinstance(method.linear_solver, CG):
        pytest.skip("a joint response of two levels is not symmetric")
    levels = program(shape, method)
    state = levels.init(random.key(0), known)
    for root in {"a", ROOTS.get(shape, "a")}:
        found, reports = levels.hypergrad(root)(state)
        torch.testing.assert_close(found, true_gradient(shape, root, known), rtol=EXACT, atol=EXACT)
        assert all(report.residual < 1e-8 for report in reports.values())
