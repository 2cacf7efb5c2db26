"""A live model of 100 million float32 parameters and eight tasks: `LiveMerge.set` against one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import tvfast
from bench.buffers import COLUMNS, SEED, Buffers, HugePages
from bench.traffic import Traffic

N_TASKS = 8
_WEIGHTS = [0.3 - 0.05 * k for k in range(N_TASKS)]
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class LiveTensors:
    """Flat float32 tensors [n] on huge pages: θ₀, eight task vectors, and what is written."""

    base: Tensor
    deltas: list[Tensor]
    live: Tensor


def n_parameters(buffers: Buffers) -> int:
    """Half as many again as a tensor of the other rows has: 100,663,296 at full size."""
    return buffers.n_elements // 2 * 3


@cache
def tensors_of(n: int) -> LiveTensors:
    """θ₀ ~ N(0, 0.02²) and τ_k ~ N(0, 0.001²), from their own seeds; a chunk's noise serves every chunk."""
    generator = torch.Generator().manual_seed(SEED)

    def flat(std: float) -> Tensor:
        words = HugePages(4 * n).tensor(2 * n).view(torch.float32).view(-1)
        noise = torch.randn(min(_CHUNK, n), generator=generator).mul_(std)
        for start in range(0, n, _CHUNK):
            part = words[start : start + _CHUNK]
            part.copy_(noise[: part.numel()])
        return words

    return LiveTensors(flat(0.02), [flat(1e-3) for _ in range(N_TASKS)], flat(0.0))


def named(flat: Tensor) -> dict[str, Tensor]:
    """A flat tensor as the parameters of 12 layers: large and small matrices, and norms."""
    layer = flat.numel() // 12
    norm = COLUMNS // 8
    # each starts on a cache line, as allocated tensors do
    parts = [("norm", norm), *((f"attention.{i}", layer // 12 // 64 * 64) for i in range(4))]
    rest = layer - sum(size for _, size in parts)
    parts += [("up", rest // 128 * 64), ("down", rest - rest // 128 * 64)]
    found: dict[str, Tensor] = {}
    for number in range(12):
        start = number * layer
        for name, size in parts:
            found[f"layers.{number}.{name}"] = flat[start : start + size]
            start += size
    return found


@dataclass(frozen=True, slots=True)
class LiveTraffic(Traffic):
    """θ₀ and eight tasks read, the live weights written."""

    def n_bytes(self, buffers: Buffers) -> int:
        return (self.n_read + self.n_written) * 4 * n_parameters(buffers)

    def streams(self, buffers: Buffers) -> tuple[list[Tensor], Tensor | None]:
        tensors = tensors_of(n_parameters(buffers))
        return [tensors.base, *tensors.deltas], tensors.live


LIVE_PASS = LiveTraffic(N_TASKS + 1, 1)


def live_set(method: str, **parameters: Any) -> Callable[[Buffers, int], Callable[[], object]]:
    """`set` alone: the table is built and thresholds are measured before the timing."""

    def make(buffers: Buffers, n_threads: int) -> Callable[[], object]:
        tensors = tensors_of(n_parameters(buffers))
        live = tvfast.LiveMerge(
            named(tensors.live),
            deltas=[named(delta) for delta in tensors.deltas],
            base=named(tensors.base),
            method=method,
            n_threads=n_threads,
            **parameters,
        )
        return lambda: live.set(_WEIGHTS)

    return make
