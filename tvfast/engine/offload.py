"""Merges on a device: uploads, computations and downloads of different units at the same time.

A worker still owns its unit from reading to writing. It borrows one range of the device's ring, puts its work
into the three queues, and waits for the last of it; meanwhile other workers have theirs in the other queues.
Nobody waits for a second range while holding one, so the ring cannot lock up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from tvfast.engine.cuts import CUT
from tvfast.engine.device import ALIGNMENT, Device, OutOfDeviceMemory, Ticket
from tvfast.engine.device_plan import PIECES_IN_FLIGHT, DevicePlan
from tvfast.engine.memory import Arena, Ranges, round_up
from tvfast.engine.placement import (
    Placement,
    bytes_of_element,
    inputs_at,
    inputs_of,
    output_dtypes,
    outputs_at,
    piece,
    place,
    placed_table,
    transfers,
    within,
)
from tvfast.engine.source import StreamSource
from tvfast.errors import BackendError
from tvfast.methods.base import ProgramMethod, share_groups
from tvfast.methods.merging import merge_table
from tvfast.methods.statistics import TableStatistics
from tvfast.ops.raw import Backend
from tvfast.program import DType, Entry, Program, TensorScalars, View, WorkTable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor in host memory and its method."""

    method: ProgramMethod
    entry: Entry


@dataclass(frozen=True, slots=True)
class Region:
    """A range of the ring."""

    at: int
    n_bytes: int


