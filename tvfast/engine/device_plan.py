"""How a device's memory is divided: a ring for tensors, and what the kernels take beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from tvfast.engine.arrange import Part, block_bytes
from tvfast.engine.cuts import least_piece
from tvfast.engine.device import ALIGNMENT, Traits
from tvfast.engine.memory import round_up
from tvfast.engine.passes import count_passes
from tvfast.engine.tasks import Task, row_elements
from tvfast.errors import ArgumentError
from tvfast.methods.statistics import plane_bytes

MiB = 2**20

UNIT_BYTES = 128 * MiB
"""Of a unit: long enough on the way to hide the launches of its kernels. Not tuned on a device."""

UNITS_IN_RING = 4
"""One arrives, one is merged, one leaves, one waits for its turn."""

PIECES_IN_FLIGHT = 3
"""Of a tensor that is combined in pieces: one arrives, one is merged, one leaves."""

MOST_WORKERS = 8
"""Each reads, checks and writes a unit; the device merges."""

SCRATCH_BYTES = 64 * MiB
"""What kernels may take for tables, counts and sums of one unit; many small tensors are divided by it."""

RANK_ITEM_BYTES = 8
"""Of the rank of one entry of one model, where rows are ranked."""

SORT_ITEM_BYTES = 16
"""Of one entry of one model while its row is sorted, as many rows at a time as `MOST_SORT_BYTES` hold."""

MOST_SORT_BYTES = 256 * MiB
"""Twin of `kRankBytes` in csrc/cuda/api.hpp; more where a single row takes more."""

SMALL_GROUP, MOST_CANDIDATES = 16384, 32 * MiB
"""Keys that are taken as a whole; those collected at a time: twins in csrc/cuda/select_plan.hpp."""

ENDS = 2
"""Of a band: a query for each, at most."""

QUERY_BYTES = 512
"""Of one query and its answer, beside its bins and its keys."""

BINS_BYTES = 2 * 16384
"""Of one model of one tensor whose band has two ends."""

SUM_BYTES = 640
"""Of one sum of one tensor."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Memory of a device. Sizes are bytes.

    Attributes:
        traits: of the device.
        ring_bytes: lent to units for their inputs, results and bit planes.
        scratch_bytes: of kernels, for one unit at a time.
        limit_bytes: of both together, as allowed or free.
        notes: what is not done on the device, and why.
    """

    traits: Traits
    ring_bytes: int
    scratch_bytes: int
    limit_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Bound of what is allocated; the driver's context comes on top."""
        return self.ring_bytes + self.scratch_bytes

    def holds(self, parts: Iterable[Part]) -> bool:
        """Whether parts can be measured and combined there together."""
        ring, scratch = needs(parts)
        return ring <= self.ring_bytes and scratch <= self.scratch_bytes

    def shrunk(self, ring_bytes: int, notes: Iterable[str]) -> DevicePlan:
        """The plan when all units are known."""
        ring = min(self.ring_bytes, round_up(ring_bytes, ALIGNMENT))
        return replace(self, ring_bytes=ring, notes=tuple(notes))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.traits.name,
            "description": self.traits.description,
            "backend": self.traits.backend,
            "peak_bytes": self.peak_bytes,
            "ring_bytes": self.ring_bytes,
            "scratch_bytes": self.scratch_bytes,
            "notes": list(self.notes),
        }


def needs(parts: Iterable[Part], *, measured: bool = True) -> tuple[int, int]:
    """Bytes of the ring and of scratch, at most, to measure and combine parts together; copies need none.

    Args:
        measured: whether they are measured there, and not only combined.
    """
    ring = scratch = sampled = collected = 0
    for part in parts:
        task, k = part.task, len(part.task.models)
        if task.method is None:
            continue
        k = max(k, len(task.method.score_operands(task.scores)))  # a model may be an operand twice
        ring += part.operand_bytes + part.result_bytes + 2 * ALIGNMENT * (len(task.inputs) + 2)
        if task.method.plane_bytes(part.n, k):
            ring += plane_bytes(part.n, k) + k * ALIGNMENT
        scratch += k * BINS_BYTES + SUM_BYTES * 2 ** math.ceil(math.log2(2 * k + k * k))
        if measured and part.n and count_passes([task]) > 1:
            n_sampled, n_collected = selected(part.n)
            scratch += k * ENDS * QUERY_BYTES
            sampled, collected = sampled + 4 * k * ENDS * n_sampled, collected + 4 * k * ENDS * n_collected
        if row_elements(task):
            scratch += _rank_bytes(k * part.n, row_elements(task))
    # Queries of many groups take turns; each has room to itself if it needs as much.
    return ring, scratch + min(sampled, 4 * MOST_CANDIDATES) + min(collected, 4 * MOST_CANDIDATES)


