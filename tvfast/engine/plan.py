"""The plan of a merge: which tensors are in memory together, how often each byte is read, what that takes.

A plan depends on the recipe, the headers and the memory allowed; it never changes a byte of the output.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from tvfast.checkpoint.layout import Layout
from tvfast.engine import device_plan
from tvfast.engine.arrange import Part, block_bytes
from tvfast.engine.device import ALIGNMENT, Traits
from tvfast.engine.device_plan import MOST_WORKERS, DevicePlan, plan_device
from tvfast.engine.machine import free_memory, stay_cached
from tvfast.engine.memory import PAGE, round_up
from tvfast.engine.passes import count_passes
from tvfast.engine.shown import resident_bytes
from tvfast.engine.tasks import Task, row_elements
from tvfast.engine.units import (
    CHUNKS_IN_FLIGHT,
    Room,
    Unit,
    cut_into_units,
    group_bytes,
    grouped_unit,
    least_chunk_bytes,
    not_on_device,
    smallest_bytes,
    whole_bytes,
    whole_parts,
)
from tvfast.errors import ArgumentError, RecipeError
from tvfast.methods.base import Method

if TYPE_CHECKING:
    from tvfast.engine.binding import Binding

MiB = 2**20

UNIT_BYTES = 32 * MiB
"""Inputs and output that a worker holds; small enough for the last-level cache, large enough for the disk."""

FEW_THREADS = 4
"""Up to so many, two workers more than threads keep the cores busy while others wait for the disk: merges of
a warm 0.5 B family take 0.9 of the time that they take with one. With more threads, one more is enough."""

PROGRAM_BYTES = 56 * MiB
"""Resident memory of the interpreter, the extension and their threads, before any tensor is read."""

TENSOR_BYTES = 512
"""What is known of one tensor of one file, as objects of the interpreter; three times that where a whole
model is streamed together."""

PIECE_BYTES = 400
"""What is known of one piece of a tensor."""

METADATA_PEAK, METADATA_LEFT = 24, 14
"""Bytes for each one of the largest `.metadata` of a distributed checkpoint: while it is read, and what that
leaves between objects that stay; 18 to 23 and 3 to 10 were seen, with 1 to 64 pieces a tensor."""

SHOWN_BYTES = 512 * MiB
"""What is allowed, at most, for whole matrices in the page cache while their rows are gathered."""

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


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several ranks does.

    Attributes:
        parts: what it writes, in the order of the output.
        per_host: ranks that share the cores and the memory of this machine.
    """

    parts: tuple[Part, ...]
    per_host: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank has to do. Sizes are bytes.

    Attributes:
        read_bytes, write_bytes: over all passes.
        peak_bytes: bound of the resident memory of its process.
        n_units: of work.
        by_method: what goes in and out of the kernels of each method once.
    """

    read_bytes: int
    write_bytes: int
    peak_bytes: int
    n_units: int
    by_method: Mapping[str, int]

    def then(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
            max(self.peak_bytes, other.peak_bytes),
            self.n_units + other.n_units,
            dict(Counter(self.by_method) + Counter(other.by_method)),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a merge will do. Sizes are bytes.

    Attributes:
        units: in the order in which they start.
        n_workers: units at work at a time.
        n_threads: threads of one kernel call.
        arena_bytes: memory for tensors.
        shown_bytes: of whole matrices that may stand in memory besides, while rows are taken from them.
        peak_bytes: bound of the resident memory of the process.
        read_bytes, write_bytes: over all passes, with the samples that come before them.
        reasons: for every pass beyond the first.
        warnings: of the recipe and of the files.
        device: how the memory of a GPU is divided; None: everything is merged on the host.
        device_why: what the device is, or why there is none.
        stages: names and plans of what has to be merged before; other attributes are of the last stage.
        ranks: what each of several ranks has to do, stages included.
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
    device: DevicePlan | None = None
    device_why: str = ""
    shown_bytes: int = 0
    stages: tuple[tuple[str, Plan], ...] = ()
    ranks: tuple[Work, ...] = ()

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

    @property
    def work(self) -> Work:
        """All of it, done by one rank."""
        by_method: Counter[str] = Counter()
        for unit in self.units:
            for part in unit.parts:
                by_method[describe(_method(part.task)).split()[0]] += part.input_bytes + part.output_bytes
        return Work(self.read_bytes, self.write_bytes, self.peak_bytes, len(self.units), dict(by_method))

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
            "device": {"name": "cpu"} if self.device is None else self.device.as_json(),
            "device_why": self.device_why,
            "methods": [{"tensors": n, "method": method} for method, n in counts.items()],
            "shards": [{"name": shard.name, "bytes": shard.n_bytes} for shard in self.layout.shards],
            "warnings": list(self.warnings),
            "ranks": [asdict(work) for work in self.ranks],
            **({"stages": [{"name": n, **plan.as_json()} for n, plan in self.stages]} if self.stages else {}),
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


def make_plan(
    binding: Binding,
    layout: Layout,
    *,
    memory: int | None = None,
    n_threads: int = 0,
    device: Traits | None = None,
    device_memory: int | None = None,
    device_why: str = "",
    share: Share | None = None,
) -> Plan:
    """Divide the work into units that fit the memory.

    Args:
        memory: bound of the resident memory, bytes; None: what keeps disk and cores busy, at most half of
            what the machine has free.
        n_threads: 0: all cores that the process may use.
        device: where to merge; None: on the host.
        device_memory: bound of what is allocated there, bytes; None: nine tenths of what is free.
        device_why: for those who read the plan.
        share: of one of several ranks; None: everything.

    Raises:
        ArgumentError: `memory` or `device_memory` is less than the smallest possible, which is named; or a
            device is given, and a method that does not run there.
        RecipeError: a method ranks the whole model, and its numbers differ between tensors.
    """
    per_host = share.per_host if share else 1
    threads = n_threads or max(1, len(os.sched_getaffinity(0)) // per_host)
    tasks: Sequence[Task] = binding.tasks
    parts = share.parts if share else whole_parts(tasks)
    if share:
        tasks = list({part.task.name: part.task for part in parts}.values())
    groups, single = _split_by_scope(tasks)
    in_groups = {task.name for group in groups for task in group}
    if device:
        _check_runs_there(tasks, device)
    on_device = plan_device(single, groups, device, device_memory) if device else None
    loads_torch = device or any(task.tensor for task in single)  # and counts it already
    beside = binding.vocabulary_bytes + (TORCH_BYTES if share and not loads_torch else 0)
    beside += METADATA_LEFT * binding.metadata_bytes
    opening = PROGRAM_BYTES + (TORCH_BYTES if share else 0) + METADATA_PEAK * binding.metadata_bytes
    budget = _budget(groups, single, threads, memory, on_device, beside, per_host, opening)
    arena, n_workers = budget.arena, budget.n_workers
    if on_device:
        room = Room.beside(on_device, device_plan.UNIT_BYTES, n_workers, arena, single)
    else:
        room = Room.on_host(UNIT_BYTES, n_workers, arena)
    units = [grouped_unit(group, room, together=not _is_whole_model(group)) for group in groups]
    units += cut_into_units([part for part in parts if part.task.name not in in_groups], room)
    if on_device:
        held = sum(round_up(unit.ring_bytes, ALIGNMENT) for unit in units)
        on_device = on_device.shrunk(max(held, ALIGNMENT), not_on_device(units, on_device))
        arena = min(arena, sum(round_up(unit.n_bytes, PAGE) for unit in units) or PAGE)  # all of it is pinned
    shows = not device and stay_cached(sum(unit.input_bytes for unit in units))
    shown = _shown_bytes(tasks, budget.left) if shows else 0
    return Plan(
        binding=binding,
        layout=layout,
        units=tuple(units),
        n_workers=n_workers,
        n_threads=threads,
        arena_bytes=arena,
        peak_bytes=max(opening, budget.fixed + shown + min(arena, sum(u.n_bytes for u in units))),
        read_bytes=sum(unit.input_bytes * unit.n_passes + unit.sampled_bytes for unit in units)
        + sum(task.gather.sampled_bytes for task in tasks if task.gather),
        write_bytes=sum(part.output_bytes for part in parts) if share else layout.n_bytes,
        reasons=tuple(_reasons(units, arena)),
        warnings=binding.warnings,
        device=on_device,
        device_why=device_why,
        shown_bytes=shown,
    )


@dataclass(frozen=True, slots=True)
class _Budget:
    """How memory is divided: `arena` for tensors, `fixed` for everything else; `left` may be taken yet."""

    n_workers: int
    arena: int
    fixed: int
    left: int


def _budget(
    groups: Sequence[Sequence[Task]],
    single: Sequence[Task],
    n_threads: int,
    memory: int | None,
    device: DevicePlan | None = None,
    beside: int = 0,
    per_host: int = 1,
    opening: int = 0,
) -> _Budget:
    """As many workers as memory allows; one more than threads keeps cores busy while one waits for the disk.

    Args:
        beside: bytes that are held besides.
        per_host: processes that share the free memory.
        opening: the least that is needed, before any tensor is read.

    Raises:
        ArgumentError: even one worker needs more than `memory`.
    """
    whole = [task for group in groups for task in group]
    least = max(
        [smallest_bytes(t) for t in single] + [CHUNKS_IN_FLIGHT * least_chunk_bytes(t) for t in whole],
        default=0,
    )
    measured = [t for t in single if count_passes([t]) > 1]
    tensors = sorted(whole_bytes(t) for t in single if t.tensor is not None)
    program = PROGRAM_BYTES + (TORCH_BYTES if tensors else 0)
    unit, n_workers = UNIT_BYTES, n_threads + (2 if n_threads <= FEW_THREADS else 1)
    streamed = bool(whole)
    if device:  # what it holds need not be on the host as a whole
        measured = [t for t in measured if not device.holds([Part(t, 0, t.n_elements)])]
        program, unit = device.traits.host_bytes, device_plan.UNIT_BYTES
        n_workers = min(n_workers, MOST_WORKERS)
        streamed = True  # where the device proves to have less memory than it said
    largest = max((block_bytes(Part(t, 0, t.n_elements)) for t in measured), default=0)
    layers = [group for group in groups if not _is_whole_model(group)]
    if device:
        layers = [group for group in layers if not device.holds(whole_parts(group))]
    largest = max([largest, *map(group_bytes, layers)])
    known = beside + TENSOR_BYTES * (
        sum(len(t.inputs) + 2 for t in single) + 3 * sum(len(t.inputs) + 2 for t in whole)
    )
    known += PIECE_BYTES * sum(len(one.pieces) for task in (*single, *whole) for one in task.inputs)
    n_models = max((len(task.models) for task in (*single, *whole)), default=0)
    selection = STREAM_BYTES + MiB * max(0, n_models - STREAM_MODELS)
    free = free_memory() // (2 * per_host)
    while True:
        together = sum(tensors[-n_workers:])
        wanted = max((n_workers + 1) * unit, least, largest + 2 * unit, together)
        if whole and single and not device:  # other workers go on beside the one that streams
            wanted = max(wanted, (CHUNKS_IN_FLIGHT + n_workers - 1) * unit)
        scratch = _Scratch.of(single, n_workers, n_threads)
        fixed = arena = 0
        for stream in (selection,) if streamed else (0, selection):
            fixed = program + known + stream
            if memory is None:
                arena = max(least, min(wanted, free))
            else:  # scratch grows with the arena: what is left beside the least of it is too much at most
                arena = min(wanted, memory - fixed - scratch.beside(least))
                arena = max(least, min(arena, memory - fixed - scratch.beside(arena)))
            fixed += scratch.beside(arena)
            if largest <= arena:
                break
        if memory is None or max(opening, fixed + arena) <= memory:
            if device and largest > arena:
                largest = 0  # it is streamed anyway: nothing is pinned for it
                continue
            return _Budget(n_workers, arena, fixed, (free if memory is None else memory - fixed) - arena)
        if n_workers == 1:
            where = f" on {device.traits.name}" if device else ""
            raise ArgumentError(
                f"a memory of {memory} bytes is too little for this merge{where}; it needs at least "
                f"{max(opening, fixed + arena)} ({math.ceil(max(opening, fixed + arena) / 1e6)}M)."
            )
        n_workers = (n_workers + 1) // 2


def _shown_bytes(tasks: Iterable[Task], left: int) -> int:
    """Of whole matrices in the page cache: those that fit, where so many bytes are left."""
    most = max(0, min(SHOWN_BYTES, left))
    sources = (stored for task in tasks if task.gather for stored in task.gather.sources)
    sizes = (resident_bytes(stored.offset, stored.n_bytes) for stored in sources)
    return min(most, sum(n for n in sizes if n <= most))


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


def _check_runs_there(tasks: Iterable[Task], device: Traits) -> None:
    """Raise unless every task is of the stage algebra.

    Raises:
        ArgumentError: a method works on whole tensors with torch, whose sums have another order on a device.
    """
    for task in tasks:
        if task.tensor is not None:
            does = "solves equations" if task.tensor.statistics else "merges whole tensors"
            raise ArgumentError(
                f"{device.name}: method {task.tensor.method.info.name!r} {does} on the CPU only: elsewhere "
                "their last bits would differ, and the bytes of a merge are the same everywhere. "
                "Pass --device cpu."
            )


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
                n_bytes = max(20 + 8 * len(task.models), 27 + 5 * len(task.models))
                part = Part(task, 0, task.n_elements)
                most = max(most, n_workers * n_threads * min(row, LONG_ROW) * n_bytes)
                share = max(share, part.n * n_bytes / (part.operand_bytes + part.result_bytes))
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
        if method is not None and group is not None and unit.chunk_bytes and not unit.resident:
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
