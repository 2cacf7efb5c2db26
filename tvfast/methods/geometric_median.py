"""The point nearest to all models: an average that a single outlier cannot move far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvfast.errors import ArgumentError
from tvfast.methods import span
from tvfast.methods.base import parameter, register_method
from tvfast.methods.gram import GramMethod


@register_method(
    "geometric_median",
    source="Weiszfeld 1937; Pillutla, Kakade & Harchaoui 2022, arXiv:1912.13445; sd-mecha 1.1.8",
    dialects=("paper",),
)
@dataclass(frozen=True, kw_only=True)
class GeometricMedian(GramMethod):
    """θ = θ₀ + λ (argmin_x Σ_k w_k |θ_k - x| - θ₀), tensor by tensor."""

    eps: float = parameter(1e-6, "distances count as at least this, above 0")
    max_iter: int = parameter(100, "iterations at most")
    ftol: float = parameter(1e-20, "the iteration ends when the sum falls by no more than this share of it")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least("eps", zero=False)
        self._check_count("max_iter")
        self._check_least("ftol")

    def check_models(self, n_models: int) -> None:
        super().check_models(n_models)
        self._check_sum(n_models)
        if min(self.per_model("weights", n_models)) < 0:
            raise ArgumentError(
                f"method 'geometric_median': weights are {self.weights}; expected numbers of 0 or more."
            )

    def coefficients(self, gram: span.Gram, name: str) -> Sequence[float]:
        weights = self.per_model("weights", len(gram))
        return span.geometric_median(gram, weights, self.eps, self.max_iter, self.ftol)
