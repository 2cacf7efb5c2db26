"""Task vectors of checkpoints measured in bounded memory: neighbours together, large tensors in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvfast.checkpoint.reading import Checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.engine.arrange import Part, block_bytes
from tvfast.engine.cuts import elements_within, least_piece
from tvfast.engine.sampling import samples
from tvfast.engine.tasks import Task
from tvfast.inspection.figures import TIE_DENSITY, Histograms, TaskVectors, by_layer, by_module, together
from tvfast.inspection.names import layer_of, module_of
from tvfast.inspection.reading import Loaded, Reader
from tvfast.ops.raw import Wants, host_backend
from tvfast.program import (
    Keep,
    ModelScalars,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    WorkTable,
)

CHUNK_BYTES = 64 * 2**20
"""Tensors and their counterparts that are measured together, and the pieces of larger ones."""

_WANTS = Wants.GRAM | Wants.VOTES | Wants.COUNTS


@dataclass(slots=True)
class Measured:
    """What was found: figures by tensor in the order of the names, and histograms by layer."""

    tensors: dict[str, TaskVectors]
    histograms: Histograms
    described: dict[str, dict[str, Any]] = field(default_factory=dict)

    def layers(self) -> dict[str, TaskVectors]:
        return by_layer(self.tensors)

    def total(self) -> TaskVectors:
        """Everything as one vector; there must be something."""
        return together(list(self.tensors.values()))

    def as_json(self) -> dict[str, Any]:
        """Plain data, with layers, kinds of modules and everything together."""
        return {
            "tensors": {name: self.described[name] | row.as_json() for name, row in self.tensors.items()},
            "layers": {name: row.as_json() for name, row in self.layers().items()},
            "modules": {name: row.as_json() for name, row in by_module(self.tensors).items()},
            "total": self.total().as_json() if self.tensors else None,
            "histograms": self.histograms.as_json(),
        }


def task_vectors(
    checkpoints: Sequence[Checkpoint],
    names: Iterable[str],
    *,
    read: Callable[[int], None] = lambda n_bytes: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Measured:
    """Measure tensors; the first checkpoint is the base.

    Args:
        checkpoints: with the factors of their codes.
        names: that all checkpoints have, in one shape and as numbers.
        read: told how many bytes were read; called from several threads.
        chunk_bytes: of inputs in memory at once, three times over.

    Raises:
        CheckpointError: a file ends early, because it changed after its header was read.

    Notes:
        The same figures for any `chunk_bytes`. A tensor that is larger is read once for everything but
        the tie mass, with a sample before and in rare cases a second time.
    """
    tasks = [_task([one.tensors[name] for one in checkpoints]) for name in names]
    n_models = len(checkpoints) - 1
    found: dict[str, TaskVectors] = {}
    measured = Measured({}, Histograms(n_models))
    chunk_bytes = max([chunk_bytes, *(block_bytes(least_piece(task)) for task in tasks)])
    with Reader(chunk_bytes, read) as reader:
        measure = _Measure(n_models, reader, found, measured.histograms)
        whole = [Part(task, 0, task.n_elements) for task in tasks]
        small = [part for part in whole if block_bytes(part) <= chunk_bytes]
        for loaded in reader.loaded(small):
            measure.together(loaded)
        for part in whole:
            if block_bytes(part) > chunk_bytes:
                measure.in_chunks(part)
    measured.histograms.order([task.name for task in tasks])
    for task in tasks:
        measured.tensors[task.name] = found[task.name]
        measured.described[task.name] = {
            "layer": layer_of(task.name),
            "module": module_of(task.name),
            "shape": list(task.shape),
            "dtype": task.dtype,
        }
    return measured


@dataclass(slots=True)
class _Measure:
    """Puts figures of tensors into `found` and `histograms`."""

    n_models: int
    reader: Reader
    found: dict[str, TaskVectors]
    histograms: Histograms

    def together(self, loaded: Sequence[Loaded]) -> None:
        """Whole tensors that are in memory."""
        backend = host_backend()
        some = [one for one in loaded if one.part.n]
        for one in loaded:
            if not one.part.n:
                self._put(one.part.task, _nothing(self.n_models), [0.0], [], [])
        if not some:
            return
        entries = [one.entry for one in some]
        for group, entry in enumerate(entries):
            entry.group = group
        table = WorkTable(entries, self.n_models)
        base = WorkTable([one.base for one in some], 1)
        moments = backend.measure(table, Program(), _neutral(len(some), self.n_models), _WANTS)
        squares = backend.measure(base, Program(), _neutral(len(some), 1), Wants.SQUARES)
        octaves = backend.count_octaves(table)
        asked = [query for group, one in enumerate(some) for query in self._queries(group, one.part.n)]
        ties = backend.thresholds(table, Keep.BAND, asked)
        for at, one in enumerate(some):
            own = ties[at * self.n_models : (at + 1) * self.n_models]
            self._put(one.part.task, moments[at], squares[at].gram[0], own, octaves[at])

    def in_chunks(self, whole: Part) -> None:
        """A tensor that is never in memory at once."""
        backend, task = host_backend(), whole.task
        selection = backend.select(Keep.BAND, self._queries(0, whole.n), [whole.n])
        for loaded in self.reader.loaded(list(samples([whole]))):
            selection.sample(WorkTable([one.entry for one in loaded], self.n_models))
        sums = backend.accumulate(1, self.n_models)
        squares = backend.accumulate(1, 1)
        octaves: list[list[int]] = []
        ties: list[Threshold] | None = None
        n = elements_within(task, self.reader.chunk_bytes)
        pieces = [Part(task, start, min(n, whole.n - start)) for start in range(0, whole.n, n)]
        first = True
        while ties is None:
            for loaded in self.reader.loaded(pieces):
                table = WorkTable([one.entry for one in loaded], self.n_models)
                selection.count(table)
                if not first:
                    continue
                rows, base = [0] * len(loaded), WorkTable([one.base for one in loaded], 1)
                sums.measure(table, rows, Program(), _neutral(len(rows), self.n_models), _WANTS)
                squares.measure(base, rows, Program(), _neutral(len(rows), 1), Wants.SQUARES)
                for counts in backend.count_octaves(table):
                    octaves = _sums(octaves, counts) if octaves else counts
            first = False
            ties = selection.finish()
        self._put(task, sums.finish()[0], squares.finish()[0].gram[0], ties, octaves)

    def _queries(self, group: int, n: int) -> list[RankQuery]:
        rank = max(1, int(TIE_DENSITY * n))
        return [RankQuery(group, model, rank) for model in range(self.n_models)]

    def _put(
        self,
        task: Task,
        moments: Moments,
        squares: Sequence[float],
        ties: Sequence[Threshold],
        octaves: Sequence[Sequence[int]],
    ) -> None:
        n = task.n_elements
        row = TaskVectors(
            gram=moments.gram,
            n_zero=[n - nonzero for nonzero in moments.n_nonzero],
            n_tied=[one.n_equal for one in ties] or [0] * self.n_models,
            n_conflict=moments.n_conflict,
            n_elements=n,
            base_square=squares[0],
        )
        self.found[task.name] = row
        if octaves:
            self.histograms.add(task.name, octaves, row.n_zero)


def _task(stored: Sequence[Stored]) -> Task:
    base, *models = stored
    return Task(base.name, base.name, base.dtype, base.shape, None, base, tuple(models))


def _neutral(n_entries: int, n_models: int) -> list[TensorScalars]:
    return [TensorScalars(models=[ModelScalars() for _ in range(n_models)]) for _ in range(n_entries)]


def _sums(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def _nothing(n_models: int) -> Moments:
    zeros = [0.0] * n_models
    return Moments(
        l1_before=zeros,
        l1=zeros,
        gram=[[0.0] * n_models for _ in range(n_models)],
        n_kept=[0] * n_models,
        n_nonzero=[0] * n_models,
        n_nonfinite=[0] * n_models,
    )
