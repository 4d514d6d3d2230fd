"""Large draws from explicit keys against torch's own generator: python benchmarks/draws.py."""

import torch
from timing import alternate, record

from diffopt import random

COUNT = 10_000_000
PEERS = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "rademacher": lambda n, device: torch.randint(0, 2, (n,), device=device) * 2.0 - 1,
    "gumbel": lambda n, device: -torch.empty(n, device=device).exponential_().log(),
}


def draws(device: str) -> list[dict]:
    """Time a number drawn, ours over torch's, for each distribution."""
    rows, key = [], random.key(0, device=device)
    for name, peer in PEERS.items():
        ours, theirs = alternate(
            [
                lambda name=name: getattr(random, name)(key, (COUNT,)),
                lambda peer=peer: peer(COUNT, device=device),
            ],
            repeats=9,
        )
        where = device if device == "cuda" else f"{torch.get_num_threads()} threads"
        case = f"random.{name} / torch, {COUNT} float32, {where}, torch takes {theirs * 1e3 / COUNT:.2f} ns a number"
        rows.append({"case": case, "value": ours / theirs, "unit": "ratio", "bar": "<= 1.5"})
    return rows


def main() -> None:
    if torch.cuda.is_available():
        record("draws_cuda", draws("cuda"))
        return
    threads, rows = torch.get_num_threads(), []
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        rows += draws("cpu")
    record("draws", rows)


if __name__ == "__main__":
    main()
