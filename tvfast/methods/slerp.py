"""Spherical interpolation between the base and one model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvfast.errors import ArgumentError
from tvfast.methods.base import ProgramMethod, parameter, register_method
from tvfast.methods.scalars import float32
from tvfast.methods.statistics import TableStatistics
from tvfast.program import Program, TensorScalars, View

SMALLEST_NORM = 1e-8  # a vector no longer than this counts as orthogonal to every other
LARGEST_COSINE = 0.9995  # beyond it the arc is a line


@register_method(
    "slerp", source="Shoemake 1985, doi:10.1145/325165.325242; mergekit 0.1.5 `slerp`", n_models=(1, 1)
)
@dataclass(frozen=True, kw_only=True)
class Slerp(ProgramMethod):
    """θ = λ (sin((1-t)φ) θ₀ + sin(tφ) θ_1) / sin φ, φ the angle between θ₀ and θ_1; t = 0 is the base."""

    unused = frozenset({"weights"})
    plain_weights = False

    t: float = parameter(0.5, "0 is the base, 1 the model; outside [0, 1] extrapolates")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            raise ArgumentError(f"method 'slerp' takes no weights; found {self.weights!r}. Set t instead.")
        self._normalise("t", finite=True, per_model=False)

    def operands(self, base: View, models: tuple[View, ...]) -> tuple[View | None, tuple[View, ...]]:
        return None, (base, *models)

    def program(self) -> Program:
        return Program()

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = self.plain_scalars(statistics.table)
        for tensor, gram in zip(scalars, statistics.gram(Program(), scalars), strict=True):
            for model, coefficient in zip(tensor.models, coefficients(gram, self.t), strict=True):
                model.weight = coefficient
        return scalars


def coefficients(gram: list[list[float]], t: float) -> tuple[float, float]:
    """What base and model are multiplied by, as float32, from their 2 x 2 Gram matrix; NaN if it has one."""
    norms = [math.sqrt(gram[k][k]) for k in range(2)]
    norms = [norm if norm > SMALLEST_NORM else 1.0 for norm in norms]
    cosine = gram[0][1] / norms[0] / norms[1]
    if math.isnan(cosine):
        return math.nan, math.nan
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > LARGEST_COSINE:
        return float32(1.0 - float32(t)), float32(t)
    angle = math.acos(cosine)
    return float32(math.sin((1.0 - t) * angle) / math.sin(angle)), float32(
        math.sin(t * angle) / math.sin(angle)
    )
