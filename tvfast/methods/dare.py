"""Drop and rescale: random entries of each task vector survive."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvfast.methods.base import PerModel, parameter, register_method
from tvfast.methods.dialects import TIES_DIALECTS
from tvfast.methods.scalars import draw_limit, float32
from tvfast.methods.statistics import TableStatistics
from tvfast.methods.task_vectors import (
    CONSENSUS,
    SUM,
    TaskVectorMethod,
    keeps_all,
    normalised,
    rescale_l1,
    write_majority,
)
from tvfast.program import Gain, Keep, Program, TensorScalars, ZeroSign

SOURCE = "Yu et al. 2023, arXiv:2311.03099"


@dataclass(frozen=True, kw_only=True)
class _Dare(TaskVectorMethod):
    """Each entry survives with probability `density`, in an independent draw."""

    random = True

    density: PerModel = parameter(1.0, "keep probability in [0, 1]; one, or one per model")
    normalize: bool | None = parameter(
        None, "divide by the weights that take part; None: as the dialect does"
    )
    rescale: bool = parameter(True, "mergekit: restore the L1 norm; paper: divide by the density")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("density")
        self._check_flag("normalize")
        self._check_flag("rescale")

    def _stages(self) -> Program:
        raise NotImplementedError

    def program(self) -> Program:
        inverse = self.rescale and self.dialect == "paper"
        return replace(
            self._stages(), keep=Keep.RANDOM, gain=Gain.INVERSE_PROBABILITY if inverse else Gain.MODEL
        )

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        scalars = self.summed_scalars(statistics)
        densities = self.per_model("density", statistics.table.n_models)
        for tensor in scalars:
            for model, density in zip(tensor.models, densities, strict=True):
                model.limit = draw_limit(density)
                model.prob = float32(density) or 1.0  # nothing is kept at 0: avoids 0 / 0
        program = self.program()
        if self.rescale and self.dialect == "mergekit" and not keeps_all(densities):
            rescale_l1(statistics, program, scalars)
        if program.zero_sign is ZeroSign.MAJORITY:
            write_majority(statistics, program, scalars, TIES_DIALECTS["paper"].majority)
        return scalars


@register_method("dare_linear", source=SOURCE, dialects=("mergekit", "paper"))
@dataclass(frozen=True, kw_only=True)
class DareLinear(_Dare):
    """θ = θ₀ + λ Σ_k w_k g_k (m_k ∘ τ_k), m_k ~ Bernoulli(density)."""

    def _stages(self) -> Program:
        return normalised(SUM, bool(self.normalize))


@register_method("dare_ties", source=SOURCE, dialects=("mergekit", "paper"))
@dataclass(frozen=True, kw_only=True)
class DareTies(_Dare):
    """θ = θ₀ + λ · elected sum of w_k g_k (m_k ∘ τ_k), m_k ~ Bernoulli(density)."""

    @property
    def whole_model(self) -> bool:
        return self.dialect == "paper"

    def _stages(self) -> Program:
        if self.dialect == "paper":
            stages = TIES_DIALECTS["paper"].program
            return stages if self.normalize is None else normalised(stages, self.normalize)
        return normalised(CONSENSUS, bool(self.normalize))
