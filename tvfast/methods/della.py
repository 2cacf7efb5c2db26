"""MAGPRUNE: entries of each row survive at random, larger ones more often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tvfast.errors import ArgumentError
from tvfast.methods.base import PerModel, parameter, register_method
from tvfast.methods.scalars import draw_limit, float32
from tvfast.methods.statistics import TableStatistics, plane_bytes
from tvfast.methods.task_vectors import (
    CONSENSUS,
    SUM,
    TaskVectorMethod,
    keeps_all,
    normalised,
    rescale_l1,
    write_gains,
)
from tvfast.program import Gain, Keep, ModelScalars, Program, TensorScalars

SOURCE = "Deep, Bhardwaj & Poria 2024, arXiv:2406.11617"


@dataclass(frozen=True, kw_only=True)
class _Della(TaskVectorMethod):
    """p rises linearly with the rank of |τ| in its row, from density - epsilon to density + epsilon."""

    random = True
    stages: ClassVar[Program]

    density: PerModel = parameter(1.0, "mean keep probability in [0, 1]; one, or one per model")
    epsilon: PerModel = parameter(
        0.15, "half the spread of the keep probabilities; density ± epsilon in (0, 1)"
    )
    normalize: bool | None = parameter(
        None, "divide by the weights that take part; None: true for della only"
    )
    rescale: bool = parameter(
        True, "mergekit: restore the L1 norm; paper: divide each entry by its probability"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("density", "epsilon")
        self._check_flag("normalize")
        self._check_flag("rescale")

    def check_models(self, n_models: int) -> None:
        super().check_models(n_models)
        pairs = zip(self.per_model("density", n_models), self.per_model("epsilon", n_models), strict=True)
        for density, epsilon in pairs:
            if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
                raise ArgumentError(
                    f"method {self.info.name!r}: density {density} with epsilon {epsilon} gives keep "
                    f"probabilities from {density - epsilon:g} to {density + epsilon:g}; expected both "
                    "inside (0, 1). Lower epsilon."
                )

    def program(self) -> Program:
        inverse = self.rescale and self.dialect == "paper"
        normalize = self.stages is CONSENSUS if self.normalize is None else self.normalize
        return replace(
            normalised(self.stages, normalize),
            keep=Keep.RANDOM_BY_RANK,
            gain=Gain.INVERSE_PROBABILITY if inverse else Gain.MODEL,
        )

    def row_elements(self, shape: Sequence[int]) -> int:
        return shape[-1] if len(shape) > 1 else 0

    def plane_bytes(self, n_elements: int, n_models: int) -> int:
        return plane_bytes(n_elements, n_models) if self._measures(n_models) else 0

    def resolve(self, statistics: TableStatistics) -> tuple[Program, list[TensorScalars]]:
        """Ranks are costly: they are taken once into bit planes where those fit, otherwise for every pass."""
        program, scalars = self.program(), self._probabilities(statistics)
        if self._measures(statistics.table.n_models):
            if statistics.planes_fit():
                write_gains(scalars, statistics.draw_masks(program, scalars))
                program = replace(program, keep=Keep.MASK)
            else:
                rescale_l1(statistics, program, scalars)
        return program, scalars

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        return self.resolve(statistics)[1]

    def _measures(self, n_models: int) -> bool:
        return (
            self.rescale and self.dialect == "mergekit" and not keeps_all(self.per_model("density", n_models))
        )

    def _probabilities(self, statistics: TableStatistics) -> list[TensorScalars]:
        table = statistics.table
        scalars = self.summed_scalars(statistics)
        densities, epsilons = (
            self.per_model("density", table.n_models),
            self.per_model("epsilon", table.n_models),
        )
        for entry, tensor in zip(table.entries, scalars, strict=True):
            row = entry.row or entry.n_elements
            for model, density, epsilon in zip(tensor.models, densities, epsilons, strict=True):
                _by_rank(model, density, epsilon, row)
        return scalars


def _by_rank(model: ModelScalars, density: float, epsilon: float, row: int) -> None:
    """Probabilities by rank; in a row of one the density itself, where the published formula is 0 / 0."""
    if not 0.0 < density < 1.0 or row <= 1:
        model.limit, model.prob = draw_limit(density), float32(density) or 1.0
        return
    model.limit = draw_limit(density - epsilon)
    model.limit_step = round(2.0 * epsilon / (row - 1) * 2.0**64)
    model.prob = float32(density - epsilon)
    model.prob_step = float32(2.0 * epsilon / (row - 1))


@register_method("della", source=SOURCE, dialects=("mergekit", "paper"))
@dataclass(frozen=True, kw_only=True)
class Della(_Della):
    """θ = θ₀ + λ · elected mean of w_k g_k (m_k ∘ τ_k), m_k ~ Bernoulli(p(rank of |τ_k| in its row))."""

    stages = CONSENSUS


@register_method("della_linear", source=SOURCE, dialects=("mergekit", "paper"))
@dataclass(frozen=True, kw_only=True)
class DellaLinear(_Della):
    """θ = θ₀ + λ Σ_k w_k g_k (m_k ∘ τ_k), m_k ~ Bernoulli(p(rank of |τ_k| in its row))."""

    stages = SUM
