"""Noise on the CPU by native code, which the machine's C++ compiler makes of `native.cpp` once a process.

It takes less than a second. ``DIFFOPT_COMPILE=0`` in the environment, no compiler, or one that fails leaves draws to
others.
"""

import ctypes
import functools
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from diffopt.autodiff import compiled_body

__all__ = ["draw"]

SOURCE = pathlib.Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC")

SHARE = 1 << 14
"""The least number of counters that a thread is given."""


def draw(
    keys: Tensor, members: Tensor, blocks: int, offset: int, size: int, dtype: torch.dtype, distribution: str
) -> Tensor | None:
    """Draw a part of the noise of one member of each lane.

    Args:
        keys: int64, shape (lanes, 2), on the CPU.
        members: int64, shape (lanes,), at least 0.
        blocks: How many counters a member has.
        offset: Which of them is the first.
        size: How many numbers, at least 1.
        dtype: float32 or float64.
        distribution: "normal" or "rademacher".

    Returns:
        The numbers, shape (lanes, size); None where there is no native code.

    Example:
        >>> numbers = draw(torch.tensor([[42, 0]]), torch.tensor([3]), 2, 0, 5, torch.float32, "normal")
        >>> numbers is None or numbers.shape == (1, 5)
        True
    """
    if not compiled_body.available():
        return None
    library = _library()
    if library is None:
        return None
    lanes = len(members)
    out = torch.empty(lanes, size, dtype=dtype)
    keys, members = keys.contiguous(), members.contiguous()
    function = library.draw_double if dtype == torch.float64 else library.draw_float
    pointers = keys.data_ptr(), members.data_ptr(), out.data_ptr()

    def part(begin: int, end: int) -> None:
        function(*pointers[:2], blocks, offset, size, begin, end, distribution == "rademacher", pointers[2])

    _share(part, lanes * -(-size // 4))
    return out


def _share(part: Callable[[int, int], None], count: int) -> None:
    """Call a function on ranges that make up 0, ..., count - 1, by as many threads as torch has."""
    threads = min(torch.get_num_threads(), count // SHARE)
    if threads <= 1:
        part(0, count)
        return
    ends = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, ends[:-1], ends[1:]))


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "noise.so")
        try:
            command = [*compiler, *FLAGS, str(SOURCE), "-o", path]
            subprocess.run(command, check=True, capture_output=True, text=True)
            library = ctypes.CDLL(path)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            warnings.warn(
                f"compiling {SOURCE.name} failed ({reason}): noise on the CPU is made ten times slower. Set "
                "DIFFOPT_COMPILE=0 to keep it so without this warning.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
    for function in (library.draw_float, library.draw_double):
        function.restype = None
        numbers = [ctypes.c_int64] * 5
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *numbers, ctypes.c_int32, ctypes.c_void_p]
    return library
