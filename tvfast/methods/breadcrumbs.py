"""Model Breadcrumbs: drop both tails of each task vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tvfast.methods.base import PerModel, parameter, register_method
from tvfast.methods.scalars import top_count
from tvfast.methods.statistics import TableStatistics
from tvfast.methods.task_vectors import (
    CONSENSUS,
    SUM,
    TaskVectorMethod,
    keeps_all,
    normalised,
    rescale_l1,
    write_bands,
)
from tvfast.program import Keep, Program, TensorScalars

SOURCE = "Davari & Belilovsky 2023, arXiv:2312.06795"


@dataclass(frozen=True, kw_only=True)
class _Breadcrumbs(TaskVectorMethod):
    """Entries between two magnitude ranks survive: of a tensor (mergekit) or of each row (paper)."""

    stages: ClassVar[Program]

    density: PerModel = parameter(1.0, "share kept, in [0, 1]; one, or one per model")
    gamma: PerModel = parameter(0.01, "share of largest entries dropped, in [0, 1]; one, or one per model")
    normalize: bool = parameter(False, "divide by the weights that take part")
    rescale: bool = parameter(False, "restore the L1 norm of each task vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("density", "gamma")
        self._check_flag("normalize")
        self._check_flag("rescale")

    def program(self) -> Program:
        keep = Keep.BAND_BY_RANK if self.dialect == "paper" else Keep.BAND
        return replace(normalised(self.stages, self.normalize), keep=keep, tie=self.tie_rule)

    def row_elements(self, shape: Sequence[int]) -> int:
        return shape[-1] if len(shape) > 1 else 0

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        table = statistics.table
        scalars = self.summed_scalars(statistics)
        densities, gammas = self.per_model("density", table.n_models), self.per_model("gamma", table.n_models)
        if self.dialect == "paper":
            for entry, tensor in zip(table.entries, scalars, strict=True):
                row = entry.row or entry.n_elements
                for model, density, gamma in zip(tensor.models, densities, gammas, strict=True):
                    model.rank_lo, model.rank_hi = _row_band(density, gamma, row)
        else:
            bands = statistics.bands(lambda _, k, n: _tensor_band(densities[k], gammas[k], n), self.tie_rule)
            write_bands(scalars, bands)
        if self.rescale and not keeps_all(densities):
            rescale_l1(statistics, self.program(), scalars)
        return scalars


def _tensor_band(density: float, gamma: float, n: int) -> tuple[int, int]:
    """Descending ranks kept: always int(density · n) of them; the band slides to the smallest if it must."""
    if density >= 1.0:
        return 0, n
    n_kept = top_count(density, n)
    first = min(top_count(gamma, n), n - n_kept)
    return first, first + n_kept


def _row_band(density: float, gamma: float, row: int) -> tuple[int, int]:
    """Ascending ranks kept: the largest int(density · row) below the dropped ones; a single element stays."""
    if row <= 1:
        return 0, row
    rank_hi = row - top_count(gamma, row)
    return max(0, rank_hi - top_count(density, row)), rank_hi


@register_method("breadcrumbs", source=SOURCE, dialects=("mergekit", "paper"))
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(_Breadcrumbs):
    """θ = θ₀ + λ Σ_k w_k band(τ_k)."""

    stages = SUM


@register_method("breadcrumbs_ties", source=SOURCE + "; mergekit 0.1.5", dialects=("mergekit", "paper"))
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(_Breadcrumbs):
    """θ = θ₀ + λ · elected sum of w_k band(τ_k)."""

    stages = CONSENSUS
