"""Weighted average of the models themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvfast.errors import ArgumentError
from tvfast.methods.base import ProgramMethod, parameter, register_method
from tvfast.methods.scalars import float32
from tvfast.methods.statistics import TableStatistics
from tvfast.program import Divisor, Program, Reduce, TensorScalars


@register_method(
    "linear", source="Wortsman et al. 2022, arXiv:2203.05482; mergekit 0.1.5 `linear`", needs_base=False
)
@dataclass(frozen=True, kw_only=True)
class Linear(ProgramMethod):
    """θ = λ · Σ_k w_k θ_k / Σ_k w_k; the base is written, not read."""

    plain_weights = False  # their sum is a number of its own

    normalize: bool = parameter(True, "divide by the sum of the weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("normalize")

    def check_models(self, n_models: int) -> None:
        super().check_models(n_models)
        if self.normalize and sum_of_weights(self.per_model("weights", n_models)) == 0.0:
            raise ArgumentError(
                "method 'linear': the weights sum to 0; expected another sum, or normalize=False."
            )

    def program(self) -> Program:
        # mergekit 0.1.5 accumulates with a fused multiply-add; an unfused sum is not within 1 ulp of it.
        return Program(reduce=Reduce.FUSED_SUM, divisor=Divisor.WEIGHT if self.normalize else Divisor.NONE)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = super().scalars(statistics)
        total = sum_of_weights(self.per_model("weights", statistics.table.n_models))
        for tensor in scalars:
            # Every finite divisor is below infinity, so this one takes its place.
            tensor.divisor_floor, tensor.divisor_fill = math.inf, total
        return scalars


def sum_of_weights(weights: Sequence[float]) -> float:
    """Σ w_k in float32, in the order in which mergekit's `torch.sum` adds the weights of one row.

    One rounding more or less in the divisor is up to two in the quotient, so the order matters. Fewer than
    eight weights go round robin to four partial sums, the last, incomplete round to the first of them; then
    these are added up. Eight or more are eight interleaved columns, each summed so, which are added in turn
    to the sum of what the columns leave over. (torch adds a level from 512 weights on.)
    """
    n_columns = 8
    values = [float32(weight) for weight in weights]
    if len(values) < n_columns:
        return _four_partial_sums(values)
    whole = len(values) - len(values) % n_columns
    total = _sum(values[whole:])
    for column in range(n_columns):
        total = float32(total + _four_partial_sums(values[column:whole:n_columns]))
    return total


def _four_partial_sums(values: Sequence[float]) -> float:
    whole = len(values) - len(values) % 4
    first = _sum(values[whole:], start=_sum(values[:whole:4]))
    return _sum([_sum(values[place:whole:4]) for place in (1, 2, 3)], start=first)


def _sum(values: Sequence[float], start: float = 0.0) -> float:
    for value in values:
        start = float32(start + value)
    return start
