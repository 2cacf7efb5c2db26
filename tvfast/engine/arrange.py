"""Where parts that are in memory together lie in a block, and which bytes of files they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tvfast import dtypes
from tvfast.checkpoint.layout import Layout
from tvfast.checkpoint.stored import Stored, matrix_of
from tvfast.engine.assembly import Assembly
from tvfast.engine.gather import Window
from tvfast.engine.inputs import Extent
from tvfast.engine.memory import PAGE, round_up
from tvfast.engine.tasks import Task

_MANY = 65536  # elements: whole bytes of every storage type


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, start + n) of one task, whole tensors included."""

    task: Task
    start: int
    n: int

    @property
    def output_bytes(self) -> int:
        """What is written."""
        return sum(n_bytes for _, _, n_bytes in written(self))

    @property
    def input_bytes(self) -> int:
        """What is read."""
        own = sum(dtypes.n_bytes(stored.dtype, self.n) for stored in self.task.inputs)
        return own + sum(side.n_bytes for stored in self.task.inputs for side in sides(self, stored))

    @property
    def operand_bytes(self) -> int:
        """What kernels read."""
        return sum(dtypes.n_bytes(stored.operand, self.n) for stored in self.task.inputs)

    @property
    def result_bytes(self) -> int:
        """What kernels write."""
        return dtypes.n_bytes(self.task.result, self.n)


