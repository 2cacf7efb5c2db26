"""What a merge did to each tensor, seen on a sample of it while it is in memory anyway."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tvfast import dtypes
from tvfast.engine.arrange import Part
from tvfast.engine.source import Loaded
from tvfast.engine.streamed import Combine
from tvfast.engine.tasks import Task
from tvfast.ops.raw import Wants, host_backend
from tvfast.program import (
    DType,
    Entry,
    Keep,
    ModelScalars,
    Program,
    TensorScalars,
    View,
    WorkTable,
)

RUN = 2**13
"""Elements that are looked at together; tensors that are not larger are seen as a whole."""

SHARE = 512
"""Of a larger tensor, one such run in so many, at equal distances."""

_WORD = 64  # elements of a mask in a word, at which runs begin


@dataclass(slots=True)
class Observation:
    """What was seen of one tensor; K models. Sums are lists of addends, so that their order does not matter.

    Attributes:
        n_elements: of the tensor.
        n_seen: elements whose result was compared with base and models.
        base, drift: ‖θ₀‖² and ‖θ - θ₀‖² of these.
        models, dots: [K] ‖τ_k‖² and ⟨τ, τ_k⟩.
        n_moved: [K] entries of τ_k that are not 0.
        n_reversed: [K] those of them whose sign the result has the other way.
        n_asked, n_kept: [K] elements that the keep stage was asked about, and how many it kept.
        seconds: of this tensor by phase; tensors that were handled together share by their bytes.
    """

    n_models: int
    n_elements: int
    n_seen: int = 0
    base: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    models: list[list[float]] = field(default_factory=list)
    dots: list[list[float]] = field(default_factory=list)
    n_moved: list[int] = field(default_factory=list)
    n_reversed: list[int] = field(default_factory=list)
    n_asked: list[int] = field(default_factory=list)
    n_kept: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = [[] for _ in range(self.n_models)]
        self.dots = [[] for _ in range(self.n_models)]
        self.n_moved, self.n_reversed = [0] * self.n_models, [0] * self.n_models
        self.n_asked, self.n_kept = [0] * self.n_models, [0] * self.n_models


class Observer:
    """Collects observations of a run; methods are called from its threads.

    Notes:
        A tensor of more than `RUN` elements is seen at one run in `SHARE`, so looking takes a few hundredths
        of the merge's own arithmetic, and no reading. Shares of a tensor of 16 M elements are off by 0.003.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Observation] = {}
        self._tasks: dict[str, list[Observation]] = {}  # by key: tied tensors share one
        self._lock = threading.Lock()

    def kept(self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars]) -> None:
        """What the keep stage of a program does to entries that are about to be combined."""
        pieces = [
            (row, piece)
            for row, entry in enumerate(table.entries)
            for piece in _runs(entry, _step(program, entry))
        ]
        if not pieces or program.keep is Keep.ALL:
            return
        sampled = WorkTable([piece for _, piece in pieces], table.n_models)
        numbers = [scalars[row] for row, _ in pieces]
        moments = host_backend().measure(sampled, program, numbers, Wants.COUNTS, 1)
        with self._lock:
            for (_, piece), counts in zip(pieces, [one.n_kept for one in moments], strict=True):
                for seen in self._of_key(piece.name, table.n_models):
                    seen.n_asked = [n + piece.n_elements for n in seen.n_asked]
                    seen.n_kept = [a + b for a, b in zip(seen.n_kept, counts, strict=True)]

    def before(self, combine: Combine) -> Combine:
        """`combine` that shows its entries to `kept` first."""

        def watched(
            table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int
        ) -> None:
            self.kept(table, program, scalars)
            combine(table, program, scalars, n_threads)

        return watched

    def results(self, loaded: Loaded) -> None:
        """Results beside their base and models, before they are stored as codes."""
        found = loaded.arrangement
        if not found.inputs or not found.outputs:
            return
        seen = [
            (part.task, piece)
            for index, part in enumerate(loaded.parts)
            if part.n and part.task.is_merged and part.task.base is not None
            for piece in _runs(_triple(part, loaded, index), 1)
        ]
        if not seen:
            return
        pairs = [
            Entry(name="", models=(piece.out, model), base=piece.base)
            for _, piece in seen
            if piece.out is not None
            for model in piece.models
        ]
        bases = [Entry(name="", models=(piece.base,)) for _, piece in seen if piece.base is not None]
        backend = host_backend()
        moments = iter(
            backend.measure(
                WorkTable(pairs, 2),
                Program(),
                _neutral(len(pairs), 2),
                Wants.GRAM | Wants.VOTES | Wants.COUNTS,
                1,
            )
        )
        squares = backend.measure(WorkTable(bases, 1), Program(), _neutral(len(bases), 1), Wants.SQUARES, 1)
        with self._lock:
            for (task, piece), square in zip(seen, squares, strict=True):
                one = self._of(task)
                one.n_seen += piece.n_elements
                one.base.append(square.gram[0][0])
                for k in range(len(piece.models)):
                    pair = next(moments)
                    if k == 0:
                        one.drift.append(pair.gram[0][0])
                    one.models[k].append(pair.gram[1][1])
                    one.dots[k].append(pair.gram[0][1])
                    one.n_moved[k] += pair.n_nonzero[1]
                    one.n_reversed[k] += pair.n_conflict

    def spent(self, parts: Sequence[Part], seconds: Mapping[str, float]) -> None:
        """Time that parts took together, by phase."""
        total = sum(part.output_bytes for part in parts) or 1
        with self._lock:
            for part in parts:
                one = self._of(part.task)
                for phase, spent in seconds.items():
                    one.seconds[phase] = one.seconds.get(phase, 0.0) + spent * part.output_bytes / total

    def _of(self, task: Task) -> Observation:
        if task.name not in self.tensors:
            self.tensors[task.name] = Observation(len(task.models), task.n_elements)
            self._tasks.setdefault(task.key, []).append(self.tensors[task.name])
        return self.tensors[task.name]

    def know(self, tasks: Sequence[Task]) -> None:
        """Tasks whose entries `kept` will be told of by their keys."""
        with self._lock:
            for task in tasks:
                self._of(task)

    def _of_key(self, key: str, n_models: int) -> list[Observation]:
        return [one for one in self._tasks.get(key, []) if one.n_models == n_models]


