"""Fisher merging: every entry is averaged by how much each model's outputs depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tvfast.errors import ArgumentError
from tvfast.methods.base import PerModel, ProgramMethod, parameter, register_method
from tvfast.methods.linear import Linear
from tvfast.methods.scalars import float32
from tvfast.methods.scored import inverse, map_scores
from tvfast.methods.statistics import TableStatistics
from tvfast.program import Divisor, Program, ScoreMap, ScoreSummary, TensorScalars, Weighting


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherDialect:
    """One reading of Fisher merging.

    Attributes:
        epsilon: floor of the mean Fisher, or what is added to it.
        adds: whether it is added.
        first_only: whether only the first model, the target, has a floor.
        normalises: whether weights are divided by the norm of the model's Fisher, plus `norm_epsilon`.
        source: the program and the function that were read.
    """

    epsilon: float
    adds: bool = False
    first_only: bool = False
    normalises: bool = False
    norm_epsilon: float = 0.0
    source: str


FISHER_DIALECTS: Mapping[str, FisherDialect] = MappingProxyType(
    {
        "matena_raffel": FisherDialect(
            epsilon=1e-6,
            first_only=True,
            normalises=True,
            source="mmatena/model_merging 46802f9, merging.py; the target model is the first",
        ),
        "mats": FisherDialect(epsilon=1e-8, source="mats cb52c38, diagonal Fisher merging"),
        "mergelm": FisherDialect(
            epsilon=1e-6,
            adds=True,
            normalises=True,
            norm_epsilon=1e-6,
            source="MergeLM 6d49ad9, merging_with_fisher_weights; its weights also sum to 1, which cancels",
        ),
    }
)


@register_method(
    "fisher",
    source="Matena & Raffel 2021, arXiv:2111.09832",
    dialects=tuple(FISHER_DIALECTS),
    needs_base=False,
    needs_scores=True,
)
@dataclass(frozen=True, kw_only=True)
class Fisher(ProgramMethod):
    """θ = λ · Σ_k c_k F_k · θ_k / Σ_k c_k F_k, entry by entry, F_k the diagonal Fisher of model k."""

    plain_weights = False  # they are made relative to the norm and to the largest of them

    epsilon: PerModel | None = parameter(
        None, "floor of F_k (mergelm: added to it), above 0; one, or one per model; by dialect if None"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon is not None:
            self._normalise("epsilon", finite=True)
            for value in self.epsilon if isinstance(self.epsilon, tuple) else (self.epsilon,):
                if not float32(value) > 0.0:
                    raise ArgumentError(
                        f"method 'fisher': epsilon is {value}; expected a number above 0, without which "
                        "entries that no model depends on have no mean."
                    )
        for weight in self.weights if isinstance(self.weights, tuple) else (self.weights,):
            if weight is not None and not float(weight) > 0.0:
                raise ArgumentError(f"method 'fisher': a weight is {weight}; expected numbers above 0.")

    @property
    def _row(self) -> FisherDialect:
        return FISHER_DIALECTS[self.dialect]

    @property
    def score_kind(self) -> str:
        return "fisher"

    def without_scores(self) -> ProgramMethod:
        return Linear(weights=self.weights, scale=self.scale)

    def program(self) -> Program:
        return Program(weighting=Weighting.SCORE, divisor=Divisor.WEIGHT)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        n_models = statistics.table.n_models
        epsilons = (self._row.epsilon,) * n_models
        if self.epsilon is not None:
            epsilons = self.per_model("epsilon", n_models)
        map_scores(statistics, lambda k, summary: self._map(k, summary, epsilons[k]))
        scalars = self.plain_scalars(statistics.table)
        for entry, tensor in zip(statistics.table.entries, scalars, strict=True):
            tensor.divisor_floor = 0.0  # a sum of nothing is NaN, not a silent zero
            if not self._row.normalises:
                continue
            norms = [self._norm(k, summary) for k, summary in enumerate(entry.score_summaries)]
            weights = [model.weight / norm for model, norm in zip(tensor.models, norms, strict=True)]
            for model, weight in zip(tensor.models, weights, strict=True):
                model.weight = float32(weight / max(weights))  # a common factor cancels
        return scalars

    def _map(self, model: int, summary: ScoreSummary, epsilon: float) -> ScoreMap:
        row, scale = self._row, inverse(summary.divisor)
        if row.adds:
            return ScoreMap(scale=scale, shift=epsilon)
        return ScoreMap(scale=scale, floor=epsilon if model == 0 or not row.first_only else 0.0)

    def _norm(self, model: int, summary: ScoreSummary) -> float:
        """‖F‖₂ over the whole model.

        Raises:
            ArgumentError: it is 0.
        """
        norm = summary.model_norm + self._row.norm_epsilon
        if norm == 0.0:
            raise ArgumentError(
                f"method 'fisher', dialect {self.dialect!r} divides by the norm of the Fisher of model "
                f"{model}, which is 0; expected one that is not zero everywhere. Collect it again, or use "
                "dialect 'mats'."
            )
        return norm