@dataclass(frozen=True, slots=True)
class Side:
    """Bytes that are read beside a tensor's own: rows of `stored` from `first` on."""

    stored: Stored
    first: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of one output shard and where in a block they come from."""

    shard: int
    offset: int
    n_bytes: int
    at: int

    def pieces(self, n_bytes: int) -> Iterator[Span]:
        """The same bytes in ranges of `n_bytes` at most, which is a multiple of the page."""
        for begin in range(0, self.n_bytes, n_bytes):
            size = min(n_bytes, self.n_bytes - begin)
            yield Span(self.shard, self.offset + begin, size, self.at + begin)


@dataclass(frozen=True, slots=True)
class Widening:
    """An input whose numbers are made of several arrays.

    Attributes:
        part, input: which one.
        stored: position of its own bytes.
        sides: positions of what is read beside them, with the first row that is there.
        at: of its numbers; `stored` where they are made in place.
    """

    part: int
    input: int
    stored: int
    sides: tuple[tuple[int, int], ...]
    at: int


@dataclass(frozen=True, slots=True)
class Narrowing:
    """A result that is stored as codes: positions of its numbers, its codes and their factors (-1: none)."""

    part: int
    at: int
    codes: int
    factors: int


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A block's map.

    Attributes:
        extents: what is read into it.
        windows: what is gathered into it.
        assemblies: what is read into it from pieces.
        spans: what is written from it.
        inputs: [part][input] position of the part's numbers.
        outputs: [part] position of the part's result.
        n_bytes: size of the block.
        widenings: what has to be done when it is read.
        narrowings: what has to be done before it is written.
    """

    extents: tuple[Extent, ...]
    windows: tuple[Window, ...]
    spans: tuple[Span, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    n_bytes: int
    widenings: tuple[Widening, ...] = ()
    narrowings: tuple[Narrowing, ...] = ()
    assemblies: tuple[Assembly, ...] = ()


def sides(part: Part, stored: Stored) -> Iterator[Side]:
    """What is read beside the bytes of a part of one input, in the order of `Stored.sides`."""
    if stored.blocks is not None and stored.blocks.factors is not None:
        factors = stored.blocks.factors
        first, end, across = _block_rows(part, stored.blocks.rows, stored.blocks.columns)
        yield _rows_of(factors, first, end, across)
    if stored.update is not None:
        update = stored.update
        yield Side(update.a, 0, update.a.offset, update.a.n_bytes)
        columns = part.task.n_elements // max(1, stored.shape[0])
        if update.transposed or not columns:
            yield Side(update.b, 0, update.b.offset, update.b.n_bytes)
        else:
            end = -(-(part.start + part.n) // columns)
            yield _rows_of(update.b, part.start // columns, end, update.rank)


def written(part: Part) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of what a part gives to tensors of the output."""
    task, n_before = part.task, dtypes.n_bytes(part.task.dtype, part.start)
    yield task.name, n_before, dtypes.n_bytes(task.dtype, part.n)
    if task.encoding is not None and task.encoding.factors is not None:
        name, dtype, _ = task.encoding.factors
        first, end, across = _block_rows(part, task.encoding.rows, task.encoding.columns)
        yield name, dtypes.n_bytes(dtype, first * across), dtypes.n_bytes(dtype, (end - first) * across)


def _block_rows(part: Part, block_rows: int, block_columns: int) -> tuple[int, int, int]:
    """The rows of blocks that a part touches, counted over all matrices, and the blocks in each."""
    rows, columns = matrix_of(part.task.shape)
    if not part.n:
        return 0, 0, 0
    down, across = -(-rows // block_rows), -(-columns // block_columns)

    def row_of(element: int) -> int:
        matrix, row = divmod(element // columns, rows)
        return matrix * down + row // block_rows

    return row_of(part.start), row_of(part.start + part.n - 1) + 1, across


def _rows_of(stored: Stored, first: int, end: int, n_columns: int) -> Side:
    n_before = dtypes.n_bytes(stored.dtype, first * n_columns)
    n_bytes = dtypes.n_bytes(stored.dtype, (end - first) * n_columns)
    return Side(stored, first, stored.offset + n_before, n_bytes)


def element_bytes(task: Task) -> tuple[int, int]:
    """What `65536` elements take in a block, and what all arrays take besides, whatever the elements."""
    one = Part(task, 0, _MANY)
    linear = sum(dtypes.n_bytes(stored.dtype, _MANY) for stored in task.inputs)
    linear += sum(dtypes.n_bytes(s.operand, _MANY) for s in task.inputs if _is_apart(s))
    linear += dtypes.n_bytes(task.dtype, _MANY) + (one.result_bytes if task.encoding else 0)
    beside = [side for stored in task.inputs for side in stored.sides]
    n_arrays = 1 + len(task.inputs) + sum(1 + len(s.sides) for s in task.inputs if s.sides or s.blocks)
    fixed = sum(side.n_bytes for side in beside)
    if task.encoding is not None:
        n_arrays += 2
        if task.encoding.factors is not None:
            _, dtype, shape = task.encoding.factors
            fixed += dtypes.n_bytes(dtype, math.prod(shape))
    return linear, fixed + 2 * PAGE * n_arrays


def block_bytes(part: Part) -> int:
    """A bound of what a part takes in a block, page slack of each of its arrays included."""
    linear, fixed = element_bytes(part.task)
    return -(-linear * part.n // _MANY) + fixed


def _is_apart(stored: Stored) -> bool:
    """Whether the numbers have memory of their own."""
    return stored.operand != stored.dtype


class _Reading:
    """Puts arrays one behind the other; neighbours in a file stay neighbours."""

    def __init__(self, cursor: int) -> None:
        self.cursor = cursor
        self.extents: list[Extent] = []
        self.assemblies: list[Assembly] = []

    def take(self, path: str, offset: int, n_bytes: int) -> int:
        """The position of an array of a file."""
        last = self.extents[-1] if self.extents else None
        behind = last is not None and self.cursor == last.at + last.n_bytes
        if last and behind and last.path == path and last.offset + last.n_bytes == offset:
            at = self.cursor
            self.extents[-1] = Extent(last.path, last.offset, last.n_bytes + n_bytes, last.at)
        else:
            at = self.cursor = round_up(self.cursor, PAGE) + offset % PAGE
            self.extents.append(Extent(path, offset, n_bytes, at))
        self.cursor += n_bytes
        return at

    def take_side(self, side: Side) -> int:
        """The position of what is read beside a tensor, from a file or from pieces."""
        stored = side.stored
        if not stored.pieces:
            return self.take(stored.path, side.offset, side.n_bytes)
        item = dtypes.n_bytes(stored.dtype, 1)
        at = self.leave(side.n_bytes)
        first, n = (side.offset - stored.offset) // item, side.n_bytes // item
        self.assemblies.append(Assembly(stored, first, n, at))
        return at

    def leave(self, n_bytes: int) -> int:
        """The position of an array that is made."""
        at = round_up(self.cursor, PAGE)
        self.cursor = at + n_bytes
        return at


def arrange(parts: Sequence[Part], layout: Layout | None) -> Arrangement:
    """Put parts into one block; neighbours in a file stay neighbours, so that one request reads them.

    Positions equal file offsets modulo the page, which direct reads and writes need.

    Args:
        layout: of the output; None where nothing is written.
    """
    # Results come first: blocks that follow each other begin in the same places, where memory is warm.
    spans, outputs, narrowings, end = _results(parts, layout) if layout else ((), (), (), 0)
    reading = _Reading(end)
    inputs: list[list[int]] = [[] for _ in parts]
    for k in range(max(len(part.task.inputs) for part in parts)):
        for part, found in zip(parts, inputs, strict=True):
            if k < len(part.task.inputs):
                found.append(_place(part, part.task.inputs[k], reading))
    reading.assemblies += _assemblies(parts, inputs)
    widenings = _widenings(parts, inputs, reading)
    return Arrangement(
        extents=tuple(reading.extents),
        windows=tuple(_windows(parts, inputs)),
        spans=spans,
        inputs=tuple(map(tuple, inputs)),
        outputs=outputs,
        n_bytes=round_up(reading.cursor, PAGE),
        widenings=widenings,
        narrowings=narrowings,
        assemblies=tuple(reading.assemblies),
    )


def _place(part: Part, stored: Stored, reading: _Reading) -> int:
    """Where an input of a part goes: read as it is, or gathered row by row."""
    n_bytes = dtypes.n_bytes(stored.dtype, part.n)
    if part.task.gather is not None or stored.pieces:
        return reading.leave(n_bytes)
    return reading.take(stored.path, stored.offset + dtypes.n_bytes(stored.dtype, part.start), n_bytes)


def _widenings(parts: Sequence[Part], inputs: list[list[int]], reading: _Reading) -> tuple[Widening, ...]:
    """Places for what is read beside, and for numbers; `inputs` points to the latter."""
    found = []
    for index, part in enumerate(parts):
        for k, stored in enumerate(part.task.inputs):
            if stored.blocks is None and stored.update is None:
                continue
            beside = tuple((reading.take_side(side), side.first) for side in sides(part, stored))
            found.append(Widening(index, k, inputs[index][k], beside, inputs[index][k]))
    placed = []
    for one in found:  # numbers lie behind everything that is read
        part = parts[one.part]
        stored = part.task.inputs[one.input]
        if _is_apart(stored):
            one = replace(one, at=reading.leave(dtypes.n_bytes(stored.operand, part.n)))
            inputs[one.part][one.input] = one.at
        placed.append(one)
    return tuple(placed)


def arrange_outputs(parts: Sequence[Part], layout: Layout) -> Arrangement:
    """A block for results alone."""
    spans, outputs, narrowings, end = _results(parts, layout)
    return Arrangement((), (), spans, (), outputs, round_up(end, PAGE), narrowings=narrowings)


def _assemblies(parts: Sequence[Part], inputs: Sequence[Sequence[int]]) -> Iterator[Assembly]:
    for part, found in zip(parts, inputs, strict=True):
        if part.task.gather is None and part.n:
            for stored, at in zip(part.task.inputs, found, strict=True):
                if stored.pieces:
                    yield Assembly(stored, part.start, part.n, at)


def _windows(parts: Sequence[Part], inputs: Sequence[Sequence[int]]) -> Iterator[Window]:
    for part, found in zip(parts, inputs, strict=True):
        gather = part.task.gather
        if gather is not None and part.n:
            yield Window(gather, part.start, part.n, tuple(found[k] for k in gather.inputs))


def _results(
    parts: Sequence[Part], layout: Layout
) -> tuple[tuple[Span, ...], tuple[int, ...], tuple[Narrowing, ...], int]:
    """Spans, positions, codes to make and the end of results, from the beginning of a block."""
    cursor = 0
    spans: list[Span] = []
    places: list[list[int]] = []
    for part in parts:
        found = []
        for name, begin, n_bytes in written(part):
            place = layout.places[name]
            offset = place.offset + begin
            previous = spans[-1] if spans else None
            if previous and previous.shard == place.shard and previous.offset + previous.n_bytes == offset:
                spans[-1] = Span(place.shard, previous.offset, previous.n_bytes + n_bytes, previous.at)
            else:
                cursor = round_up(cursor, PAGE) + offset % PAGE
                spans.append(Span(place.shard, offset, n_bytes, cursor))
            found.append(cursor)
            cursor += n_bytes
        places.append(found)
    outputs: list[int] = []
    narrowings: list[Narrowing] = []
    for index, (part, found) in enumerate(zip(parts, places, strict=True)):
        at = found[0]
        if part.task.encoding is not None:
            at = cursor = round_up(cursor, PAGE)
            cursor += part.result_bytes
            narrowings.append(Narrowing(index, at, found[0], found[1] if len(found) > 1 else -1))
        outputs.append(at)
    return tuple(spans), tuple(outputs), tuple(narrowings), cursor
