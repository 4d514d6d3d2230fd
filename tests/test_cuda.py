"""The same numbers on a GPU: draws, roots, solves, loops and optimizers, where a machine has one."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, vmap

from diffopt import random
from diffopt.autodiff import any_lane, unroll, value_and_grad, while_loop
from diffopt.implicit import custom_root
from diffopt.linalg import CG, GMRES, Dense, NormalCG, linear_solve, matrix_operator
from diffopt.optimizers import adamw, lion, rmsprop, sgd
from diffopt.transforms import chain, clip_by_global_norm, step
from problems import W, equation, newton_unrolled, reference_root, root_args

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DRAWS = {"normal": 1e-6, "uniform": 0.0, "rademacher": 0.0, "gumbel": 4e-6}


def cuda(*values):
    return tuple(v.cuda() for v in values)


def close(ours, reference, tol=1e-9):
    torch.testing.assert_close(ours.cpu(), reference, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("start", [0, 5])
def test_draws_agree_with_the_cpu(name, start):
    draw = getattr(random, name)
    for count in (7, 100_003):
        ours = draw(random.key(3, device="cuda"), (count,), start=start)
        theirs = draw(random.key(3), (count,), start=start)
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=DRAWS[name])


def test_words_are_bit_exact_and_a_shard_is_a_slice():
    key = random.key(11, device="cuda")
    whole = random.bits(key, (50_001,))
    assert torch.equal(whole.cpu(), random.bits(random.key(11), (50_001,)))
    assert torch.equal(random.bits(key, (1000,), start=777), whole[777:1777])
    keys = random.split(key, 3)
    assert torch.equal(keys.cpu(), random.split(random.key(11), 3))
    assert torch.equal(vmap(lambda k: random.bits(k, (9,)))(keys)[1], random.bits(keys[1], (9,)))


@pytest.mark.parametrize("solver", [Dense(), GMRES(rtol=1e-13), NormalCG(rtol=1e-13)], ids=lambda s: type(s).__name__)
def test_roots_under_transforms(solver):
    a, b = root_args()
    weights = W.cuda()

    def residual(x, a, b):
        return x + b * torch.tanh(weights @ x) + 0.2 * x**3 - a

    def newton(init, a, b):
        x = init
        for _ in range(12):
            x = x - torch.linalg.solve(torch.func.jacrev(residual)(x, a, b), residual(x, a, b))
        return x

    solve = custom_root(residual, solve=solver)(newton)

    def ours(a, b):
        return solve(torch.zeros_like(a), a, b)

    close(ours(*cuda(a, b)), reference_root(a, b))
    close(jacfwd(ours)(*cuda(a, b)), jacfwd(reference_root)(a, b))
    close(hessian(lambda a: ours(a, b.cuda()).sum())(a.cuda()), hessian(lambda a: reference_root(a, b).sum())(a))
    batch = torch.stack([a, 0.5 * a, -a])
    close(
        vmap(grad(lambda a: ours(a, b.cuda()).sum()))(batch.cuda()),
        vmap(grad(lambda a: reference_root(a, b).sum()))(batch),
    )
    leaf = a.cuda().requires_grad_()
    (first,) = torch.autograd.grad(ours(leaf, b.cuda()).sum(), leaf)
    close(first, grad(lambda a: reference_root(a, b).sum())(a))


def test_equation_of_the_cpu_is_refused_on_the_gpu():
    solve = custom_root(equation)(newton_unrolled)
    a, b = cuda(*root_args())
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        solve(torch.zeros_like(a), a.requires_grad_(), b)


def test_linear_solve_and_mixed_devices():
    A = torch.eye(4, dtype=torch.float64) * 3 + 0.1
    b = torch.linspace(1.0, 2.0, 4, dtype=torch.float64)
    operator = matrix_operator(A.cuda(), tags=["positive_definite"])
    close(linear_solve(operator, b.cuda(), CG(rtol=1e-13)), torch.linalg.solve(A, b))
    with pytest.raises(TypeError, match="on cuda"):
        linear_solve(operator, b)


def test_loops():
    x = torch.tensor([2.0, 9.0, 30.0], dtype=torch.float64, device="cuda")

    def heron(a):
        return while_loop(lambda x: (x * x - a).abs() > 1e-12, lambda x: (x + a / x) / 2, a, max_steps=50)

    close(vmap(grad(heron))(x), 0.5 / x.cpu().sqrt())
    assert not any_lane(x > 100)
    out = grad(lambda r: unroll(lambda w, _: (w - r * w, None), x, length=4, checkpoint="log")[0].sum())(x[0] / 10)
    close(out, grad(lambda r: (x.cpu() * (1 - r) ** 4).sum())(x[0].cpu() / 10))


def test_adamw_step_matches_the_cpu():
    optimizer = adamw(1e-2, weight_decay=0.1)
    params = {"w": torch.linspace(-1, 1, 5, dtype=torch.float64), "b": torch.tensor(0.3, dtype=torch.float64)}

    def train(params):
        state = optimizer.init(params)
        for _ in range(3):
            _, grads = value_and_grad(lambda p: (p["w"] ** 4).sum() * p["b"])(params)
            params, state = step(optimizer, grads, state, params)
        return params

    ours = train({name: p.cuda() for name, p in params.items()})
    for name, expected in train(params).items():
        close(ours[name], expected, 1e-12)


@pytest.mark.parametrize("donate", [False, True])
def test_fused_steps_agree_with_the_cpu(donate):
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 7), (5,), (), (0, 3), (4096,)]
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    grads = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    for optimizer in (
        sgd(0.1),
        sgd(0.1, 0.9, True),
        rmsprop(0.1),
        lion(0.1),
        chain(clip_by_global_norm(1.0), adamw(0.1)),
    ):
        ours, theirs = [p.cuda() for p in start], start
        state, their_state = optimizer.init(ours), optimizer.init(theirs)
        for _ in range(3):
            ours, state = step(optimizer, [g.cuda() for g in grads], state, ours, donate=donate)
            theirs, their_state = step(optimizer, grads, their_state, theirs)
        for x, y in zip(ours, theirs, strict=True):
            close(x, y)


def test_fused_steps_have_the_derivatives_of_the_chain():
    optimizer = chain(clip_by_global_norm(1.0), adamw(0.1, eps_root=1e-3))
    p, g = (torch.linspace(0.1, 1.0, 2000, dtype=torch.float64).reshape(2, 1000) + k for k in range(2))

    def loss(p, g):
        return step(optimizer, g.sin(), optimizer.init(p), p)[0].cosh().sum()

    for ours, theirs in zip(grad(loss, (0, 1))(p.cuda(), g.cuda()), grad(loss, (0, 1))(p, g), strict=True):
        close(ours, theirs)
    for ours, theirs in zip(vmap(grad(loss, (0, 1)))(p.cuda(), g.cuda()), vmap(grad(loss, (0, 1)))(p, g), strict=True):
        close(ours, theirs)
