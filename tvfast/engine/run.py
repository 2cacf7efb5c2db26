"""Carries out a plan: workers read a unit, merge it and write it, each on its own; the disk is never idle."""

from __future__ import annotations

import ctypes
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

from tvfast.engine.arrange import Part, Span, arrange, written
from tvfast.engine.chunked import ChunkCombiner, measurer
from tvfast.engine.conversions import narrow_results, widen_inputs
from tvfast.engine.device import Device, OutOfDeviceMemory
from tvfast.engine.finite import check_finite, check_range, reads_all
from tvfast.engine.inputs import FileState, Inputs
from tvfast.engine.machine import stay_cached
from tvfast.engine.memory import Arena, Block, Slots, round_up
from tvfast.engine.observing import Blind, Clock, Observer
from tvfast.engine.offload import Job, Offload, Region
from tvfast.engine.passes import logical_table
from tvfast.engine.plan import UNIT_BYTES, Plan
from tvfast.engine.progress import Progress
from tvfast.engine.source import Loaded, StreamSource, entry_of, load, views_of
from tvfast.engine.staging import Staging
from tvfast.engine.streamed import Combine, PartsBackend, StreamedBackend
from tvfast.engine.units import CHUNKS_IN_FLIGHT, Unit
from tvfast.errors import MergeError
from tvfast.methods.base import ProgramMethod, share_groups
from tvfast.methods.statistics import TableStatistics
from tvfast.ops.host import crc32c
from tvfast.ops.raw import Backend, Look, LookingBackend, backend_for, host_backend
from tvfast.program import DType, View, WorkTable

WRITE_BYTES = 16 * 2**20
"""Of results that are written, and recorded as finished, at a time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did; `notes` are for the report."""

    read_bytes: int
    written_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    device_peak_bytes: int = 0


