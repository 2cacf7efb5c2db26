"""Add weighted task vectors."""

from __future__ import annotations

from dataclasses import dataclass

from tvfast.methods.base import parameter, register_method
from tvfast.methods.statistics import TableStatistics
from tvfast.methods.task_vectors import SUM, TaskVectorMethod, normalised
from tvfast.program import Program, TensorScalars


@register_method("task_arithmetic", source="Ilharco et al. 2023, arXiv:2212.04089")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(TaskVectorMethod):
    """θ = θ₀ + λ Σ_k w_k τ_k."""

    normalize: bool = parameter(False, "divide the sum by Σ_k w_k")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("normalize")

    def program(self) -> Program:
        return normalised(SUM, self.normalize)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        return self.summed_scalars(statistics)
