"""Where the arrays of a work table lie in a device's ring, and which bytes go there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tvfast.engine.device import ALIGNMENT, Transfer
from tvfast.engine.memory import round_up
from tvfast.program import DType, Entry, View, WorkTable

ITEM_BYTES = {DType.F32: 4, DType.BF16: 2, DType.F16: 2}

KERNEL_ALIGNMENT = 16
"""Kernels take 16 bytes at a time where every array begins at a multiple of it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Positions of arrays in the ring.

    Attributes:
        inputs: [entry][of `inputs_of`].
        outputs: [entry].
        end: the first byte behind them.
    """

    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    end: int

    def of(self, entries: Sequence[int]) -> Placement:
        """Those of some entries."""
        return Placement(
            tuple(self.inputs[e] for e in entries), tuple(self.outputs[e] for e in entries), self.end
        )


def inputs_of(entry: Entry) -> tuple[View, ...]:
    """The arrays that are read, the base first; one that is an operand twice is there once."""
    views = (*(() if entry.base is None else (entry.base,)), *entry.models, *entry.scores)
    return tuple({id(view): view for view in views}.values())


def with_inputs(entry: Entry, inputs: Sequence[View]) -> Entry:
    """The entry over other arrays in place of its `inputs_of`."""
    there = {id(view): new for view, new in zip(inputs_of(entry), inputs, strict=True)}
    return replace(
        entry,
        base=None if entry.base is None else there[id(entry.base)],
        models=tuple(there[id(view)] for view in entry.models),
        scores=tuple(there[id(view)] for view in entry.scores),
    )


def n_bytes(view: View) -> int:
    """Of the array itself."""
    return view.n_elements * ITEM_BYTES[view.dtype]


def bytes_of_element(entry: Entry) -> int:
    """Of one element of every input and of the result."""
    views = (*inputs_of(entry), *([] if entry.out is None else [entry.out]))
    return sum(ITEM_BYTES[view.dtype] for view in views)


def place(entries: Sequence[Entry], at: int, outputs: Sequence[DType]) -> Placement:
    """Put arrays one behind the other, in the order in which a host block holds them.

    So neighbours stay neighbours wherever sizes are multiples of 16 bytes, and travel together.

    Args:
        at: where the first begins; a multiple of `ALIGNMENT`.
        outputs: storage type of each result, or nothing for none.
    """
    cursor = at
    inputs: list[list[int]] = [[] for _ in entries]
    for k in range(max((len(inputs_of(entry)) for entry in entries), default=0)):
        cursor = round_up(cursor, ALIGNMENT)
        for entry, found in zip(entries, inputs, strict=True):
            views = inputs_of(entry)
            if k < len(views):
                cursor = round_up(cursor, KERNEL_ALIGNMENT)
                found.append(cursor)
                cursor += n_bytes(views[k])
    cursor = round_up(cursor, ALIGNMENT)
    results: list[int] = []
    for entry, dtype in zip(entries, outputs, strict=bool(outputs)):
        cursor = round_up(cursor, KERNEL_ALIGNMENT)
        results.append(cursor)
        cursor += entry.n_elements * ITEM_BYTES[dtype]
    return Placement(tuple(map(tuple, inputs)), tuple(results), round_up(cursor, ALIGNMENT))


def output_dtypes(entries: Sequence[Entry]) -> list[DType]:
    """Storage types of results that have memory."""
    return [entry.out.dtype for entry in entries if entry.out is not None]


def placed_table(
    entries: Sequence[Entry],
    n_models: int,
    placement: Placement,
    outputs: Sequence[DType],
    view: Callable[[int, int, DType], View],
) -> WorkTable:
    """The same entries over arrays in the ring."""
    found = []
    for index, entry in enumerate(entries):
        places = zip(placement.inputs[index], inputs_of(entry), strict=True)
        there = with_inputs(entry, [view(at, v.n_elements, v.dtype) for at, v in places])
        out = view(placement.outputs[index], entry.n_elements, outputs[index]) if outputs else None
        found.append(replace(there, out=out))
    return WorkTable(found, n_models)


def transfers(pairs: Iterable[tuple[View, int]]) -> list[Transfer]:
    """Host arrays and their places as few transfers: neighbours on both sides travel together."""
    found: list[Transfer] = []
    for view, at in sorted(pairs, key=lambda pair: pair[0].address):
        size = n_bytes(view)
        last = found[-1] if found else None
        if last and (last.address + last.n_bytes, last.at + last.n_bytes) == (view.address, at):
            found[-1] = Transfer(last.address, last.at, last.n_bytes + size)
        elif size:
            found.append(Transfer(view.address, at, size))
    return found


def inputs_at(entries: Sequence[Entry], places: Sequence[Sequence[int]]) -> Iterator[tuple[View, int]]:
    """Every input with its place."""
    for entry, ats in zip(entries, places, strict=True):
        yield from zip(inputs_of(entry), ats, strict=True)


def outputs_at(entries: Sequence[Entry], places: Sequence[int]) -> Iterator[tuple[View, int]]:
    """Every result with its place."""
    for entry, at in zip(entries, places, strict=True):
        if entry.out is not None:
            yield entry.out, at


def within(at: int, start: int, dtype: DType) -> int:
    """The place of an array's element."""
    return at + start * ITEM_BYTES[dtype]


def piece(entry: Entry, start: int, n: int) -> Entry:
    """Elements [start, start + n) of an entry."""

    def cut(view: View) -> View:
        return View(view.address + start * ITEM_BYTES[view.dtype], n, view.dtype)

    return replace(
        with_inputs(entry, list(map(cut, inputs_of(entry)))),
        out=None if entry.out is None else cut(entry.out),
        offset=entry.offset + start,
    )
