"""Where parts that are in memory together lie in a block, and which bytes of files they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvfast import dtypes
from tvfast.checkpoint.layout import Layout
from tvfast.engine.inputs import Extent
from tvfast.engine.memory import PAGE, round_up
from tvfast.engine.tasks import Task


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, start + n) of one task, whole tensors included."""

    task: Task
    start: int
    n: int

    @property
    def output_bytes(self) -> int:
        return dtypes.n_bytes(self.task.dtype, self.n)

    @property
    def input_bytes(self) -> int:
        return sum(dtypes.n_bytes(stored.dtype, self.n) for stored in self.task.inputs)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of one output shard and where in a block they come from."""

    shard: int
    offset: int
    n_bytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A block's map.

    Attributes:
        extents: what is read into it.
        spans: what is written from it.
        inputs: [part][input] position of the part's bytes.
        outputs: [part] position of the part's result.
        n_bytes: size of the block.
    """

    extents: tuple[Extent, ...]
    spans: tuple[Span, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    n_bytes: int


def block_bytes(part: Part) -> int:
    """A bound of what a part takes in a block, page slack of each of its arrays included."""
    return part.input_bytes + part.output_bytes + 2 * PAGE * (len(part.task.inputs) + 1)


def arrange(parts: Sequence[Part], layout: Layout | None) -> Arrangement:
    """Put parts into one block; neighbours in a file stay neighbours, so that one request reads them.

    Positions equal file offsets modulo the page, which direct reads and writes need.

    Args:
        layout: of the output; None where nothing is written.
    """
    cursor = 0
    extents: list[Extent] = []
    inputs: list[list[int]] = [[] for _ in parts]
    for k in range(max(len(part.task.inputs) for part in parts)):
        for part, found in zip(parts, inputs, strict=True):
            if k >= len(part.task.inputs):
                continue
            stored = part.task.inputs[k]
            offset = stored.offset + dtypes.n_bytes(stored.dtype, part.start)
            n_bytes = dtypes.n_bytes(stored.dtype, part.n)
            last = extents[-1] if extents else None
            if last and last.path == stored.path and last.offset + last.n_bytes == offset:
                found.append(cursor)
                extents[-1] = Extent(last.path, last.offset, last.n_bytes + n_bytes, last.at)
            else:
                cursor = round_up(cursor, PAGE) + offset % PAGE
                found.append(cursor)
                extents.append(Extent(stored.path, offset, n_bytes, cursor))
            cursor += n_bytes
    spans, outputs, end = _results(parts, layout, cursor) if layout else ((), (), cursor)
    return Arrangement(tuple(extents), spans, tuple(map(tuple, inputs)), outputs, round_up(end, PAGE))


def arrange_outputs(parts: Sequence[Part], layout: Layout) -> Arrangement:
    """A block for results alone."""
    spans, outputs, end = _results(parts, layout, 0)
    return Arrangement((), spans, (), outputs, round_up(end, PAGE))


def _results(
    parts: Sequence[Part], layout: Layout, cursor: int
) -> tuple[tuple[Span, ...], tuple[int, ...], int]:
    """Spans, positions and the end of results that are put behind `cursor`."""
    spans: list[Span] = []
    outputs: list[int] = []
    for part in parts:
        place = layout.places[part.task.name]
        offset = place.offset + dtypes.n_bytes(part.task.dtype, part.start)
        n_bytes = part.output_bytes
        previous = spans[-1] if spans else None
        if previous and previous.shard == place.shard and previous.offset + previous.n_bytes == offset:
            spans[-1] = Span(place.shard, previous.offset, previous.n_bytes + n_bytes, previous.at)
        else:
            cursor = round_up(cursor, PAGE) + offset % PAGE
            spans.append(Span(place.shard, offset, n_bytes, cursor))
        outputs.append(cursor)
        cursor += n_bytes
    return tuple(spans), tuple(outputs), cursor
