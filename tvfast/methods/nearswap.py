"""Take from a model what is close to the base."""

from __future__ import annotations

from dataclasses import dataclass

from tvfast.methods.base import ProgramMethod, parameter, register_method
from tvfast.methods.scalars import float32
from tvfast.methods.statistics import TableStatistics
from tvfast.program import Program, TensorScalars, View, Weighting

SMALLEST_DISTANCE = float32(1e-6)  # t is divided by at least this


@register_method(
    "nearswap",
    source="alchemonaut 2024, QuartetAnemoi-70B-t0.0001; mergekit 0.1.5 `nearswap`",
    n_models=(1, 1),
)
@dataclass(frozen=True, kw_only=True)
class Nearswap(ProgramMethod):
    """θ = λ ((1 - w) θ₀ + w θ_1), w = min(max(t / max(|θ₀ - θ_1|, 1e-6), 0), 1), entry by entry."""

    unused = frozenset({"weights"})
    plain_weights = False

    t: float = parameter(1e-4, "entries that are no farther apart are the model's")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_weights()
        self._normalise("t", finite=True, per_model=False)

    def operands(self, base: View, models: tuple[View, ...]) -> tuple[View | None, tuple[View, ...]]:
        return None, (base, *models)

    def program(self) -> Program:
        return Program(weighting=Weighting.NEARNESS)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = self.plain_scalars(statistics.table)
        for tensor in scalars:
            tensor.models[1].weight = self.t
            tensor.divisor_floor = SMALLEST_DISTANCE
        return scalars
