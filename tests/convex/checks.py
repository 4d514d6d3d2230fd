"""What the tests of projections share: random points, the variational inequality, and derivatives by differences."""

import torch

from diffopt import tree

F64 = torch.float64
TOL = 1e-10  # rounding in float64, of operations on numbers of order 1
STEP, SLOPE_TOL = 1e-6, 1e-7  # of central differences: the error is of order step squared, and eps / step


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def check_optimal(project, x, points, tol=TOL):
    """A projection is idempotent, and <x - p, y - p> <= 0 for every point y of a convex set."""
    p, unravel = tree.ravel(project(x))
    flat = tree.ravel(x)[0]
    size = 1 + flat.abs().amax()
    assert (tree.ravel(project(unravel(p)))[0] - p).abs().amax() <= tol * size
    for y in points:
        assert (flat - p) @ (tree.ravel(y)[0] - p) <= tol * size**2


def differences(fn, *args, argnum=0):
    """The Jacobian in one argument, by central differences."""
    x = args[argnum]

    def at(v):
        return fn(*args[:argnum], v.reshape(x.shape), *args[argnum + 1 :])

    flat = x.reshape(-1)
    columns = [(at(flat + h) - at(flat - h)) / (2 * STEP) for h in STEP * torch.eye(flat.numel(), dtype=x.dtype)]
    return torch.stack(columns, -1).reshape(*columns[0].shape, *x.shape)


def check_jacobians(fn, *args):
    """All first derivatives, forward and reverse, against differences."""
    for i in range(len(args)):
        expected = differences(fn, *args, argnum=i)
        for derivative in (torch.func.jacrev, torch.func.jacfwd):
            found = derivative(fn, argnums=i)(*args)
            assert torch.allclose(found, expected, rtol=SLOPE_TOL, atol=SLOPE_TOL), (i, found, expected)


def check_lanes(fn, *stacks):
    """Values and derivatives under vmap are those of the loop."""
    for f in (fn, torch.func.jacrev(fn), torch.func.jacfwd(fn)):
        found = torch.func.vmap(f)(*stacks)
        assert torch.allclose(found, torch.stack([f(*row) for row in zip(*stacks, strict=True)]), rtol=TOL, atol=TOL)
