"""Trim, elect signs, merge disjointly."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvfast.methods.base import TIES, PerModel, parameter, register_method
from tvfast.methods.dialects import TIES_DIALECTS, TiesDialect
from tvfast.methods.statistics import Ranks, TableStatistics
from tvfast.methods.task_vectors import (
    TaskVectorMethod,
    keeps_all,
    normalised,
    rescale_l1,
    write_bands,
    write_majority,
)
from tvfast.program import Program, TensorScalars, Tie, ZeroSign

SCOPES = ("tensor", "model")


@register_method("ties", source="Yadav et al. 2023, arXiv:2306.01708", dialects=tuple(TIES_DIALECTS))
@dataclass(frozen=True, kw_only=True)
class Ties(TaskVectorMethod):
    """θ = θ₀ + λ · mean of w_k trim(τ_k) over the models that agree with the elected sign."""

    density: PerModel = parameter(1.0, "share kept, in [0, 1]; one, or one per model")
    normalize: bool | None = parameter(None, "False: sum instead of mean; None: as the dialect does")
    rescale: bool = parameter(False, "restore the L1 norm of each task vector after the trim")
    scope: str | None = parameter(
        None, "what is ranked together: 'tensor' or the whole 'model'; by dialect if None", SCOPES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("density")
        self._check_flag("normalize")
        self._check_flag("rescale")
        self._check_word("scope")

    @property
    def _row(self) -> TiesDialect:
        return TIES_DIALECTS[self.dialect]

    @property
    def tie_rule(self) -> Tie:
        return self._row.tie if self.tie is None else TIES[self.tie]

    @property
    def whole_model(self) -> bool:
        return (self.scope or self._row.scope) == "model"

    def program(self) -> Program:
        program = replace(self._row.program, tie=self.tie_rule)
        return program if self.normalize is None else normalised(program, self.normalize)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        program = self.program()
        scalars = self.plain_scalars(statistics.table)
        write_bands(scalars, statistics.bands(self._ranks(statistics.table.n_models), self.tie_rule))
        if self._rescales(statistics.table.n_models):
            rescale_l1(statistics, program, scalars)
        if program.zero_sign is ZeroSign.MAJORITY:
            write_majority(statistics, program, scalars, self._row.majority)
        return scalars

    def trims(self, n_models: int) -> Ranks | None:
        if self._rescales(n_models) or self.program().zero_sign is ZeroSign.MAJORITY:
            return None
        return self._ranks(n_models)

    def _ranks(self, n_models: int) -> Ranks:
        kept, densities = self._row.kept, self.per_model("density", n_models)
        return lambda _, k, n: (0, kept(densities[k], n))

    def _rescales(self, n_models: int) -> bool:
        return self.rescale and not keeps_all(self.per_model("density", n_models))