class Offload:
    """The device of one run.

    Args:
        device: not yet open.
        plan: how its memory is divided.
        host: the backend that measures tensors which the device does not hold.
        go_on: raises if the run has failed or was interrupted.
    """

    def __init__(self, device: Device, plan: DevicePlan, host: Backend, go_on: Callable[[], None]) -> None:
        self._device = device
        self._plan = plan
        self._host = host
        self._go_on = go_on
        self._ranges = Ranges(plan.ring_bytes)
        self._turn = threading.Lock()  # for a range: large ones are not overtaken for ever
        self._computing = threading.Lock()  # one unit's scratch at a time; transfers of others go on

    @property
    def name(self) -> str:
        return self._device.traits.name

    @property
    def backend(self) -> Backend:
        """Computes on the device."""
        return self._device.backend

    def open(self, arena: Arena) -> None:
        """Pin the host's buffers and allocate the ring.

        Raises:
            MergeError: either cannot be had.
        """
        self._device.open(arena.address, arena.n_bytes, self._plan.ring_bytes, self._plan.peak_bytes)

    def drain(self) -> None:
        """Wait for everything in the queues, whatever failed."""
        self._device.drain()

    def close(self) -> int:
        """Give everything back; the most that was taken of the device, in bytes."""
        n_bytes = self._device.peak_bytes()
        self._device.close()
        return n_bytes

    @contextmanager
    def region(self, n_bytes: int) -> Iterator[Region]:
        """A range of the ring; waits until there is one. When it is left, nothing uses it any more."""
        wanted = round_up(n_bytes, ALIGNMENT)
        with self._turn:
            at = self._ranges.acquire(wanted)
        try:
            yield Region(at, wanted)
        except BaseException:
            self._device.drain()
            raise
        finally:
            self._ranges.take_back(at, wanted)

    # -- units in host memory -----------------------------------------------------------------------------

    def merge(
        self, jobs: Sequence[Job], region: Region, meanwhile: Callable[[], None], n_threads: int
    ) -> None:
        """Fill the results of tensors that the device holds; `meanwhile` runs while they are on their way.

        Where the backend finds no memory for its scratch, half of them are tried, and a single one in pieces;
        so are those that are ranked together, which must be of one method.
        """
        entries = [job.entry for job in jobs]
        dtypes = output_dtypes(entries)
        placement = place(entries, region.at, dtypes)
        uploaded = self._device.upload(transfers(inputs_at(entries, placement.inputs)))
        meanwhile()
        try:
            computed = self._merge_placed(jobs, placement, dtypes, region, uploaded)
        except OutOfDeviceMemory:
            if len(jobs) == 1 or any(job.method.group_of(job.entry.name) is not None for job in jobs):
                self.merge_in_pieces(jobs, region, n_threads)
                return
            middle = len(jobs) // 2
            for half in (jobs[:middle], jobs[middle:]):
                self.merge(half, region, self._go_on, n_threads)
            return
        self._device.download(transfers(outputs_at(entries, placement.outputs)), computed).wait()

    def _merge_placed(
        self,
        jobs: Sequence[Job],
        placement: Placement,
        dtypes: Sequence[DType],
        region: Region,
        uploaded: Ticket,
    ) -> Ticket:
        """Measure and combine what is in the ring, everything of one method together."""
        alike: dict[tuple[ProgramMethod, int], list[int]] = {}
        for index, job in enumerate(jobs):
            alike.setdefault((job.method, len(job.entry.models)), []).append(index)
        planes = _Planes(self._device, placement.end, region)

        def merge() -> None:
            for (method, n_models), indices in alike.items():
                own = [replace(jobs[index].entry) for index in indices]
                share_groups(method, own)
                table = self._on_device(
                    own, n_models, placement.of(indices), [dtypes[index] for index in indices]
                )
                self._resolve_and_combine(method, table, planes)

        return self._compute(uploaded, merge)

    def _compute(self, after: Ticket, work: Callable[[], None]) -> Ticket:
        """Let the backend work when `after` is done, one unit at a time.

        Raises:
            OutOfDeviceMemory: nothing is in the queues any more.
        """
        with self._computing:
            try:
                with self._device.compute(after) as computed:
                    work()
                return computed
            except OutOfDeviceMemory as error:
                short = str(error)
            # Only now is its scratch free, which the error's frames have held; the next unit finds it so.
            self._device.drain()
            raise OutOfDeviceMemory(short)

    def _resolve_and_combine(self, method: ProgramMethod, table: WorkTable, planes: _Planes) -> None:
        merge_table(method, TableStatistics(self.backend, table, planes.new), self._go_on)

    def _on_device(
        self, entries: Sequence[Entry], n_models: int, placement: Placement, dtypes: Sequence[DType]
    ) -> WorkTable:
        """Entries over the ring.

        Raises:
            BackendError: the device's backend refuses them.
        """
        table = placed_table(entries, n_models, placement, dtypes, self._device.view)
        reason = self.backend.why_not(table)
        if reason is not None:
            raise BackendError(
                f"{self.name}: backend {self.backend.name!r} cannot merge there: {reason}. Pass --device cpu."
            )
        return table

    # -- tensors that the device does not hold ------------------------------------------------------------

    def merge_in_pieces(self, jobs: Sequence[Job], region: Region, n_threads: int) -> None:
        """Measure tensors of one method on the host; combine them on the device, some pieces in flight."""
        method, entries = jobs[0].method, [replace(job.entry) for job in jobs]
        share_groups(method, entries)
        table = WorkTable(entries, len(entries[0].models))
        program, scalars = method.resolve(TableStatistics(self._host, table, None, n_threads))
        self.combine_in_pieces(table, program, scalars, region)

    def combine_in_pieces(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], region: Region
    ) -> None:
        """Combine tensors in host memory, some pieces in flight; smaller ones where memory is short.

        Raises:
            OutOfDeviceMemory: even the smallest piece finds no memory for scratch.
        """
        for entry, own in zip(table.entries, scalars, strict=True):
            least = (entry.row or entry.n_elements) if program.ranks_rows else CUT
            slots = slots_of(region, entry, least)
            n, start = _elements_within(entry, slots[0].n_bytes, least), 0
            in_flight: deque[Ticket] = deque()
            while start < entry.n_elements:
                self._go_on()
                if len(in_flight) == len(slots):
                    in_flight.popleft().wait()
                part = WorkTable([piece(entry, start, min(n, entry.n_elements - start))], table.n_models)
                try:
                    in_flight.append(self.combine(part, program, [own], slots[0]))
                except OutOfDeviceMemory as error:
                    if n <= least:
                        raise OutOfDeviceMemory(
                            f"tensor {entry.name!r}: {error}, though only {n} elements were to be "
                            f"combined at a time. Free memory of {self.name}, raise --device-memory, or pass "
                            "--device cpu; --resume keeps what is merged."
                        ) from error
                    n = max(least, n // 2 // least * least)
                    continue
                slots.append(slots.pop(0))
                start += n
            for ticket in in_flight:
                ticket.wait()

    def combine(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], slot: Region
    ) -> Ticket:
        """Put upload, computation and download of tensors in host memory into their queues.

        Raises:
            OutOfDeviceMemory: nothing uses the slot any more.
        """
        dtypes = output_dtypes(table.entries)
        placement = place(table.entries, slot.at, dtypes)
        assert placement.end <= slot.at + slot.n_bytes
        uploaded = self._device.upload(transfers(inputs_at(table.entries, placement.inputs)))

        def combine() -> None:
            placed = self._on_device(table.entries, table.n_models, placement, dtypes)
            self.backend.combine(placed, program, scalars)

        computed = self._compute(uploaded, combine)
        return self._device.download(transfers(outputs_at(table.entries, placement.outputs)), computed)

    def ask(self, table: WorkTable, slot: Region, question: Callable[[WorkTable], T]) -> T:
        """What the backend finds in a table in host memory, whose inputs are uploaded for it."""
        placement = place(table.entries, slot.at, ())
        assert placement.end <= slot.at + slot.n_bytes
        uploaded = self._device.upload(transfers(inputs_at(table.entries, placement.inputs)))
        answers: list[T] = []

        def ask() -> None:
            answers.append(question(self._on_device(table.entries, table.n_models, placement, ())))

        self._compute(uploaded, ask).wait()
        return answers[0]

    # -- tensors that the host does not hold --------------------------------------------------------------

    def merge_through(
        self, method: ProgramMethod, table: WorkTable, source: StreamSource, region: Region
    ) -> None:
        """Gather tensors on the device chunk by chunk, merge them there, and write them chunk by chunk.

        Args:
            table: logical; it says what is ranked together.

        Raises:
            OutOfDeviceMemory: no result was touched yet.
        """
        dtypes = source.result_dtypes
        placement = place(table.entries, region.at, dtypes)
        uploaded = self._device.upload(())
        for chunk in source.chunks(write=False):
            self._go_on()
            arriving = (
                (view, within(at, entry.offset, view.dtype))
                for row, entry in zip(chunk.rows, chunk.table.entries, strict=True)
                for view, at in zip(inputs_of(entry), placement.inputs[row], strict=True)
            )
            uploaded = self._device.upload(transfers(arriving))
            uploaded.wait()  # the chunk's memory is read into again; two more are on their way there
        planes = _Planes(self._device, placement.end, region)

        def merge() -> None:
            placed = self._on_device(table.entries, table.n_models, placement, dtypes)
            self._resolve_and_combine(method, placed, planes)

        computed = self._compute(uploaded, merge)
        for results in source.results():
            self._go_on()
            leaving = (
                (view, within(placement.outputs[row], start, view.dtype)) for row, start, view in results
            )
            self._device.download(transfers(leaving), computed).wait()


