"""MagMax, and sums of task vectors that were trimmed by magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from tvfast.methods.base import TIES, PerModel, parameter, register_method
from tvfast.methods.dialects import kept_peft
from tvfast.methods.statistics import Ranks, TableStatistics
from tvfast.methods.task_vectors import TaskVectorMethod, write_bands
from tvfast.program import Keep, Program, Reduce, TensorScalars, Tie


@register_method("magmax", source="Marczak et al. 2024, arXiv:2407.06322", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class MagMax(TaskVectorMethod):
    """θ = θ₀ + λ · the w_k τ_k of largest magnitude, entry by entry; the later model among equals."""

    def program(self) -> Program:
        return Program(reduce=Reduce.MAX_ABS)


@register_method("magnitude_prune", source="peft 0.21.2, merge_utils.magnitude_prune", dialects=("peft",))
@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(TaskVectorMethod):
    """θ = θ₀ + λ Σ_k w_k trim(τ_k)."""

    density: PerModel = parameter(1.0, "share kept, in [0, 1]; one, or one per model")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("density")

    @property
    def tie_rule(self) -> Tie:
        return TIES[self.tie or "hash"]

    def program(self) -> Program:
        return Program(keep=Keep.BAND, tie=self.tie_rule)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = self.plain_scalars(statistics.table)
        write_bands(scalars, statistics.bands(self.trims(statistics.table.n_models), self.tie_rule))
        return scalars

    def trims(self, n_models: int) -> Ranks:
        densities = self.per_model("density", n_models)
        return lambda _, k, n: (0, kept_peft(densities[k], n))
