"""What the device can do, measured: bytes per second of memory and bus, operations per second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.gpu.clock import Clock


@dataclass(frozen=True, slots=True)
class Limits:
    """Per second: bytes copied (read and written both count), read, uploaded, downloaded; operations."""

    copied: float
    read: float
    uploaded: float
    downloaded: float
    float32: float
    bfloat16: float

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that a call must do: bytes read, bytes written, multiplications and additions."""

    n_read: int
    n_written: int = 0
    n_operations: int = 0

    @property
    def n_bytes(self) -> int:
        return self.n_read + self.n_written

    def seconds(self, limits: Limits) -> float:
        """By what takes longer: its bytes at the speed of a copy or a read, or its float32 operations."""
        speed = limits.copied if self.n_written else limits.read
        return max(self.n_bytes / speed, self.n_operations / limits.float32)

    def name(self, limits: Limits) -> str:
        if self.n_operations / limits.float32 > self.n_bytes / limits.copied:
            return "float32 matrix product"
        return "copy" if self.n_written else "read"


def measured(clock: Clock, n_bytes: int, side: int) -> Limits:
    """By torch's copy and reductions of `n_bytes`, and its matrix products of `side`; TF32 is off.

    A read is the faster of a sum and a maximum of float32.
    """
    device = clock.device
    n = n_bytes // 4
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    copied = 2 * 4 * n / _median(clock, lambda: target.copy_(source))
    read = 4 * n / min(_median(clock, source.sum), _median(clock, source.amax))
    host = torch.empty(n, pin_memory=device.type == "cuda")
    uploaded = 4 * n / _median(clock, lambda: target.copy_(host, non_blocking=True))
    downloaded = 4 * n / _median(clock, lambda: host.copy_(source, non_blocking=True))
    return Limits(copied, read, uploaded, downloaded, *_rates(clock, side))


def _rates(clock: Clock, side: int) -> list[float]:
    """Operations per second of square products in float32 and bfloat16."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _median(clock, lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
        rates.append(2 * side**3 / seconds)
    return rates


def _median(clock: Clock, run: Any) -> float:
    return float(clock.time(run)["median_s"])
