r"""Modules whose gradients are estimated from their values.

.. math:: \nabla f(\theta) \approx \mathbb{E}_u\, \frac{f(\theta + \sigma u) - f(\theta - \sigma u)}{2 \sigma}\, u
"""

from typing import Any, Literal

from torch import Tensor, nn

from diffopt.nn.functional import functional
from diffopt.zero_order import smoothed

__all__ = ["ZeroOrderModule"]


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class ZeroOrderModule(nn.Module):
    r"""A module whose output has estimated derivatives in its parameters.

    .. math:: \nabla f(\theta) \approx \mathbb{E}_u\, \frac{f(\theta + \sigma u) - f(\theta - \sigma u)}{2 \sigma}\, u

    The module need not be differentiable: the estimates are made of its outputs at perturbed parameters, by `smoothed`.
    Called as ``module(key, *args, **kwargs)``, it is a function of the key, and works under `torch.func` transforms.
    Parameters that do not require grad are not perturbed. Tensors among the arguments get the mean of the samples' own
    derivatives, if there are any. Buffers are read and never written.

    Args:
        module: Any module; its parameters are floating-point.
        sigma: The scale of the noise, a number or a 0-d tensor, which gets its gradient.
        num_samples: How many perturbed modules are evaluated; even, unless another ``method`` is chosen.
        value: "f" returns the module's own output, "smoothed" the mean over samples, with the same derivatives.
        **options: Those of `smoothed`, such as ``method``, ``sampler``, ``chunk_size``; ``batching="sequential"`` is
            for modules with `.item()` or NumPy inside.

    Raises:
        TypeError: If module is no module, or an option is unknown or has no meaning here; and as by `smoothed`.
        ValueError: As by `smoothed`; when called, if no parameter requires grad, or a submodule in train mode tracks
            running statistics or drops out.

    Example:
        >>> import torch
        >>> class Steps(nn.Linear):
        ...     def forward(self, x):
        ...         return (super().forward(x) > 0).float()
        >>> net = ZeroOrderModule(Steps(1, 1, bias=False), 1.0, 1000)
        >>> net.module.weight.data.zero_()
        tensor([[0.]])
        >>> net(torch.tensor([42, 0]), torch.ones(1, 1)).sum().backward()
        >>> net.module.weight.grad.round(decimals=1)  # 0.3989, the normal density at 0
        tensor([[0.4000]])

    References:
        Nesterov and Spokoiny, "Random gradient-free minimization of convex functions", 2017, eq. 26.
    """

    def __init__(
        self,
        module: nn.Module,
        sigma: float | Tensor,
        num_samples: int,
        *,
        value: Literal["smoothed", "f"] = "f",
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"`module` must be a module; got {type(module).__name__}. For functions use `smoothed`.")
        for name in ("argnums", "has_aux", "control"):
            if name in options:
                raise TypeError(f"`{name}` has no meaning for a module; use `smoothed` and `functional`.")
        smoothed(module, sigma, num_samples, value=value, **options)  # refuses bad options early
        self.module, self.sigma = module, sigma
        self.num_samples, self.options = num_samples, {"value": value, **options}

    def forward(self, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with estimated derivatives in its parameters.

        Args:
            key: From `random.key`. The same key gives the same noise; fold in the step for fresh one.
            *args: The module's arguments.
            **kwargs: The module's arguments by name.
        """
        _check_modes(self.module)
        function, params, buffers = functional(self.module)
        trained = {name: value for name, value in params.items() if value.requires_grad}
        if not trained:
            raise ValueError("no parameter of the module requires grad, so there is nothing to estimate.")

        def output(trained: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            return function({**params, **trained}, buffers, *args, **kwargs)[0]

        estimate = smoothed(output, self.sigma, self.num_samples, **self.options)
        return estimate(key, trained, *args, **kwargs)


def _check_modes(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if child.training and getattr(child, "track_running_stats", False):
            raise ValueError(
                f"submodule {name or 'itself'!r} tracks running statistics, and each perturbed module would have its "
                "own: call its .eval(), or make it with track_running_stats=False."
            )
        if child.training and isinstance(child, _DROPOUTS) and child.p > 0:
            raise ValueError(
                f"submodule {name or 'itself'!r} drops out, and each perturbed module would draw a mask of its own, "
                "not from the key: call its .eval()."
            )
