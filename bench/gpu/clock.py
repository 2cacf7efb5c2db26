"""Seconds that a device takes for a call: events on its queue, its cache flushed before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.timing import Summary

Run = Callable[[], object]

SECONDS_PER_ROW = 0.4
FEWEST, MOST = 5, 21
_SLOW = 2.0  # seconds: one such call is enough
_HEAD_START = 2_000_000  # cycles, about a millisecond, in which the host prepares what it launches


@dataclass(slots=True)
class Clock:
    """Times calls on one device; on the CPU, for runs without a GPU, by the wall."""

    device: torch.device
    _flushing: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            n_bytes = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flushing = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def time(self, run: Run) -> dict[str, Any]:
        """Samples of `run` after a call that warms up, on the CPU that one; `host_s` is until it returned.

        The queue is given a short wait first, so that a call that only launches is timed without the host's
        part, and one that waits for the device with it.
        """
        pairs = [self._once(run)]
        if self.device.type == "cuda":  # where the first call also compiles
            pairs = [self._once(run)]
            if pairs[0][0] < _SLOW:
                n = int(SECONDS_PER_ROW / max(pairs[0][0], 1e-9))
                pairs += [self._once(run) for _ in range(min(MOST, max(FEWEST, n)) - 1)]
        summary = Summary(tuple(seconds for seconds, _ in pairs))
        return {**summary.record(), "host_s": statistics.median(host for _, host in pairs)}

    def _once(self, run: Run) -> tuple[float, float]:
        if self._flushing is None:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            return seconds, seconds
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushing.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host