class Clock:
    """Seconds of the phases of one unit, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """A phase is over."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


class Blind:
    """An observer that sees nothing."""

    def know(self, tasks: Sequence[Task]) -> None: ...
    def kept(self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars]) -> None: ...
    def results(self, loaded: Loaded) -> None: ...
    def spent(self, parts: Sequence[Part], seconds: Mapping[str, float]) -> None: ...

    def before(self, combine: Combine) -> Combine:
        return combine


def summary(seen: Sequence[Observation], n_models: int) -> dict[str, Any]:
    """Observations of some tensors, as if they were one, as plain data; what was not seen is None.

    What was seen of a tensor stands for all of it.
    """
    looked = [(one, one.n_elements / one.n_seen) for one in seen if one.n_seen]
    base = _norm([weight * x for one, weight in looked for x in one.base])
    drift = _norm([weight * x for one, weight in looked for x in one.drift])
    models = [_norm([weight * x for one, weight in looked for x in one.models[k]]) for k in range(n_models)]
    dots = [_sum([weight * x for one, weight in looked for x in one.dots[k]]) for k in range(n_models)]
    moved = [sum(weight * one.n_moved[k] for one, weight in looked) for k in range(n_models)]
    against = [sum(weight * one.n_reversed[k] for one, weight in looked) for k in range(n_models)]
    asked = [sum(one.n_elements for one in seen if one.n_asked[k]) for k in range(n_models)]
    kept = [
        sum(one.n_elements / one.n_asked[k] * one.n_kept[k] for one in seen if one.n_asked[k])
        for k in range(n_models)
    ]
    return {
        "n_seen": sum(one.n_seen for one in seen),
        "drift": _ratio(drift, base),
        "kept": [_ratio(kept[k], asked[k]) for k in range(n_models)],
        "sign_agreement": [_ratio(moved[k] - against[k], moved[k]) for k in range(n_models)],
        "cosines": [_ratio(dots[k], drift * models[k]) for k in range(n_models)],
        "seconds": {
            phase: math.fsum(one.seconds.get(phase, 0.0) for one in seen)
            for phase in dict.fromkeys(phase for one in seen for phase in one.seconds)
        },
    }


def _ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to compare with, or no number."""
    return part / whole if whole > 0 and math.isfinite(part) and math.isfinite(whole) else None


def _sum(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _norm(squares: Sequence[float]) -> float:
    return math.sqrt(_sum(squares))


def _neutral(n_entries: int, n_models: int) -> list[TensorScalars]:
    return [TensorScalars(models=[ModelScalars() for _ in range(n_models)]) for _ in range(n_entries)]


def _triple(part: Part, loaded: Loaded, index: int) -> Entry:
    """Base, models and result of a part, as they are in the block."""
    task, at = part.task, loaded.block.address
    views = [
        View(at + position, part.n, DType[stored.operand])
        for stored, position in zip(task.inputs, loaded.arrangement.inputs[index], strict=True)
    ]
    out = View(at + loaded.arrangement.outputs[index], part.n, DType[task.result])
    models = tuple(views[1 : 1 + len(task.models)])
    return Entry(name=task.key, models=models, base=views[0], out=out, offset=part.start)


def _step(program: Program, entry: Entry) -> int:
    """Elements that a run must be whole multiples of."""
    return (entry.row or entry.n_elements) if program.ranks_rows else 1


def _runs(entry: Entry, step: int) -> Iterator[Entry]:
    """Runs in the middle of equal parts of an entry: whole steps, and never none."""
    n = entry.n_elements
    run = -(-RUN // step) * step
    if n <= run:
        if n:
            yield entry
        return
    n_runs = -(-n // (run * SHARE))
    align = step if step > 1 else _WORD
    for k in range(n_runs):
        middle = (2 * k + 1) * n // (2 * n_runs)
        begin = max(0, middle - run // 2) // align * align
        yield _cut(entry, begin, min(run, n - begin))


def _cut(entry: Entry, begin: int, n: int) -> Entry:
    """Elements [begin, begin + n) of an entry."""
    if begin == 0 and n == entry.n_elements:
        return entry

    def cut(view: View) -> View:
        at = view.address + dtypes.n_bytes(view.dtype.name, begin)
        return View(at, n, view.dtype, view.owner)

    return replace(
        entry,
        models=tuple(map(cut, entry.models)),
        base=None if entry.base is None else cut(entry.base),
        out=None if entry.out is None else cut(entry.out),
        scores=tuple(map(cut, entry.scores)),
        masks=tuple(View(mask.address + begin // 8, n, mask.dtype, mask.owner) for mask in entry.masks),
        offset=entry.offset + begin,
    )
