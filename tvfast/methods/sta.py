"""Selective task arithmetic: only the entries that matter to a task are added, or taken away."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from tvfast.errors import ArgumentError
from tvfast.methods.base import TIES, PerModel, ProgramMethod, parameter, register_method
from tvfast.methods.scalars import float32, top_count
from tvfast.methods.scored import as_mean, by_l1, by_most, by_range, map_scores
from tvfast.methods.statistics import ALL, Band, TableStatistics
from tvfast.methods.task_arithmetic import TaskArithmetic
from tvfast.methods.task_vectors import TaskVectorMethod, write_bands
from tvfast.program import OPEN_CUT, SMALLEST_POSITIVE, Cross, Keep, Program, TensorScalars, Tie, View

S = TypeVar("S")

DENSITY = 0.2
NORMALIZATIONS = MappingProxyType(
    {"max": by_most, "minmax": by_range, "l1": by_l1, "none": as_mean, "rank": as_mean}
)
CROSSES = MappingProxyType(
    {"none": Cross.NONE, "winner": Cross.WINNER, "exclude_others": Cross.EXCLUDE_OTHERS}
)
_LAYER = re.compile(r"((?:.*?\.)?[0-9]+)\..+", re.DOTALL)


@register_method("sta", source="Tian et al. 2024, arXiv:2411.16139", dialects=("paper",), needs_scores=True)
@dataclass(frozen=True, kw_only=True)
class Sta(TaskVectorMethod):
    """θ = θ₀ + λ Σ_k w_k m_k · τ_k: entries whose normalised importance Î_k is among the largest survive."""

    density: PerModel = parameter(DENSITY, "share kept by importance, in [0, 1]; one, or one per model")
    threshold: PerModel | None = parameter(
        None, "keep Î >= threshold instead of a share; one, or one per model"
    )
    importance: str = parameter(
        "weight", "'weight': mean of |g θ|, 'delta': mean of |g τ|", ("weight", "delta")
    )
    normalization: str = parameter("max", "what makes Î of the importance of a tensor", tuple(NORMALIZATIONS))
    scope: str = parameter("tensor", "what is ranked together", ("tensor", "layer", "model"))
    cross: str = parameter("none", "which entries other models' importances rule out", tuple(CROSSES))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("density")
        for name in ("importance", "normalization", "scope", "cross"):
            self._check_word(name)
        if self.threshold is not None:
            self._check_threshold()
        if self.normalization == "rank" and self.cross == "winner":
            raise ArgumentError(
                f"method {self.info.name!r}: cross='winner' compares importances, of which "
                "normalization='rank' leaves the order only; expected another normalization."
            )

    def _check_threshold(self) -> None:
        self._normalise("threshold", finite=True)
        if self.density != DENSITY:
            raise ArgumentError(
                f"method {self.info.name!r}: density is {self.density} and threshold is {self.threshold}; "
                "expected one of them."
            )
        most = math.inf if self.normalization == "none" else 1.0
        for value in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if not 0.0 <= float(value) <= most:
                raise ArgumentError(
                    f"method {self.info.name!r}: threshold is {value}; expected a number in [0, {most:g}] "
                    f"for normalization={self.normalization!r}."
                )

    @property
    def tie_rule(self) -> Tie:
        return TIES[self.tie or "hash"]

    @property
    def score_kind(self) -> str:
        return self.importance

    def without_scores(self) -> ProgramMethod:
        return TaskArithmetic(weights=self.weights, scale=self.scale)

    @property
    def _ranks_tensors(self) -> bool:
        """Whether a tensor's entries are compared with each other only."""
        return self.scope == "tensor" or self.normalization == "rank" or self.threshold is not None

    @property
    def whole_model(self) -> bool:
        return self.scope == "model" and not self._ranks_tensors

    def group_of(self, name: str) -> str | None:
        if self._ranks_tensors:
            return None
        if self.scope == "model":
            return ""
        match = _LAYER.fullmatch(name)
        return None if match is None else match[1]

    def program(self) -> Program:
        return Program(keep=Keep.SCORE, tie=self.tie_rule, cross=CROSSES[self.cross])

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        normalise = NORMALIZATIONS[self.normalization]
        map_scores(statistics, lambda _, summary: normalise(summary))
        scalars = self.plain_scalars(statistics.table)
        write_bands(scalars, self.bands(statistics))
        return scalars

    def bands(self, statistics: TableStatistics) -> list[list[Band]]:
        """[entry][model] importances that survive; among a share, none is 0 unless all survive."""
        n_models = statistics.table.n_models
        if self.threshold is not None and self.normalization != "rank":
            row = [Band(lo=float32(value)) for value in self.per_model("threshold", n_models)]
            return [row for _ in statistics.table.entries]
        ranks = statistics.bands(lambda _, k, n: (0, self._n_kept(k, n, n_models)), self.tie_rule, Keep.SCORE)
        densities = self.per_model("density", n_models)
        everything = [self.threshold is not None or density >= 1.0 for density in densities]
        return [
            [
                replace(band, lo=SMALLEST_POSITIVE, lo_cut=OPEN_CUT)
                if band.lo == 0.0 and not everything[k]
                else band
                for k, band in enumerate(row)
            ]
            for row in ranks
        ]

    def _n_kept(self, model: int, n: int, n_models: int) -> int:
        if self.threshold is None:
            return top_count(self.per_model("density", n_models)[model], n)
        least = math.ceil(self.per_model("threshold", n_models)[model] * n)  # of ranks counted from 1 up
        return n - max(least, 1) + 1


@register_method(
    "sta_forget", source="Tian et al. 2024, arXiv:2411.16139", dialects=("paper",), needs_scores=True
)
@dataclass(frozen=True, kw_only=True)
class StaForget(Sta):
    """θ = θ_from - λ Σ_k w_k m_k · τ_k: only the entries that matter to a task are taken away."""

    plain_weights = False  # what is taken away is the scale's or a weight's sign

    source: str = parameter(
        "base", "θ_from: 'base' is θ₀, 'model' is θ_1, the one model, itself", ("base", "model")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_word("source")

    def check_models(self, n_models: int) -> None:
        super().check_models(n_models)
        if self.source == "model" and n_models != 1:
            raise ArgumentError(
                f"method 'sta_forget': source='model' got {n_models} models; expected one, which is both "
                "what is forgotten and what it is taken from."
            )

    def operands(self, base: View, models: tuple[View, ...]) -> tuple[View | None, tuple[View, ...]]:
        return base, self.score_operands(models)

    def score_operands(self, scores: tuple[S, ...]) -> tuple[S, ...]:
        # A task vector that stays whole, and the same one masked.
        return scores * 2 if self.source == "model" else scores

    def without_scores(self) -> ProgramMethod:
        if self.source == "base":
            return TaskArithmetic(weights=self.weights, scale=-self.scale)
        (weight,) = super().per_model("weights", 1)
        return TaskArithmetic(scale=1.0 - self.scale * weight)

    def per_model(self, name: str, n_models: int) -> tuple[float, ...]:
        if self.source == "model" and isinstance(getattr(self, name), tuple):
            return super().per_model(name, 1) * n_models
        return super().per_model(name, n_models)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = super().scalars(statistics)
        for tensor in scalars:
            if self.source == "base":
                tensor.scale = -tensor.scale
                continue
            whole, masked = tensor.models
            masked.weight = float32(-tensor.scale * masked.weight)
            whole.weight, tensor.scale = 1.0, 1.0
            ALL.write_to(whole)
        return scalars
