"""The plan of a merge: which tensors are in memory together, how often each byte is read, what that takes.

A plan depends on the recipe, the headers and the memory allowed; it never changes a byte of the output.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tvfast.checkpoint.layout import Layout
from tvfast.engine.arrange import Part, block_bytes
from tvfast.engine.passes import count_passes, count_samples
from tvfast.engine.sampling import samples
from tvfast.engine.tasks import Task, row_elements
from tvfast.errors import ArgumentError, RecipeError
from tvfast.methods.base import Method

if TYPE_CHECKING:
    from tvfast.engine.binding import Binding

MiB = 2**20

UNIT_BYTES = 32 * MiB
"""Inputs and output that a worker holds; small enough for the last-level cache, large enough for the disk."""

CUT = 65536
"""Tensors are cut at multiples of it: whole pages of every storage type."""

PROGRAM_BYTES = 56 * MiB
"""Resident memory of the interpreter, the extension and their threads, before any tensor is read."""

TENSOR_BYTES = 512
"""What is known of one tensor of one file, as objects of the interpreter; three times that where a whole
model is streamed together."""

SCRATCH_BYTES = 24 * MiB
"""What kernels and bit planes take for one unit, at most."""

RANK_BYTES = 8 * MiB
"""What ranking takes besides its rows."""

LONG_ROW = 2**17
"""Rows up to this length are ranked as a whole, 20 + 8 K bytes per element for each thread."""

SEGMENT_BYTES = 56 * MiB
"""What ranking longer rows takes, in segments, for each worker."""

TORCH_BYTES = 320 * MiB
"""Resident memory of torch, where a method needs it: 230 MiB for its CPU build, and its allocator's."""

STREAM_BYTES = 80 * MiB
"""What the selection of thresholds takes where tensors are streamed; one unit is at a time."""

STREAM_MODELS = 16
"""Each further model's sample adds MiB."""