class _Planes:
    """Zeroed bit planes behind the arrays of a unit."""

    def __init__(self, device: Device, at: int, region: Region) -> None:
        self._device = device
        self._at = at
        self._end = region.at + region.n_bytes

    def new(self, n_bits: int) -> View:
        """
        Raises:
            OutOfDeviceMemory: the region has no room for it.
        """
        at, n_bytes = self._at, (n_bits + 63) // 64 * 8
        if at + n_bytes > self._end:
            raise OutOfDeviceMemory(f"a bit plane of {n_bytes} bytes was not planned")
        self._at = round_up(at + n_bytes, ALIGNMENT)
        return self._device.plane(at, n_bits)


def slots_of(region: Region, entry: Entry, least: int) -> list[Region]:
    """Equal parts of a region for pieces in flight, each of at least `least` elements of an entry."""
    smallest = piece(entry, 0, min(least, entry.n_elements))
    n_bytes = max(place([smallest], 0, output_dtypes([entry])).end, ALIGNMENT)
    return equal_slots(region, min(PIECES_IN_FLIGHT, region.n_bytes // n_bytes))


def equal_slots(region: Region, n: int) -> list[Region]:
    """n parts of a region."""
    size = region.n_bytes // n // ALIGNMENT * ALIGNMENT
    return [Region(region.at + k * size, size) for k in range(n)]


def _elements_within(entry: Entry, n_bytes: int, multiple: int) -> int:
    """How many elements of an entry with its result fit; at least `multiple`, which is known to."""
    size = bytes_of_element(entry)
    n = (n_bytes - ALIGNMENT * (len(entry.models) + 3)) // size
    return max(1, n // multiple) * multiple
