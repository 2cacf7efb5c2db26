"""RAM: what one model alone has changed is taken whole, what several have changed is averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tvfast.methods.base import ProgramMethod, parameter, register_method
from tvfast.methods.scalars import float32, next_float32
from tvfast.methods.statistics import TableStatistics
from tvfast.ops.raw import Wants
from tvfast.program import Divisor, Keep, Members, Program, TensorScalars, Tie, Weighting

SOURCE = "Reinforced Agent Merging 2026, arXiv:2601.13572"

CHANGED = Program(keep=Keep.BAND, tie=Tie.GE, members=Members.STRICT, divisor=Divisor.COUNT)
"""The mean over the models whose entry changed."""


@dataclass(frozen=True, kw_only=True)
class _Ram(ProgramMethod):
    """What both share: an entry of a model counts as changed if |τ| > epsilon."""

    unused = frozenset({"weights"})
    plain_weights = False

    epsilon: float = parameter(1e-5, "an entry has changed if its |τ_k| is larger, 0 or more")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_weights()
        self._check_least("epsilon")

    def program(self) -> Program:
        return CHANGED

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = self.plain_scalars(statistics.table)
        for tensor in scalars:
            for model in tensor.models:
                model.lo = next_float32(float32(self.epsilon))
        return scalars


@register_method("ram", source=f"{SOURCE}; mergekit 0.1.5 `ram`")
@dataclass(frozen=True, kw_only=True)
class Ram(_Ram):
    """θ = θ₀ + λ · mean of τ_k over the models with |τ_k| > epsilon, entry by entry."""


@register_method("ramplus_tl", source=f"{SOURCE}; mergekit 0.1.5 `ramplus_tl`")
@dataclass(frozen=True, kw_only=True)
class RamplusTl(_Ram):
    """θ = `ram`, where one model alone has changed an entry times 1 + r min(n_shared / n_alone, alpha)."""

    r: float = parameter(0.1, "strength of the rescaling")
    alpha: float = parameter(0.2, "most that the ratio of shared to lone entries counts, 0 or more")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._normalise("r", finite=True, per_model=False)
        self._check_least("alpha")

    def program(self) -> Program:
        return replace(CHANGED, weighting=Weighting.ALONE)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = super().scalars(statistics)
        measured = statistics.measure(CHANGED, scalars, Wants.COUNTS | Wants.ALONE)
        for tensor, moments in zip(scalars, measured, strict=True):
            for model, n_changed, n_alone in zip(
                tensor.models, moments.n_nonzero, moments.n_alone, strict=True
            ):
                model.weight = self._rescale(n_changed - n_alone, n_alone)
        return scalars

    def _rescale(self, n_shared: int, n_alone: int) -> float:
        ratio = n_shared / max(n_alone, self.epsilon) if n_alone or self.epsilon else math.inf
        return float32(1.0 + self.r * min(ratio, self.alpha))
