"""How often a method reads its inputs: found by asking the method, not by a list of methods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tvfast.engine.tasks import Task
from tvfast.methods.base import ProgramMethod
from tvfast.methods.statistics import TableStatistics
from tvfast.ops.raw import Wants
from tvfast.program import (
    DType,
    Entry,
    Keep,
    Moments,
    Program,
    RankQuery,
    ScoreSummary,
    TensorScalars,
    Threshold,
    Tie,
    View,
    WorkTable,
    ZeroSign,
)


def logical_table(tasks: Sequence[Task]) -> WorkTable:
    """The table of tasks whose data are elsewhere: true sizes, no addresses, one group in order of name."""
    position = 0
    entries = {}
    for task in sorted(tasks, key=lambda t: t.key):
        assert task.method is not None
        models = tuple(View(0, task.n_elements, DType[stored.operand]) for stored in task.models)
        base = View(0, task.n_elements, DType[task.base.operand]) if task.base else models[0]
        operand, operands = task.method.operands(base, models)
        entries[task.name] = Entry(
            name=task.key,
            models=operands,
            base=operand,
            scores=task.method.score_operands(
                tuple(View(0, task.n_elements, DType[stored.operand]) for stored in task.scores)
            ),
            score_summaries=task.method.score_operands(task.summaries),
            row=task.method.row_elements(task.shape),
            group_offset=position,
        )
        position += task.n_elements
    ordered = [entries[task.name] for task in tasks]
    return WorkTable(ordered, len(ordered[0].models))


def count_passes(tasks: Sequence[Task]) -> int:
    """Passes over the inputs of tasks with one method, the writing one included."""
    return _count(tasks)[0]


def count_samples(tasks: Sequence[Task]) -> int:
    """How often the inputs of tasks with one method are sampled before a pass."""
    return _count(tasks)[1]


def _count(tasks: Sequence[Task]) -> tuple[int, int]:
    first = tasks[0]
    if first.method is None:
        return 1, 0
    short = all(stored.operand != "F32" for task in tasks for stored in task.inputs)
    n = sum(task.n_elements for task in tasks)  # ranks of few elements need no pass, those of many do
    return _asked(first.method, len(first.models), n, first.shape, short)


@lru_cache(maxsize=4096)
def _asked(
    method: ProgramMethod, n_models: int, n: int, shape: tuple[int, ...], short: bool
) -> tuple[int, int]:
    view = View(0, n, DType.BF16)
    operand, operands = method.operands(view, (view,) * n_models)
    entry = Entry(name="", models=operands, base=operand, row=method.row_elements(shape))
    if method.score_kind is not None:
        known = ScoreSummary(n_elements=n, least=0.0, most=1.0, l1=1.0, squares=1.0, model_norm=1.0)
        entry.scores, entry.score_summaries = (view,) * len(operands), (known,) * len(operands)
    counter = _Counter(method.program(), short)
    method.resolve(TableStatistics(counter, WorkTable([entry], len(operands)), None))
    return counter.n_passes + 1, counter.n_samples


class _Counter:
    """A backend that answers with plausible numbers and counts the passes that real ones would take."""

    name = "count"

    def __init__(self, program: Program, short: bool) -> None:
        self.n_passes = 0
        self.n_samples = 0
        # StreamedBackend counts votes together with thresholds, if a sample can guess these to the bit: where
        # 16-bit storage makes ties heavy.
        self._foreseen = (
            short
            and program.keep is Keep.BAND
            and program.tie is Tie.GE
            and program.zero_sign is ZeroSign.MAJORITY
        )

    def why_not(self, table: WorkTable) -> str | None:
        return None

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        self.n_passes += 1
        self.n_samples += 1
        return [Threshold(1.0, max(0, query.k - 2), 3) for query in queries]

    def nth_equal(
        self, table: WorkTable, keep: Keep, queries: Sequence[tuple[int, int, float, int]], n_threads: int = 0
    ) -> list[int]:
        self.n_passes += 2
        return [0 for _ in queries]

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        if not (wants is Wants.VOTES and self._foreseen and self.n_passes):
            self.n_passes += 1
        k = table.n_models
        moments = Moments(
            l1_before=[1.0] * k,
            l1=[1.0] * k,
            gram=[[float(i == j) for j in range(k)] for i in range(k)],
            n_kept=[1] * k,
            n_nonzero=[1] * k,
            n_nonfinite=[0] * k,
            n_alone=[1] * k,
        )
        return [moments for _ in table.entries]

    def row_masks(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int = 0
    ) -> None:
        raise NotImplementedError("planes are never asked for without memory for them")

    def combine(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int = 0
    ) -> None:
        raise NotImplementedError("resolving a method writes nothing")
