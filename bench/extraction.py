"""One layer's adapter against the full decomposition: `python -m bench.extraction`.

The matrices of a layer of a 0.5 B model (hidden size 896, intermediate 4864), rank 32, as `extract-lora`
and as mergekit-extract-lora decompose them. One process, one thread, processor time, in turn; medians over
rounds of the ratio for the whole layer, and the excess of the reconstruction error over the least possible.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tvfast.extraction.decomposition import truncated_svd

RANK = 32
SHAPES = ((896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864))
GOALS = {"times faster": 10.0, "excess": 0.01}

Factors = tuple[Tensor, Tensor]


def tuned(shape: tuple[int, int], exponent: float, seed: int) -> Tensor:
    """A difference whose singular values fall as a power of their number; 0: Gaussian noise."""
    drawn = torch.Generator().manual_seed(seed)
    if exponent == 0.0:
        return torch.randn(shape, generator=drawn) * 1e-3
    k = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], k, generator=drawn))[0]
    right = torch.linalg.qr(torch.randn(shape[1], k, generator=drawn))[0]
    s = torch.arange(1, k + 1, dtype=torch.float32) ** -exponent
    return (left * s) @ right.T * 1e-2


def ours(delta: Tensor) -> Factors:
    found = truncated_svd(delta, RANK, generator=torch.Generator().manual_seed(0))
    root = found.s.sqrt()
    return root[:, None] * found.vt, found.u * root


def full(delta: Tensor) -> Factors:
    """The whole decomposition, cut to the rank afterwards."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    root = torch.diag(s[:RANK].sqrt())
    return root @ vt[:RANK], u[:, :RANK] @ root


def error(delta: Tensor, factors: Factors) -> float:
    a, b = (factor.double() for factor in factors)
    return float(torch.linalg.norm(delta.double() - b @ a))


def measure(exponent: float, rounds: int) -> dict[str, object]:
    """Seconds of the layer both ways, their ratio, and the largest excess of an error."""
    deltas = [tuned(shape, exponent, seed) for seed, shape in enumerate(SHAPES)]
    ways: dict[str, Callable[[Tensor], Factors]] = {"tvfast": ours, "full": full}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            for delta in deltas:
                way(delta)
            seconds[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(seconds["tvfast"], seconds["full"], strict=True)]
    excess = [error(delta, ours(delta)) / error(delta, full(delta)) - 1.0 for delta in deltas]
    return {
        "singular values": "noise" if exponent == 0.0 else f"i^-{exponent:g}",
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "times faster": statistics.median(ratios),
        "excess": max(excess),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [measure(exponent, options.rounds) for exponent in (0.0, 0.5, 1.0)]
    print(json.dumps(found, indent=2))
    met = all(
        float(str(row["times faster"])) >= GOALS["times faster"]
        and float(str(row["excess"])) <= GOALS["excess"]
        for row in found
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
