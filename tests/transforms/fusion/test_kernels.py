"""The Triton kernels as differentiable operators, against the references, by Triton's interpreter."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import diffopt_kernels

ROOT = pathlib.Path(__file__).parents[2]
KERNELS = str(pathlib.Path(diffopt_kernels.__file__).parents[1])

# Value, first and second derivatives, jvp and vmap in every run; all of them in the long one.
CELLS = ("forward", "grad", "jacfwd", "hessian", "jvp(grad)", "vmap", "vmap(grad)", "grad(vmap), shared", "vmap(vmap)")

# Run apart, since triton must be imported with its interpreter on.
SCRIPT = """
import functools, sys
import torch
from composition_fused import RULES, columns_of, fused_row
from diffopt.autodiff.fused_op import fused_by_rule
from diffopt.testing import check_composition
from diffopt.transforms import clipping
from diffopt.transforms.fusion import clip, launch
from diffopt_kernels import multi_tensor

name, cells = sys.argv[1], [cell for cell in sys.argv[2].split(";") if cell] or None
f64 = lambda *values: torch.tensor(values, dtype=torch.float64)

def by_kernel(rule, columns, scalars):
    forward, backward = (functools.partial(f, rule) for f in (multi_tensor.step, multi_tensor.step_backward))
    return fused_by_rule(rule.reference, forward, backward)(columns, [scalars[s] for s in rule.scalars])

if name in RULES:
    operator, args, reference, _ = fused_row(RULES[name], by_kernel)
else:
    transformation = clipping.clip_by_global_norm
    args = ([f64(0.5, -0.4), f64(0.3)[0], f64(0.2, 0.1)[None, ::2]], f64(0.6)[0])

    def operator(leaves, bound):
        launch.by_kernel = lambda leaves: True
        return transformation(bound).update(leaves, transformation(bound).init(leaves))[0]

    def reference(leaves, bound):
        norm = sum((x * x).sum() for x in leaves).sqrt()
        return [x * torch.where(norm > bound, bound / norm, 1.0) for x in leaves]

check_composition(operator, args, reference, backend=None, cells=cells)
print("agreed")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("cells", [CELLS, pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "rmsprop", "lion", "adam", "clip"])
def test_kernels_have_the_derivatives_of_their_references(name, cells, tmp_path):
    script = tmp_path / "script.py"  # triton reads the source of its kernels from a file
    script.write_text(SCRIPT)
    path = os.pathsep.join([KERNELS, str(ROOT), str(ROOT.parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), name, ";".join(cells)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("agreed")
