"""Scripts that tests of kernels run in a process of their own: triton must be imported with its interpreter on."""

import os
import pathlib
import subprocess
import sys

import diffopt_kernels

__all__ = ["run_script"]

KERNELS = str(pathlib.Path(diffopt_kernels.__file__).parents[1])


def run_script(script, folder, interpret=True):
    """What a script prints. It is written to a file, since triton reads the source of its kernels from one."""
    file = folder / "script.py"
    file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": KERNELS, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpret))}
    result = subprocess.run(
        [sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()