def selected(n: int) -> tuple[int, int]:
    """Keys that the CUDA kernels sample and collect for one query over n.

    Twin of `n_sample_lines` and `n_candidates` in csrc/cuda/select_plan.cpp.
    """
    if n <= SMALL_GROUP:
        return n, 0
    line = 16
    root = math.exp(math.log(n) / 3)
    size = line * max(1, min(32768, n // (4 * line), int(root * root + 1e-6) // line))
    return size, min(MOST_CANDIDATES, int(6.0 * n / math.sqrt(size)) + line)


def _rank_bytes(n_ranks: int, row: int) -> int:
    """Of ranks in memory, and of the sort that finds them."""
    sort = min(SORT_ITEM_BYTES * n_ranks, max(MOST_SORT_BYTES, SORT_ITEM_BYTES * row))
    return RANK_ITEM_BYTES * n_ranks + sort


def plan_device(
    single: Sequence[Task],
    groups: Sequence[Sequence[Task]],
    traits: Traits,
    device_memory: int | None,
) -> DevicePlan:
    """A ring for four units, or for two of the largest tensor that must be measured, if they fit.

    Args:
        single: tensors that are measured each by itself.
        groups: tensors that are ranked together.
        device_memory: bound in bytes; None: nine tenths of what is free.

    Raises:
        ArgumentError: `device_memory` is less than the smallest possible, which is named.
    """
    limit = traits.free_bytes * 9 // 10 if device_memory is None else min(device_memory, traits.free_bytes)
    merged = [task for task in chain(single, *groups) if task.method is not None and task.n_elements]
    ring = scratch = 0
    for task in merged:
        least, own = needs([least_piece(task)], measured=False)
        least = max(least, block_bytes(least_piece(task)))  # a chunk in host memory fits a slot
        ring, scratch = max(ring, PIECES_IN_FLIGHT * round_up(least, ALIGNMENT)), max(scratch, own)
    scratch = max(scratch, SCRATCH_BYTES)
    if ring + scratch > limit:
        given = "free" if device_memory is None or device_memory > limit else "allowed"
        raise ArgumentError(
            f"{traits.name}: a device memory of {limit} bytes, which is what is {given}, is too little for "
            f"this merge; it needs at least {ring + scratch} ({math.ceil((ring + scratch) / 1e6)}M). "
            "Pass --device cpu, or allow more."
        )
    wanted = UNITS_IN_RING * UNIT_BYTES
    candidates = [[task] for task in single if task.method is not None and count_passes([task]) > 1]
    candidates += map(list, groups)
    sizes = (needs(Part(task, 0, task.n_elements) for task in tasks) for tasks in candidates)
    for together, own in sorted(set(sizes), key=sum):
        if max(ring, together) + max(scratch, own) <= limit:
            ring, scratch = max(ring, together), max(scratch, own)
            wanted = max(wanted, 2 * together + 2 * UNIT_BYTES)
    of_a_unit = _rank_bytes(int(rank_share(merged) * UNIT_BYTES) // RANK_ITEM_BYTES, 0)
    scratch = max(scratch, min(of_a_unit, (limit - ring) // 4))  # a quarter is enough for smaller ones
    ring = max(ring, min(wanted, limit - scratch)) // ALIGNMENT * ALIGNMENT
    return DevicePlan(traits, ring, scratch, limit)


def rank_share(tasks: Iterable[Task]) -> float:
    """Ranks of everything that is merged together, as a share of its inputs and results."""
    share = 0.0
    for task in tasks:
        if row_elements(task) and task.n_elements:
            part = Part(task, 0, task.n_elements)
            ranks = len(task.models) * part.n * RANK_ITEM_BYTES
            share = max(share, ranks / (part.operand_bytes + part.result_bytes))
    return share
