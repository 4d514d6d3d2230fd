"""Medians of warmed-up calls, and a record of where and with what they were taken."""

import datetime
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["alternate", "machine", "median_us", "record"]

RESULTS = pathlib.Path(__file__).parent / "results"


def median_us(fn: Callable[[], Any], *, repeats: int = 30, budget_s: float = 0.5) -> float:
    """The median time of a call in microseconds, over blocks long enough for the clock."""
    return alternate([fn], repeats=repeats, budget_s=budget_s)[0]


def alternate(fns: list[Callable[[], Any]], *, repeats: int = 30, budget_s: float = 0.5) -> list[float]:
    """Median times of several functions, their blocks interleaved so that drift hits all alike."""
    counts = []
    for fn in fns:
        for _ in range(3):
            fn()
        _wait()
        start = time.perf_counter()
        fn()
        _wait()
        once = max(time.perf_counter() - start, 1e-7)
        counts.append(max(1, int(budget_s / repeats / once)))
    times: list[list[float]] = [[] for _ in fns]
    for _ in range(repeats):
        for fn, count, seen in zip(fns, counts, times, strict=True):
            _wait()
            start = time.perf_counter()
            for _ in range(count):
                fn()
            _wait()
            seen.append((time.perf_counter() - start) / count * 1e6)
    return [statistics.median(seen) for seen in times]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """The date, the machine and the versions of this run, those of peers too."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
    }


def record(name: str, rows: list[dict[str, Any]], packages: Sequence[str] = ()) -> None:
    """Write the rows of one benchmark to `results/<name>.json`, and print them."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(packages), "rows": rows}, indent=1) + "\n")
    width = max(len(row["case"]) for row in rows)
    for row in rows:
        print(f"{row['case']:{width}}  {row['value']:10.2f} {row['unit']:7} (bar: {row['bar']})")
