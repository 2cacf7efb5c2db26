"""Tensors as units of work: neighbours together, large ones in pieces, whole, or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tvfast.engine.arrange import Part, block_bytes
from tvfast.engine.cuts import elements_within, least_piece
from tvfast.engine.device import ALIGNMENT
from tvfast.engine.device_plan import PIECES_IN_FLIGHT, UNITS_IN_RING, DevicePlan, needs, rank_share
from tvfast.engine.memory import round_up
from tvfast.engine.passes import count_passes, count_samples
from tvfast.engine.sampling import samples
from tvfast.engine.tasks import Task

CHUNKS_IN_FLIGHT = 4
"""Of a streamed unit: one is merged, one written, two are read."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Work that one worker does at a time.

    Attributes:
        parts: in the order of the output.
        chunk_bytes: 0: all parts are in host memory together. Otherwise they pass through it in chunks of so
            many bytes, as often as the method asks.
        n_bytes: host memory held while it runs, scratch not counted.
        n_passes: how often its inputs are read, usually.
        ring_bytes: of a device, held while it runs; 0: it is merged, or copied, on the host.
        sampled_bytes: of its inputs that are read besides, for the first brackets of thresholds.
        resident: all parts are on the device together and are measured there. Otherwise a device combines
            them in pieces, and the host measures them, or the device in parts.
    """

    parts: tuple[Part, ...]
    chunk_bytes: int
    n_bytes: int
    n_passes: int
    ring_bytes: int = 0
    resident: bool = False
    sampled_bytes: int = 0

    @property
    def input_bytes(self) -> int:
        return sum(part.input_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Room:
    """What one unit may take. Sizes are bytes of the host.

    Attributes:
        arena: all of it.
        unit: of neighbours together.
        most: of a tensor that is there as a whole; a larger one passes through in chunks.
        chunk: of one tensor that passes through.
        whole_chunk: of a model that is ranked together.
        device: where to merge; None: on the host.
    """

    arena: int
    unit: int
    most: int
    chunk: int
    whole_chunk: int
    device: DevicePlan | None = None

    @staticmethod
    def on_host(unit_bytes: int, n_workers: int, arena: int) -> Room:
        """Every tensor that fits the arena is there as a whole."""
        unit, chunk = min(unit_bytes, arena // (n_workers + 1)), arena // CHUNKS_IN_FLIGHT
        # Where there is room, the other workers copy and merge while one streams a model.
        whole = max(min(unit_bytes, chunk), (arena - (n_workers - 1) * unit) // CHUNKS_IN_FLIGHT)
        return Room(arena, unit, arena, min(2 * unit, chunk), min(2 * unit_bytes, whole))

    @staticmethod
    def beside(
        device: DevicePlan, unit_bytes: int, n_workers: int, arena: int, single: Sequence[Task]
    ) -> Room:
        """Large tensors are whole on the device only, so that little host memory is pinned."""
        unit = min(unit_bytes, arena // (n_workers + 1), device.ring_bytes // UNITS_IN_RING)
        share = rank_share(single)
        if share:
            unit = min(unit, int(device.scratch_bytes / share))
        chunk = min(unit // 2, arena // CHUNKS_IN_FLIGHT)
        return Room(arena, unit, min(2 * unit, arena), chunk, chunk, device)


def grouped_unit(group: Sequence[Task], room: Room, *, together: bool) -> Unit:
    """What is ranked together: on the device at once, or streamed; `together` on the host if that fits."""
    if together:
        return _measured_together(whole_parts(group), room, room.whole_chunk)
    return _in_chunks(whole_parts(group), _chunk_bytes(group, room.whole_chunk), room.device)


def whole_parts(tasks: Sequence[Task]) -> tuple[Part, ...]:
    """Every task as one part."""
    return tuple(Part(task, 0, task.n_elements) for task in tasks)


def group_bytes(group: Sequence[Task]) -> int:
    """What all tensors of a group take in host memory together."""
    return sum(map(block_bytes, whole_parts(group)))


def _chunk_bytes(tasks: Sequence[Task], usual: int) -> int:
    return max(usual, *map(least_chunk_bytes, tasks))


def cut_into_units(wanted: Sequence[Part], room: Room) -> Iterator[Unit]:
    """Neighbours together up to a size; what can be cut is, what cannot is held whole or streamed."""
    parts: list[Part] = []
    used = _Used()

    def flush() -> Iterator[Unit]:
        nonlocal used
        if parts:
            yield _together(tuple(parts), used.host, room)
        parts.clear()
        used = _Used()

    for whole in wanted:
        task = whole.task
        if task.tensor is not None:
            yield from flush()
            yield Unit((whole,), 0, whole_bytes(task), 1)
            continue
        own = _Used.of(whole)
        if count_passes([task]) == 1 and own.host > room.unit:
            pieces: Iterable[Part] = _pieces(whole, room.unit)
        elif count_passes([task]) > 1 and not own.fits(room):
            yield from flush()
            yield _measured_together((whole,), room, room.chunk)
            continue
        else:
            pieces = (whole,)
        for piece in pieces:
            own = _Used.of(piece)
            if not used.plus(own).fits(room):
                yield from flush()
            parts.append(piece)
            used = used.plus(own)
    yield from flush()


@dataclass(frozen=True, slots=True)
class _Used:
    """Bytes of parts: of the host, and of a device's ring and scratch."""

    host: int = 0
    ring: int = 0
    scratch: int = 0

    @staticmethod
    def of(part: Part) -> _Used:
        return _Used(block_bytes(part), *needs([part]))

    def plus(self, other: _Used) -> _Used:
        return _Used(self.host + other.host, self.ring + other.ring, self.scratch + other.scratch)

    def fits(self, room: Room) -> bool:
        if self.host > room.unit:
            return False
        device = room.device
        return device is None or (self.ring <= device.ring_bytes and self.scratch <= device.scratch_bytes)


