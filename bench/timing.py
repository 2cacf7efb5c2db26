"""Timing of one row: the op and its memory limit in turn, and what the samples say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.buffers import Buffers
from bench.limit import stream_pass
from bench.registry import Row


@dataclass(frozen=True, slots=True)
class Summary:
    """Seconds. `spread` is (slowest - fastest) / median."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def fastest(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        return (max(self.samples) - self.fastest) / self.median

    def record(self) -> dict[str, Any]:
        return {
            "samples_s": list(self.samples),
            "median_s": self.median,
            "min_s": self.fastest,
            "spread": self.spread,
        }


def time_row(benchmark: Any, row: Row, buffers: Buffers, n_threads: int) -> dict[str, Any]:
    """Time a row under pytest-benchmark; before each round its limit runs once, so that drift meets both.

    Args:
        benchmark: the fixture; when timing is disabled, the row runs once and no seconds are recorded.
        buffers: overwritten where the row writes; the base is restored.

    Returns:
        Row, threads, bytes, samples of the row and of its limit.
    """
    torch.set_num_threads(1)
    traffic = row.traffic
    inputs, out = ([], None) if traffic is None else traffic.streams(buffers)
    limits: list[float] = []

    def before_round() -> None:
        if row.in_place:
            buffers.restore()
        if traffic is None:
            return
        start = time.perf_counter()
        stream_pass(inputs, out, n_threads)
        limits.append(time.perf_counter() - start)

    buffers.restore()
    run = row.make(buffers, n_threads)
    # A call of seconds loses nothing worth a second call by running cold.
    n_warm = 1 if row.rounds > 2 else 0
    try:
        benchmark.pedantic(run, setup=before_round, rounds=row.rounds, warmup_rounds=n_warm)
    finally:
        buffers.restore()
    record: dict[str, Any] = {
        "row": row.name,
        "op": row.op,
        "threads": n_threads,
    }
    if traffic is not None:
        record |= {"n_bytes": traffic.n_bytes(buffers), "limit": traffic.limit}
    if benchmark.stats is not None:
        record |= Summary(tuple(benchmark.stats.stats.data)).record()
    if limits[n_warm:] and benchmark.stats is not None:
        record["limit_s"] = Summary(tuple(limits[n_warm:])).record()
    return record


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster, by medians."""
    return statistics.median(slow) / statistics.median(fast)