class Run:
    """One run of a plan into a staged output.

    Args:
        files: every input file as it was when its header was read.
        propagate: NaN and infinity in inputs go through; otherwise they are an error.
        device: what the plan is for; None: the host.
        observer: is shown what is merged; None: nobody looks.
    """

    def __init__(
        self,
        plan: Plan,
        staging: Staging,
        files: Mapping[str, FileState],
        *,
        propagate: bool,
        progress: Progress,
        device: Device | None = None,
        observer: Observer | Blind | None = None,
    ) -> None:
        self._plan = plan
        self._observer = observer or Blind()
        self._staging = staging
        self._propagate = propagate
        self._progress = progress
        self._arena = Arena(plan.arena_bytes)
        on_device = device is not None and plan.device is not None  # whose uploads need memory of our own
        direct = not stay_cached(sum(unit.input_bytes for unit in plan.units))
        self._inputs = Inputs(
            files, direct=direct, on_read=self._on_read, shown=not on_device, matrices=plan.shown_bytes
        )
        self._writers = ThreadPoolExecutor(2, "tvfast-write")
        self._offload: Offload | None = None
        if device is not None and plan.device is not None:
            self._offload = Offload(device, plan.device, host_backend(), self._go_on)
        self._order = threading.Lock()
        self._streaming = threading.Lock()
        self._pending: Iterator[Unit] = iter(())
        self._usual_bytes = 0  # of a block; what is larger has one of its own size
        self._failed: list[BaseException] = []
        self._counts = threading.Lock()
        self._read_bytes = 0
        self._written_bytes = 0
        self._notes: dict[str, str] = {}

    def execute(self) -> Outcome:
        """Merge everything that the staging area does not hold yet.

        Raises:
            MergeError: an input is gone, changed or not finite, or the output cannot be written. What is
                finished stays in the staging area.
        """
        began = time.perf_counter()
        raise_file_limit()
        with ExitStack() as restoring:
            if any(_merges_with_torch(part) for unit in self._plan.units for part in unit.parts):
                from tvfast.engine.tensors import restored_threads

                restoring.enter_context(restored_threads())
            return self._execute(began)

    def _execute(self, began: float) -> Outcome:
        if self._offload is not None:
            self._offload.open(self._arena)
        device_peak_bytes = 0
        units = [unit for unit in self._plan.units if not self._is_done(unit)]
        most = self._arena.n_bytes // self._plan.n_workers
        self._usual_bytes = max((unit.n_bytes for unit in units if unit.n_bytes <= most), default=0)
        self._pending = iter(units)
        self._progress.start(
            sum(unit.input_bytes * unit.n_passes for unit in units),
            sum(part.output_bytes for unit in units for part in unit.parts),
        )
        n_workers = min(self._plan.n_workers, max(1, len(units)))
        pool = ThreadPoolExecutor(n_workers, "tvfast-merge")
        # Futures are waited for, not threads: in Python 3.11, a `join` that a signal interrupts takes a
        # running thread for ended, and the process would leave while it is in the kernels.
        workers = [pool.submit(self._work) for _ in range(n_workers)]
        try:
            wait(workers)
            if not self._failed:
                self._inputs.check()
        except BaseException as error:
            self._failed.insert(0, error)
            self._inputs.stop()
            wait(workers)
        finally:
            pool.shutdown(wait=True)
            self._inputs.close()
            self._writers.shutdown(wait=True)
            if self._offload is not None:
                device_peak_bytes = self._offload.close()
            self._arena.close()
            self._progress.finish()
        if self._failed:
            raise self._failed[0]
        seconds = time.perf_counter() - began
        notes = tuple(self._notes[name] for name in sorted(self._notes))
        return Outcome(self._read_bytes, self._written_bytes, seconds, notes, device_peak_bytes)

    def stop(self, error: BaseException) -> None:
        """Let the run end with `error` as soon as its workers have left their kernels; from any thread."""
        self._fail(error)

    # -- workers ------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Take units in order until none is left or one has failed."""
        try:
            while not self._failed:
                with self._order:  # memory goes to units in order, so the next one always gets its turn
                    unit = next(self._pending, None)
                    if unit is None or self._failed:
                        return
                    # Blocks of one size begin where others began: results find memory that was touched.
                    block = self._arena.acquire(max(unit.n_bytes, self._usual_bytes))
                with block:
                    try:
                        self._process(unit, block)
                    except BaseException as error:
                        # Known before the block is free: other reads and writes of this unit may still be
                        # under way in it, so nobody may use it any more.
                        self._fail(error)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failed.append(error)
        self._inputs.stop()

    def _go_on(self) -> None:
        """Raise if the run has failed or was interrupted: a large unit takes seconds between its steps."""
        if self._failed:
            raise MergeError("stopped")

    def _process(self, unit: Unit, block: Block) -> None:
        self._go_on()
        clock = Clock()
        if unit.chunk_bytes:
            self._observer.know([part.task for part in unit.parts])
            self._process_in_chunks(unit, Slots(block, CHUNKS_IN_FLIGHT))
            clock.lap("streaming")
            self._observer.spent(unit.parts, clock.seconds)
            return
        loaded = Loaded(unit.parts, arrange(unit.parts, self._plan.layout), block)
        for read in load(self._inputs, loaded):
            read.result()
        clock.lap("reading")
        plan = self._plan
        alone = unit.n_bytes > UNIT_BYTES  # larger than others, so that these end before it does
        n_threads = plan.n_threads if alone else -(-plan.n_threads // plan.n_workers)
        widen_inputs(loaded.parts, loaded.arrangement, block.address, n_threads)
        on_host = self._offload is None or not unit.ring_bytes
        try:
            if self._offload is None or on_host:
                if any(map(_merges_with_torch, unit.parts)):
                    block.drop(loaded.arrangement.n_bytes)
                self._merge(loaded, n_threads)
            else:
                self._merge_on_device(self._offload, unit, loaded, n_threads)
        except Exception:
            self._inputs.check_shown(loaded.arrangement.extents, block)  # may be all that is wrong
            raise
        clock.lap("merging")
        self._go_on()
        self._inputs.check_shown(loaded.arrangement.extents, block)
        self._write(loaded, checked=on_host, spread=True)
        clock.lap("writing")
        self._observer.spent(unit.parts, clock.seconds)

    def _merge_on_device(self, offload: Offload, unit: Unit, loaded: Loaded, n_threads: int) -> None:
        """Parts in memory, as `_merge`, through the ring of a device."""
        jobs = []
        for index, part in enumerate(loaded.parts):
            if part.task.method is None:
                _copy(part, loaded, index)
            elif part.n:
                jobs.append(Job(part.task.method, entry_of(part, loaded, index)))
        with offload.region(unit.ring_bytes) as region:
            if unit.resident:
                offload.merge(jobs, region, lambda: self._check_finite(loaded), n_threads)
            else:
                self._check_finite(loaded)
                offload.merge_in_pieces(jobs, region, n_threads)

    def _merge(self, loaded: Loaded, n_threads: int) -> None:
        """Parts in memory: copy what is copied, merge what has the same method together; all are checked."""
        tables: dict[tuple[ProgramMethod, int], list[int]] = {}
        for index, part in enumerate(loaded.parts):
            if part.task.tensor is None and part.task.method is not None:
                if part.n:
                    tables.setdefault((part.task.method, len(part.task.models)), []).append(index)
                continue
            self._check_finite(loaded, [index])
            if part.task.tensor is None:
                _copy(part, loaded, index)
            elif part.n:
                self._merge_tensor(loaded, index, n_threads)
                self._check_range(loaded, [index])
        for (method, _), indices in tables.items():
            self._merge_table(method, loaded, indices, n_threads)

    def _merge_table(
        self, method: ProgramMethod, loaded: Loaded, indices: Sequence[int], n_threads: int
    ) -> None:
        entries = [entry_of(loaded.parts[index], loaded, index) for index in indices]
        share_groups(method, entries)
        table = WorkTable(entries, len(entries[0].models))
        backend = self._backend(table)
        looks = isinstance(backend, LookingBackend) and all(
            reads_all(entry, loaded, index) for entry, index in zip(entries, indices, strict=True)
        )
        if not looks:
            self._check_finite(loaded, indices)
        self._go_on()
        statistics = TableStatistics(backend, table, new_plane, n_threads)
        try:
            program, scalars = method.resolve(statistics)
        except Exception:
            self._check_finite(loaded, indices)  # numbers that are none may be all that is wrong
            raise
        self._go_on()
        self._observer.know([loaded.parts[index].task for index in indices])
        self._observer.kept(table, program, scalars)
        found = Look(0) if self._propagate else Look.RESULTS
        if isinstance(backend, LookingBackend):
            look = found | (Look.INPUTS if found and looks and not statistics.is_finite else Look(0))
            found = backend.combine_looking(table, program, scalars, look, n_threads)
        else:
            backend.combine(table, program, scalars, n_threads)
        if Look.INPUTS in found:
            self._check_finite(loaded, indices)
        if Look.RESULTS in found:
            self._check_range(loaded, indices)

    def _merge_tensor(self, loaded: Loaded, index: int, n_threads: int) -> None:
        """A whole tensor outside the stage algebra."""
        part, task = loaded.parts[index], loaded.parts[index].task
        assert task.tensor is not None
        if merge_views := task.tensor.method.merge_views():
            views = views_of(part, loaded, index)
            base = None if task.base is None else views.pop(0)
            out = View(loaded.block.address + loaded.arrangement.outputs[index], part.n, DType[task.result])
            scratch = loaded.block.address + round_up(loaded.arrangement.n_bytes, 64)
            merge_views(base, views, out, task.shape, scratch, n_threads)
            return
        from tvfast.engine.tensors import merge_part

        note = merge_part(loaded, index)
        if note:
            with self._counts:
                self._notes[loaded.parts[index].task.name] = note

    def _process_in_chunks(self, unit: Unit, slots: Slots) -> None:
        """Parts that are not in host memory at once."""
        offload = self._offload
        if offload is None:
            with self._streaming:  # kernels use every core, and a selection much memory
                self._stream(unit, slots, self._finish_later)
            return
        with offload.region(unit.ring_bytes) as region:
            if unit.resident:
                try:
                    self._merge_through(unit, slots, offload, region)
                    return
                except OutOfDeviceMemory:
                    pass  # in smaller pieces then
            chunks = ChunkCombiner(offload, region, unit.chunk_bytes)

            def finish_later(loaded: Loaded) -> Future[None]:
                first = loaded.block.address + loaded.arrangement.outputs[0]
                return self._finish_later(loaded, lambda: chunks.finish(first))

            with self._streaming:
                self._stream(
                    unit, slots, finish_later, measurer(offload, host_backend(), region), chunks.combine
                )

    def _merge_through(self, unit: Unit, slots: Slots, offload: Offload, region: Region) -> None:
        """Tensors that the device holds, though the host does not."""
        table, method = self._logical(unit)
        offload.merge_through(method, table, self._source(unit, table, slots, self._finish_later), region)

    def _stream(
        self,
        unit: Unit,
        slots: Slots,
        finish: Callable[[Loaded], Future[None]],
        inner: PartsBackend | None = None,
        combine: Combine | None = None,
    ) -> None:
        """Tensors that are never in memory at once: the method's questions become passes over the files."""
        table, method = self._logical(unit)
        source = self._source(unit, table, slots, finish)
        measured = inner or self._backend(table)
        if combine is None:
            combine = self._observer.before(measured.combine)
        backend = StreamedBackend(measured, source, foresee=method.program(), combine=combine)
        threads = self._plan.n_threads
        program, scalars = method.resolve(TableStatistics(backend, table, None, threads))
        backend.combine(table, program, scalars, threads)

    @staticmethod
    def _logical(unit: Unit) -> tuple[WorkTable, ProgramMethod]:
        """The table of a unit whose data are elsewhere, and the method of all its parts."""
        tasks = [part.task for part in unit.parts]
        method = tasks[0].method
        assert method is not None
        return logical_table(tasks), method

    def _source(
        self, unit: Unit, table: WorkTable, slots: Slots, finish: Callable[[Loaded], Future[None]]
    ) -> StreamSource:
        layout, inputs = self._plan.layout, self._inputs
        check = None if self._propagate else check_finite
        return StreamSource(unit, table, layout, inputs, slots, finish, check, self._plan.n_threads)

    def _backend(self, table: WorkTable) -> Backend:
        return backend_for(table)

    def _check_finite(self, loaded: Loaded, indices: Sequence[int] | None = None) -> None:
        if not self._propagate:
            check_finite(loaded, indices)

    def _check_range(self, loaded: Loaded, indices: Sequence[int]) -> None:
        if not self._propagate:
            check_range(loaded, indices)

    # -- results ------------------------------------------------------------------------------------

    def _finish_later(self, loaded: Loaded, before: Callable[[], None] | None = None) -> Future[None]:
        """Write a chunk's results, for which `before` waits, and give its memory back."""

        def finish() -> None:
            try:
                if before is not None:
                    before()
                self._write(loaded)
            finally:
                loaded.block.release()

        return self._writers.submit(finish)

    def _write(self, loaded: Loaded, *, checked: bool = False, spread: bool = False) -> None:
        """Write results; with `spread` large ones by all writers, of which the caller is none."""
        if not (checked or self._propagate):
            check_range(loaded)
        self._observer.results(loaded)
        narrow_results(loaded.parts, loaded.arrangement, loaded.block.address)
        pieces = [piece for span in loaded.arrangement.spans for piece in span.pieces(WRITE_BYTES)]
        if not spread or len(pieces) <= len(loaded.arrangement.spans):
            for piece in pieces:
                self._write_span(piece, loaded)
            return
        writes = [self._writers.submit(self._write_span, piece, loaded) for piece in pieces]
        wait(writes)  # all of them, before the block is free
        for write in writes:
            write.result()

    def _write_span(self, span: Span, loaded: Loaded) -> None:
        if self._staging.is_done(span.shard, span.offset, span.n_bytes):
            self._progress.wrote(span.n_bytes)  # by an earlier run
            return
        address = loaded.block.address + span.at
        checksum = crc32c(address, span.n_bytes)
        data = loaded.block.view[span.at : span.at + span.n_bytes]
        self._staging.write(span.shard, span.offset, data, address)
        self._staging.done(span.shard, span.offset, span.n_bytes, checksum)
        with self._counts:
            self._written_bytes += span.n_bytes
        self._progress.wrote(span.n_bytes)

    def _is_done(self, unit: Unit) -> bool:
        layout = self._plan.layout
        for part in unit.parts:
            for name, begin, n_bytes in written(part):
                place = layout.places[name]
                if not self._staging.is_done(place.shard, place.offset + begin, n_bytes):
                    return False
        return True

    def _on_read(self, n_bytes: int) -> None:
        with self._counts:
            self._read_bytes += n_bytes
        self._progress.read(n_bytes)


def new_plane(n_bits: int) -> View:
    """A zeroed bit plane."""
    words = (ctypes.c_uint64 * ((n_bits + 63) // 64))()
    return View(ctypes.addressof(words), n_bits, DType.F32, words)


def raise_file_limit() -> None:
    """Allow as many open files as the system lets this process have: a 405 B family has hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _copy(part: Part, loaded: Loaded, index: int) -> None:
    """The first model's bytes, which every further model must hold too.

    Raises:
        MergeError: they do not.
    """
    view, n_bytes = loaded.block.view, part.output_bytes
    first, *others = loaded.arrangement.inputs[index]
    data = view[first : first + n_bytes]
    for other, stored in zip(others, part.task.models[1:], strict=True):
        if view[other : other + n_bytes] != data:
            raise MergeError(
                f"{stored.path}: tensor {stored.name!r} ({stored.dtype}) differs from the one in "
                f"{part.task.models[0].path}; integers and booleans are not merged and must be equal in all "
                "models."
            )
    out = loaded.arrangement.outputs[index]
    view[out : out + n_bytes] = data


def _merges_with_torch(part: Part) -> bool:
    task = part.task
    return task.tensor is not None and task.tensor.method.merge_views() is None
