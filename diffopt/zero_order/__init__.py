"""Zero-order methods: optimization by values alone, with noise that is regenerated from counters and never stored."""

from diffopt.zero_order.noise import accumulate, noise, perturb

__all__ = ["accumulate", "noise", "perturb"]