CHUNKS_IN_FLIGHT = 4
"""Of a streamed unit: one is merged, one written, two are read."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Work that one worker does at a time.

    Attributes:
        parts: in the order of the output.
        chunk_bytes: 0: all parts are in memory together. Otherwise they are streamed, as often as the method
            asks, in chunks of so many bytes.
        n_bytes: memory held while it runs, scratch not counted.
        n_passes: how often its inputs are read, usually.
        sampled_bytes: of its inputs that are read besides, for the first brackets of thresholds.
    """

    parts: tuple[Part, ...]
    chunk_bytes: int
    n_bytes: int
    n_passes: int
    sampled_bytes: int = 0

    @property
    def input_bytes(self) -> int:
        return sum(part.input_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a merge will do. Sizes are bytes.

    Attributes:
        units: in the order in which they start.
        n_workers: units at work at a time.
        n_threads: threads of one kernel call.
        arena_bytes: memory for tensors.
        peak_bytes: bound of the resident memory of the process.
        read_bytes, write_bytes: over all passes, with the samples that come before them.
        reasons: for every pass beyond the first.
        warnings: of the recipe and of the files.
    """

    binding: Binding
    layout: Layout
    units: tuple[Unit, ...]
    n_workers: int
    n_threads: int
    arena_bytes: int
    peak_bytes: int
    read_bytes: int
    write_bytes: int
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def tensors(self) -> tuple[tuple[str, tuple[int, ...], str, str], ...]:
        """(name, shape, dtype, method and its numbers) of every tensor of the output."""
        return tuple(
            (task.name, task.shape, task.dtype, describe(_method(task))) for task in self.binding.tasks
        )

    @property
    def n_passes(self) -> int:
        """The most often that a tensor is read."""
        return max((unit.n_passes for unit in self.units), default=0)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `tvfast plan --json`."""
        counts = Counter(describe(_method(task)) for task in self.binding.tasks)
        return {
            "tensors": len(self.binding.tasks),
            "units": len(self.units),
            "passes": self.n_passes,
            "passes_why": list(self.reasons),
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_bytes": self.peak_bytes,
            "threads": self.n_threads,
            "methods": [{"tensors": n, "method": method} for method, n in counts.items()],
            "shards": [{"name": shard.name, "bytes": shard.n_bytes} for shard in self.layout.shards],
            "warnings": list(self.warnings),
        }


def describe(method: Method | None) -> str:
    """A method and those of its numbers that differ from their defaults, on one line."""
    if method is None:
        return "copy"
    changed = [
        f"{f.name}={getattr(method, f.name)}" for f in fields(method) if getattr(method, f.name) != f.default
    ]
    return " ".join([method.info.name, *changed])


def _method(task: Task) -> Method | None:
    return task.method if task.tensor is None else task.tensor.method


def make_plan(binding: Binding, layout: Layout, *, memory: int | None = None, n_threads: int = 0) -> Plan:
    """Divide the work into units that fit the memory.

    Args:
        memory: bound of the resident memory, bytes; None: what keeps disk and cores busy, at most half of
            what the machine has free.
        n_threads: 0: all cores that the process may use.

    Raises:
        ArgumentError: `memory` is less than the smallest possible, which is named.
        RecipeError: a method ranks the whole model, and its numbers differ between tensors.
    """
    threads = n_threads or len(os.sched_getaffinity(0))
    groups, single = _split_by_scope(binding.tasks)
    budget = _budget(groups, single, threads, memory)
    arena, n_workers = budget.arena, budget.n_workers
    unit_bytes = min(UNIT_BYTES, arena // (n_workers + 1))
    units = [_grouped_unit(group, arena) for group in groups]
    units += _units(single, unit_bytes, arena)
    return Plan(
        binding=binding,
        layout=layout,
        units=tuple(units),
        n_workers=n_workers,
        n_threads=threads,
        arena_bytes=arena,
        peak_bytes=budget.fixed + min(arena, sum(u.n_bytes for u in units)),
        read_bytes=sum(unit.input_bytes * unit.n_passes + unit.sampled_bytes for unit in units),
        write_bytes=layout.n_bytes,
        reasons=tuple(_reasons(units, arena)),
        warnings=binding.warnings,
    )


@dataclass(frozen=True, slots=True)
class _Budget:
    """How memory is divided: `arena` for tensors, `fixed` for everything else."""

    n_workers: int
    arena: int
    fixed: int


def _budget(
    groups: Sequence[Sequence[Task]], single: Sequence[Task], n_threads: int, memory: int | None
) -> _Budget:
    """As many workers as memory allows; one more than threads keeps cores busy while one waits for the disk.

    Raises:
        ArgumentError: even one worker needs more than `memory`.
    """
    whole = [task for group in groups for task in group]
    least = max([_smallest(t) for t in single] + [CHUNKS_IN_FLIGHT * _least_chunk(t) for t in whole])
    largest = max((block_bytes(Part(t, 0, t.n_elements)) for t in single if count_passes([t]) > 1), default=0)
    largest = max([largest, *(_group_bytes(group) for group in groups if not _is_whole_model(group))])
    known = TENSOR_BYTES * (
        sum(len(t.inputs) + 2 for t in single) + 3 * sum(len(t.inputs) + 2 for t in whole)
    )
    n_models = max((len(task.models) for task in (*single, *whole)), default=0)
    streamed = STREAM_BYTES + MiB * max(0, n_models - STREAM_MODELS)
    tensors = sorted(_whole_bytes(t) for t in single if t.tensor is not None)
    program = PROGRAM_BYTES + (TORCH_BYTES if tensors else 0)
    free = _free_memory() // 2
    n_workers = n_threads + 1
    while True:
        together = sum(tensors[-n_workers:])
        wanted = max((n_workers + 1) * UNIT_BYTES, least, largest + 2 * UNIT_BYTES, together)
        scratch = _Scratch.of(single, n_workers, n_threads)
        fixed = arena = 0
        for stream in (streamed,) if whole else (0, streamed):
            fixed = program + known + stream
            if memory is None:
                arena = max(least, min(wanted, free))
            else:  # scratch grows with the arena: what is left beside the least of it is too much at most
                arena = min(wanted, memory - fixed - scratch.beside(least))
                arena = max(least, min(arena, memory - fixed - scratch.beside(arena)))
            fixed += scratch.beside(arena)
            if largest <= arena:
                break
        if memory is None or fixed + arena <= memory:
            return _Budget(n_workers, arena, fixed)
        if n_workers == 1:
            raise ArgumentError(
                f"a memory of {memory} bytes is too little for this merge; it needs at least {fixed + arena} "
                f"({math.ceil((fixed + arena) / 1e6)}M)."
            )
        n_workers = (n_workers + 1) // 2


def _split_by_scope(tasks: Iterable[Task]) -> tuple[list[list[Task]], list[Task]]:
    """Groups of tasks that are ranked together, and all others."""
    groups: dict[str, list[Task]] = {}
    single: list[Task] = []
    for task in tasks:
        group = None if task.method is None else task.method.group_of(task.key)
        (single if group is None else groups.setdefault(group, [])).append(task)
    for name, members in groups.items():
        methods = list(dict.fromkeys(task.method for task in members))
        if len(methods) > 1 and methods[0] is not None:
            raise RecipeError(
                f"method {methods[0].info.name!r}, dialect {methods[0].dialect!r} ranks all tensors "
                f"{f'of {name!r} ' if name else ''}together, but its numbers differ between tensors: "
                f"{describe(methods[0])}, {describe(methods[1])}. Give one value for all of them, or use a "
                "dialect or scope that ranks each tensor by itself."
            )
    return list(groups.values()), single


def _is_whole_model(group: Sequence[Task]) -> bool:
    return group[0].method is not None and group[0].method.whole_model


def _group_bytes(group: Sequence[Task]) -> int:
    """What all tensors of a group take in memory together."""
    return sum(block_bytes(Part(task, 0, task.n_elements)) for task in group)


def _grouped_unit(group: Sequence[Task], arena: int) -> Unit:
    """Tensors that are ranked together: held together if they are a layer that fits, otherwise streamed."""
    parts = tuple(Part(task, 0, task.n_elements) for task in group)
    if not _is_whole_model(group) and _group_bytes(group) <= arena:
        return Unit(parts, 0, _group_bytes(group), 1)
    return _streamed(group, min(2 * UNIT_BYTES, arena // CHUNKS_IN_FLIGHT))


def _units(tasks: Sequence[Task], unit_bytes: int, arena: int) -> Iterator[Unit]:
    """Neighbours together up to `unit_bytes`; what can be cut is, what cannot is held whole or streamed."""
    parts: list[Part] = []
    used = 0

    def flush() -> Iterator[Unit]:
        nonlocal used
        if parts:
            yield Unit(tuple(parts), 0, used, 1)
        parts.clear()
        used = 0

    for task in tasks:
        whole = Part(task, 0, task.n_elements)
        size = _whole_bytes(task)
        if task.tensor is not None:
            yield from flush()
            yield Unit((whole,), 0, size, 1)
            continue
        if size <= unit_bytes:
            pieces: Iterable[Part] = (whole,)
        elif count_passes([task]) == 1:
            pieces = _pieces(task, unit_bytes)
        else:
            yield from flush()
            if size <= arena:
                yield Unit((whole,), 0, size, 1)
            else:
                chunk = max(min(2 * unit_bytes, arena // CHUNKS_IN_FLIGHT), _least_chunk(task))
                yield _streamed([task], chunk)
            continue
        for piece in pieces:
            size = block_bytes(piece)
            if used + size > unit_bytes:
                yield from flush()
            parts.append(piece)
            used += size
    yield from flush()


def _streamed(tasks: Sequence[Task], chunk_bytes: int) -> Unit:
    """Tasks with one method, of which no more than a few chunks are in memory."""
    parts = tuple(Part(task, 0, task.n_elements) for task in tasks)
    sampled = count_samples(tasks) * sum(run.input_bytes for run in samples(parts))
    return Unit(parts, chunk_bytes, CHUNKS_IN_FLIGHT * chunk_bytes, count_passes(tasks), sampled)


def _pieces(task: Task, unit_bytes: int) -> Iterator[Part]:
    """Equal pieces of a tensor that needs no statistics."""
    n = elements_within(task, unit_bytes)
    return (Part(task, start, min(n, task.n_elements - start)) for start in range(0, task.n_elements, n))


def elements_within(task: Task, n_bytes: int) -> int:
    """How many elements of a tensor, its counterparts and result fit: a multiple of `CUT` and of its rows."""
    one = Part(task, 0, CUT)
    slack = block_bytes(one) - one.input_bytes - one.output_bytes
    n = max(1, (n_bytes - slack) // ((one.input_bytes + one.output_bytes) // CUT))
    row = row_elements(task)
    if row:
        return max(1, n // row) * row
    return max(1, n // CUT) * CUT


def _least_chunk(task: Task) -> int:
    """The smallest piece that a tensor can be cut into."""
    return block_bytes(Part(task, 0, row_elements(task) or CUT))


def _smallest(task: Task) -> int:
    """The least memory that a tensor can be merged in."""
    whole = _whole_bytes(task)
    return whole if task.tensor is not None else min(whole, CHUNKS_IN_FLIGHT * _least_chunk(task))


def _whole_bytes(task: Task) -> int:
    """Memory of a tensor that is held whole, with what its method takes beside it."""
    scratch = 0 if task.tensor is None else task.tensor.scratch_bytes
    return block_bytes(Part(task, 0, task.n_elements)) + scratch


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What all workers take beside the arena.

    Attributes:
        least: without ranks.
        most: the longest row that is ranked as a whole, in all threads of all workers; 0: nothing is ranked.
        share: ranking everything that is in the arena, as a share of it.
        segments: of rows that are longer.
    """

    least: int
    most: int
    share: float
    segments: int
    n_workers: int

    @staticmethod
    def of(tasks: Iterable[Task], n_workers: int, n_threads: int) -> _Scratch:
        most, share, segments = 0, 0.0, 0
        for task in tasks:
            row = row_elements(task)
            if row and task.n_elements:
                n_bytes = 20 + 8 * len(task.models)
                part = Part(task, 0, task.n_elements)
                most = max(most, n_workers * n_threads * min(row, LONG_ROW) * n_bytes)
                share = max(share, part.n * n_bytes / (part.input_bytes + part.output_bytes))
                if row > LONG_ROW:
                    segments = n_workers * SEGMENT_BYTES
        return _Scratch(n_workers * SCRATCH_BYTES, most, share, segments, n_workers)

    def beside(self, arena: int) -> int:
        """Bytes, at most, where tensors take `arena`."""
        if not self.most:
            return self.least
        ranks = min(self.most, math.ceil(self.share * arena)) + self.segments
        return max(self.least, self.n_workers * RANK_BYTES + ranks)


def _reasons(units: Sequence[Unit], arena: int) -> Iterator[str]:
    for unit in units:
        method = unit.parts[0].task.method
        group = None if method is None else method.group_of(unit.parts[0].task.key)
        if method is not None and group is not None and unit.chunk_bytes:
            yield (
                f"{unit.n_passes} passes over {len(unit.parts)} tensors: method {method.info.name!r}, "
                f"dialect {method.dialect!r} ranks {group or 'the whole model'} before it writes anything"
            )
            continue
        if unit.chunk_bytes and unit.n_passes > 1 and len(unit.parts) == 1:
            task = unit.parts[0].task
            yield (
                f"{unit.n_passes} passes over {task.name!r}: it and its counterparts take "
                f"{block_bytes(unit.parts[0])} bytes, the memory for tensors is {arena}"
            )


def _free_memory() -> int:
    """Bytes that new processes can use without swapping, in this machine and this control group."""
    found = [_meminfo("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as first, open(used) as second:
                found.append(int(first.read()) - int(second.read()))
        except (OSError, ValueError):
            pass  # no control group, or one without a limit
    return max(64 * MiB, min(found))


def _meminfo(key: str) -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 1024 * MiB
