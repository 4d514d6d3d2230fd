"""Random numbers as pure functions of explicit keys.

A key is an int64 tensor of two 32-bit words. The same key gives the same numbers, on every device and under
every transform: `torch.func.vmap` over keys equals the loop over keys, and part of a draw (``start``) equals
the slice of the whole. Use a key once: `split` it, or `fold_in` a step count, for more.

Draws of 2^20 numbers or more on the CPU run through a body compiled on first use (some seconds for each
distribution and dtype, then about the speed of `torch.randn`; smaller ones run eagerly at a quarter of it).
Set the environment variable ``DIFFOPT_COMPILE=0`` to keep all draws eager, as they are where no C++
compiler is found. Integer words are the same everywhere; floats agree to a few units in the last place
between eager, compiled and CUDA draws.
"""

from diffopt.random.draws import bits, gumbel, normal, permutation, rademacher, uniform
from diffopt.random.keys import fold_in, key, split

__all__ = [
    "bits",
    "fold_in",
    "gumbel",
    "key",
    "normal",
    "permutation",
    "rademacher",
    "split",
    "uniform",
]
