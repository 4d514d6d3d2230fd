"""What the primitives cost a call, one thread: python benchmarks/primitives.py."""

import torch
from timing import alternate, median_us, record
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.autodiff import any_lane
from diffopt.implicit import custom_root


def dense_root() -> list[dict]:
    """A linear root with n = 3, in plain autograd, beside a hand-written Function for the same."""
    A = torch.tensor([[2.0, 0.3, 0.0], [0.1, 3.0, 0.2], [0.0, 0.4, 1.5]], dtype=torch.float64)
    b = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    init = torch.zeros(3, dtype=torch.float64)

    @custom_root(lambda x, b: A @ x - b)
    def solve(init, b):
        return torch.linalg.solve(A, b)

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, b):
            x = torch.linalg.solve(A, b)
            ctx.save_for_backward(x, b)
            return x

        @staticmethod
        def backward(ctx, g):
            x, b = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            with torch.enable_grad():
                out = A @ x - b
            rows = [torch.autograd.grad(out, x, e, retain_graph=True)[0] for e in torch.eye(3, dtype=out.dtype)]
            u = torch.linalg.solve(torch.stack(rows).mT, g)
            return torch.autograd.grad(out, b, -u)[0]

    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def both(x: Tensor):
        return torch.autograd.grad(x, b, weights)

    forward, full, hand_forward, hand = alternate(
        [
            lambda: solve(init, b),
            lambda: both(solve(init, b)),
            lambda: ByHand.apply(b),
            lambda: both(ByHand.apply(b)),
        ]
    )
    return [
        {"case": "custom_root, dense n=3, forward", "value": forward, "unit": "us", "bar": "<= 60"},
        {"case": "custom_root, dense n=3, forward and backward", "value": full, "unit": "us", "bar": "<= 300"},
        {"case": "  by hand, forward", "value": hand_forward, "unit": "us", "bar": "none"},
        {"case": "  by hand, forward and backward", "value": hand, "unit": "us", "bar": "none"},
    ]


def gradients() -> list[dict]:
    """`value_and_grad` against `torch.autograd.grad` on the same loss, from small work to large."""
    rows = []
    for width, layers in ((16, 1), (32, 2), (64, 4), (256, 4)):
        weights = [torch.randn(width, width) / width**0.5 for _ in range(layers)]
        x = torch.randn(32, width)

        def loss(weights, x=x):
            h = x
            for w in weights:
                h = torch.tanh(h @ w)
            return (h * h).sum()

        def plain(weights=weights, loss=loss):
            leaves = [w.detach().requires_grad_() for w in weights]
            value = loss(leaves)
            return value.detach(), torch.autograd.grad(value, leaves)

        ours = diffopt.value_and_grad(loss)
        base, fast, func = alternate(
            [plain, lambda ours=ours, w=weights: ours(w), lambda loss=loss, w=weights: grad(loss)(w)]
        )
        bar = "<= 1.3" if base >= 150 else "<= 1.45"
        case = f"value_and_grad / autograd.grad, work of {base:.0f} us"
        rows.append({"case": case, "value": fast / base, "unit": "ratio", "bar": bar})
        rows.append({"case": "  torch.func.grad / autograd.grad", "value": func / base, "unit": "ratio", "bar": "none"})
    return rows


def lanes() -> list[dict]:
    """`any_lane` inside vmap(grad(...))."""
    seen = []

    def inside(x):
        mask = x > 0
        seen.append(median_us(lambda: any_lane(mask)))
        return x.sum()

    vmap(grad(inside))(torch.randn(8, 3))
    return [{"case": "any_lane under vmap(grad)", "value": seen[0], "unit": "us", "bar": "<= 15"}]


def main() -> None:
    torch.set_num_threads(1)
    record("primitives", [*dense_root(), *gradients(), *lanes()])


if __name__ == "__main__":
    main()
