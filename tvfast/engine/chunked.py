"""Chunks in host memory that pass through a device: combined there, and measured there if its backend can."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tvfast.engine.device import OutOfDeviceMemory, Ticket
from tvfast.engine.device_plan import PIECES_IN_FLIGHT
from tvfast.engine.offload import Offload, Region, equal_slots
from tvfast.engine.streamed import PartsBackend
from tvfast.ops.raw import Accumulation, ResumableBackend, Selection, Wants
from tvfast.program import Keep, Moments, Program, RankQuery, TensorScalars, Threshold, WorkTable


class ChunkCombiner:
    """Combines chunks of at most `chunk_bytes`, or of all that the region was made for, some in flight."""

    def __init__(self, offload: Offload, region: Region, chunk_bytes: int) -> None:
        self._offload = offload
        self._free: queue.SimpleQueue[Region] = queue.SimpleQueue()
        n_slots = min(PIECES_IN_FLIGHT, max(1, region.n_bytes // chunk_bytes))
        for slot in equal_slots(region, n_slots):
            self._free.put(slot)
        self._leaving: dict[int, tuple[Ticket, Region]] = {}

    def combine(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int = 0
    ) -> None:
        """Put a chunk's work into the queues of the device; `finish` waits for it."""
        slot = self._free.get()
        with suppress(OutOfDeviceMemory):
            self._leaving[_key(table)] = self._offload.combine(table, program, scalars, slot), slot
            return
        self._offload.combine_in_pieces(table, program, scalars, slot)
        self._free.put(slot)

    def finish(self, address: int) -> None:
        """Wait for the results of the chunk whose first is at `address`."""
        leaving = self._leaving.pop(address, None)
        if leaving is not None:
            ticket, slot = leaving
            try:
                ticket.wait()
            finally:
                self._free.put(slot)  # who waits for one learns of the failure at the next chunk


def _key(table: WorkTable) -> int:
    first = table.entries[0].out
    assert first is not None
    return first.address


def measurer(offload: Offload, host: PartsBackend, region: Region) -> PartsBackend:
    """Who measures chunks: the device if its backend has the resumable forms, otherwise the host."""
    backend = offload.backend
    return ChunkMeasurer(offload, backend, region) if isinstance(backend, ResumableBackend) else host


class ChunkMeasurer:
    """`engine.streamed.PartsBackend` whose parts are uploaded for every question, one at a time."""

    def __init__(self, offload: Offload, backend: ResumableBackend, region: Region) -> None:
        self.name = backend.name
        self._offload = offload
        self._backend = backend
        self._region = region

    def why_not(self, table: WorkTable) -> str | None:
        return None  # asked again of what is in the ring

    def select(self, keep: Keep, queries: Sequence[RankQuery], group_sizes: Sequence[int]) -> Selection:
        inner = self._backend.select(keep, queries, group_sizes)
        return _Selection(self._offload, self._region, inner)

    def accumulate(self, n_entries: int, n_models: int) -> Accumulation:
        inner = self._backend.accumulate(n_entries, n_models)
        return _Accumulation(self._offload, self._region, inner)

    def count_equal(
        self, table: WorkTable, keep: Keep, queries: Sequence[tuple[int, int, float]], n_threads: int = 0
    ) -> list[list[int]]:
        return self._offload.ask(
            table, self._region, lambda there: self._backend.count_equal(there, keep, queries, n_threads)
        )

    def nth_equal(
        self, table: WorkTable, keep: Keep, queries: Sequence[tuple[int, int, float, int]], n_threads: int = 0
    ) -> list[int]:
        return self._offload.ask(
            table, self._region, lambda there: self._backend.nth_equal(there, keep, queries, n_threads)
        )

    def combine(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int = 0
    ) -> None:
        self._offload.combine_in_pieces(table, program, scalars, self._region)


_NOTHING = WorkTable([], 0)
"""For questions about what was counted before."""


@dataclass(frozen=True, slots=True)
class _Selection:
    offload: Offload
    region: Region
    inner: Selection

    def sample(self, part: WorkTable, n_threads: int = 0) -> None:
        self.offload.ask(part, self.region, lambda there: self.inner.sample(there, n_threads))

    def guesses(self, n_threads: int = 0) -> list[tuple[float, bool]]:
        return self.offload.ask(_NOTHING, self.region, lambda there: self.inner.guesses(n_threads))

    def count(self, part: WorkTable, n_threads: int = 0) -> None:
        self.offload.ask(part, self.region, lambda there: self.inner.count(there, n_threads))

    def finish(self) -> list[Threshold] | None:
        return self.offload.ask(_NOTHING, self.region, lambda there: self.inner.finish())


@dataclass(frozen=True, slots=True)
class _Accumulation:
    offload: Offload
    region: Region
    inner: Accumulation

    def measure(
        self,
        part: WorkTable,
        rows: Sequence[int],
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> None:
        self.offload.ask(
            part,
            self.region,
            lambda there: self.inner.measure(there, rows, program, scalars, wants, n_threads),
        )

    def finish(self) -> list[Moments]:
        return self.offload.ask(_NOTHING, self.region, lambda there: self.inner.finish())