def _together(parts: tuple[Part, ...], n_bytes: int, room: Room) -> Unit:
    """Parts that are in memory at once."""
    if room.device is None:
        return Unit(parts, 0, n_bytes, 1)
    return Unit(parts, 0, n_bytes, 1, needs(parts)[0], True)


def _measured_together(parts: tuple[Part, ...], room: Room, chunk_bytes: int) -> Unit:
    """Tensors that are measured, together, before any is written, however large."""
    size, device = sum(map(block_bytes, parts)), room.device
    chunk = _chunk_bytes([part.task for part in parts], chunk_bytes)
    resident = device is not None and device.holds(parts)
    passes_through = resident and CHUNKS_IN_FLIGHT * chunk <= room.arena
    if size <= (room.most if passes_through else room.arena):
        if device is None or resident:
            return _together(parts, size, room)
        return Unit(parts, 0, size, 1, _ring_of_pieces(room.unit, device))
    return _in_chunks(parts, chunk, device)


def _in_chunks(parts: tuple[Part, ...], chunk_bytes: int, device: DevicePlan | None) -> Unit:
    """Tensors with one method, of which no more than a few chunks are in host memory."""
    n_bytes = CHUNKS_IN_FLIGHT * chunk_bytes
    if device is not None and device.holds(parts):
        return Unit(parts, chunk_bytes, n_bytes, 1, needs(parts)[0], True)
    tasks = [part.task for part in parts]
    ring = _ring_of_pieces(chunk_bytes, device) if device else 0
    sampled = count_samples(tasks) * sum(run.input_bytes for run in samples(parts))
    return Unit(parts, chunk_bytes, n_bytes, count_passes(tasks), ring, sampled_bytes=sampled)


def _ring_of_pieces(piece_bytes: int, device: DevicePlan) -> int:
    """For a tensor that is combined in pieces; a device that has less takes smaller ones."""
    return min(device.ring_bytes, PIECES_IN_FLIGHT * round_up(piece_bytes, ALIGNMENT))


def _pieces(part: Part, unit_bytes: int) -> Iterator[Part]:
    """Equal pieces of a tensor that needs no statistics, or of a part of one."""
    n, end = elements_within(part.task, unit_bytes), part.start + part.n
    return (Part(part.task, start, min(n, end - start)) for start in range(part.start, end, n))


def least_chunk_bytes(task: Task) -> int:
    """Of the host, for the smallest piece that a tensor can be cut into."""
    return block_bytes(least_piece(task))


def smallest_bytes(task: Task) -> int:
    """The least host memory that a tensor can be merged in."""
    whole = whole_bytes(task)
    return whole if task.tensor is not None else min(whole, CHUNKS_IN_FLIGHT * least_chunk_bytes(task))


def whole_bytes(task: Task) -> int:
    """Host memory of a tensor that is there as a whole, with what its method takes beside it."""
    scratch = 0 if task.tensor is None else task.tensor.scratch_bytes
    return block_bytes(Part(task, 0, task.n_elements)) + scratch


def not_on_device(units: Sequence[Unit], device: DevicePlan) -> Iterator[str]:
    """What the device does not hold, for those who read the plan."""
    name = device.traits.name
    by_place: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.ring_bytes and not unit.resident:
            in_parts = device.traits.resumable and unit.chunk_bytes
            by_place.setdefault(f"on {name} in parts" if in_parts else "on the CPU", []).append(unit)
    for where, found in by_place.items():
        largest = max(found, key=lambda unit: sum(needs(unit.parts)))
        n_tensors = sum(len(unit.parts) for unit in found)
        what = f"{n_tensors} tensors" if n_tensors > 1 else repr(largest.parts[0].task.name)
        yield (
            f"{what}: measured {where}, combined on {name} in pieces; at once "
            f"{largest.parts[0].task.name!r}{' and all others' if len(largest.parts) > 1 else ''} would take "
            f"{sum(needs(largest.parts))} bytes there, of {device.limit_bytes}"
        )
