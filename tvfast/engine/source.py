"""Chunks of tensors that are never in memory at once: read ahead, handed to a backend, written behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tvfast.checkpoint.layout import Layout
from tvfast.engine.arrange import Arrangement, Part, arrange, arrange_outputs, block_bytes
from tvfast.engine.conversions import widen_inputs
from tvfast.engine.cuts import elements_within
from tvfast.engine.inputs import Inputs
from tvfast.engine.memory import Buffer, Slots
from tvfast.engine.sampling import samples
from tvfast.engine.streamed import Chunk
from tvfast.engine.tasks import Task
from tvfast.engine.units import CHUNKS_IN_FLIGHT, Unit
from tvfast.program import DType, Entry, View, WorkTable


@dataclass(frozen=True, slots=True)
class Loaded:
    """Parts whose inputs are in memory, and where their results go."""

    parts: tuple[Part, ...]
    arrangement: Arrangement
    block: Buffer


class StreamSource:
    """The chunks of one streamed unit.

    Args:
        unit: its parts are whole tensors.
        table: their logical entries, in the same order.
        finish: called with every chunk whose results are complete; returns when they are written.
        check: called with every chunk in the first pass that looks, unless somebody vouches before; None: all
            numbers may go through.
        n_threads: of what makes numbers of 8-bit codes and adapters; 0: all cores.

    Attributes:
        result_dtypes: storage type of each entry's result.
    """

    def __init__(
        self,
        unit: Unit,
        table: WorkTable,
        layout: Layout,
        inputs: Inputs,
        slots: Slots,
        finish: Callable[[Loaded], Future[None]],
        check: Callable[[Loaded], None] | None,
        n_threads: int = 0,
    ) -> None:
        self._table = table
        self._layout = layout
        self._inputs = inputs
        self._slots = slots
        self._finish = finish
        self._n_threads = n_threads
        self._check = check
        self._n_inputs = [len(part.task.inputs) for part in unit.parts]
        self._rows = {part.task.name: row for row, part in enumerate(unit.parts)}
        pieces = [piece for part in unit.parts for piece in _pieces(part.task, unit.chunk_bytes)]
        self._chunks = list(_gathered(pieces, unit.chunk_bytes))
        self._samples = list(_gathered(list(samples(unit.parts)), unit.chunk_bytes))
        self.result_dtypes = tuple(DType[part.task.result] for part in unit.parts)

    def chunks(self, *, write: bool, look: bool = True) -> Iterator[Chunk]:
        """Every chunk once, in order; with `write`, results are written when the next is asked for.

        With `look`, chunks are checked before, unless they have been.
        """
        check = self._check if look else None
        if look:
            self._check = None
        writing: deque[Future[None]] = deque()
        for loaded in self._loaded(self._chunks, self._layout if write else None):
            if check is not None:
                check(loaded)
            yield self._resident(loaded)
            self._inputs.check_shown(loaded.arrangement.extents, loaded.block)
            if write:
                writing.append(self._finish(loaded))
            else:
                loaded.block.release()
            while len(writing) > 1:
                writing.popleft().result()
        for future in writing:
            future.result()

    @property
    def unseen(self) -> bool:
        """Whether chunks are still to be checked."""
        return self._check is not None

    def vouch(self) -> None:
        """All operands are finite: where these are all that is read, no chunk is checked any more."""
        operands = map(_n_operands, self._table.entries)
        if all(n >= n_inputs for n, n_inputs in zip(operands, self._n_inputs, strict=True)):
            self._check = None

    def results(self) -> Iterator[list[tuple[int, int, View]]]:
        """Memory for every result, in chunks of (row, first element, elements).

        A chunk is written when the next is asked for.
        """
        writing: deque[Future[None]] = deque()
        for parts in self._chunks:
            loaded = Loaded(parts, arrange_outputs(parts, self._layout), self._slots.acquire())
            places = zip(parts, loaded.arrangement.outputs, strict=True)
            yield [
                (
                    self._rows[part.task.name],
                    part.start,
                    View(loaded.block.address + at, part.n, DType[part.task.result]),
                )
                for part, at in places
            ]
            writing.append(self._finish(loaded))
            while len(writing) > 1:
                writing.popleft().result()
        for future in writing:
            future.result()

    def sample(self) -> Iterator[Chunk]:
        """Pieces from everywhere."""
        for loaded in self._loaded(self._samples, None):
            yield self._resident(loaded)
            self._inputs.check_shown(loaded.arrangement.extents, loaded.block)
            loaded.block.release()

    def _loaded(self, chunks: Sequence[tuple[Part, ...]], layout: Layout | None) -> Iterator[Loaded]:
        """Chunks with their data, two of them being read while one is used."""
        ahead: deque[tuple[Loaded, list[Future[None]]]] = deque()
        waiting = iter(chunks)
        while True:
            while len(ahead) < CHUNKS_IN_FLIGHT - 1:
                parts = next(waiting, None)
                if parts is None:
                    break
                arrangement = arrange(parts, layout)
                block = self._slots.acquire()
                loaded = Loaded(parts, arrangement, block)
                ahead.append((loaded, load(self._inputs, loaded)))
            if not ahead:
                return
            loaded, reads = ahead.popleft()
            for read in reads:
                read.result()
            widen_inputs(loaded.parts, loaded.arrangement, loaded.block.address, self._n_threads)
            yield loaded

    def _resident(self, loaded: Loaded) -> Chunk:
        rows = tuple(self._rows[part.task.name] for part in loaded.parts)
        entries = [
            entry_of(part, loaded, index, self._table.entries[row])
            for index, (part, row) in enumerate(zip(loaded.parts, rows, strict=True))
        ]
        return Chunk(WorkTable(entries, self._table.n_models), rows)


def load(inputs: Inputs, loaded: Loaded) -> list[Future[None]]:
    """Start to fill a block with the inputs of its parts; they are there when every future is done."""
    arrangement = loaded.arrangement
    return [
        *inputs.read(arrangement.extents, loaded.block),
        *inputs.gather(arrangement.windows, loaded.block),
        *inputs.assemble(arrangement.assemblies, loaded.block),
    ]


def views_of(part: Part, loaded: Loaded, index: int) -> list[View]:
    """The inputs of a part in memory, in the order of its task."""
    at = loaded.block.address
    return [
        View(at + position, part.n, DType[stored.operand])
        for stored, position in zip(part.task.inputs, loaded.arrangement.inputs[index], strict=True)
    ]


def entry_of(part: Part, loaded: Loaded, index: int, logical: Entry | None = None) -> Entry:
    """The row of a work table for a part in memory; positions come from its logical entry."""
    task, at = part.task, loaded.block.address
    assert task.method is not None
    found = views_of(part, loaded, index)
    first = 0 if task.base is None else 1
    base, last = found[0], first + len(task.models)
    models, scores = tuple(found[first:last]), tuple(found[last:])
    operand, operands = task.method.operands(base, models)
    outputs = loaded.arrangement.outputs
    return Entry(
        name=task.key,
        models=operands,
        base=operand,
        out=View(at + outputs[index], part.n, DType[task.result]) if outputs else None,
        scores=task.method.score_operands(scores),
        score_maps=logical.score_maps if logical else (),
        score_summaries=task.method.score_operands(task.summaries),
        row=task.method.row_elements(task.shape),
        offset=part.start,
        group=logical.group if logical else 0,
        group_offset=logical.group_offset if logical else 0,
    )


def _n_operands(entry: Entry) -> int:
    return len(entry.models) + (entry.base is not None)


def _pieces(task: Task, chunk_bytes: int) -> Iterator[Part]:
    if block_bytes(Part(task, 0, task.n_elements)) <= chunk_bytes:
        yield Part(task, 0, task.n_elements)
        return
    n = elements_within(task, chunk_bytes)
    for start in range(0, task.n_elements, n):
        yield Part(task, start, min(n, task.n_elements - start))


def _gathered(runs: Sequence[Part], chunk_bytes: int) -> Iterator[tuple[Part, ...]]:
    """Neighbours together, up to the size of a chunk."""
    chunk: list[Part] = []
    used = 0
    for run in runs:
        size = block_bytes(run)
        if chunk and used + size > chunk_bytes:
            yield tuple(chunk)
            chunk, used = [], 0
        chunk.append(run)
        used += size
    if chunk:
        yield tuple(chunk)
