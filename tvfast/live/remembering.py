"""A backend that remembers the answers that no coefficient changes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from tvfast.ops.raw import Backend, Wants
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


@dataclass(slots=True)
class RememberingBackend:
    """`Backend` of one table whose tensors do not change: a question that was asked before reads nothing.

    Votes depend on weights and are counted anew; other sums depend on what the keep stage reads.
    """

    backend: Backend
    name: str = field(init=False)
    _answers: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.backend.name

    def why_not(self, table: WorkTable) -> str | None:
        return self.backend.why_not(table)

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        key = ("thresholds", keep, tuple(queries))
        if key not in self._answers:
            self._answers[key] = self.backend.thresholds(table, keep, queries, n_threads)
        answer: list[Threshold] = self._answers[key]
        return answer

    def nth_equal(
        self, table: WorkTable, keep: Keep, queries: Sequence[tuple[int, int, float, int]], n_threads: int = 0
    ) -> list[int]:
        key = ("nth_equal", keep, tuple(queries))
        if key not in self._answers:
            self._answers[key] = self.backend.nth_equal(table, keep, queries, n_threads)
        answer: list[int] = self._answers[key]
        return answer

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        if wants & (Wants.VOTES | Wants.DOTS):
            return self.backend.measure(table, program, scalars, wants, n_threads)
        kept_by = tuple(_keep_numbers(model) for tensor in scalars for model in tensor.models)
        key = ("measure", program, wants, kept_by)
        if key not in self._answers:
            self._answers[key] = self.backend.measure(table, program, scalars, wants, n_threads)
        answer: list[Moments] = self._answers[key]
        return answer

    def row_masks(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int = 0
    ) -> None:
        self.backend.row_masks(table, program, scalars, n_threads)

    def combine(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int = 0
    ) -> None:
        self.backend.combine(table, program, scalars, n_threads)


def _keep_numbers(model: ModelScalars) -> tuple[Any, ...]:
    """What the keep stage reads: everything but weight and gain."""
    return astuple(replace(model, weight=1.0, gain=1.0))
