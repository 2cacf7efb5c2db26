"""Model Stock: how far the average of fine-tunes is trusted follows from the angle between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tvfast.methods import span
from tvfast.methods.base import Method, own_values, parameter, register_method
from tvfast.methods.gram import GramMethod

SMALLEST_PRODUCT = 1e-6  # of two norms, which a dot product is divided by
SMALLEST_DENOMINATOR = 1e-6  # below it there is no estimate, and the base stays


@dataclass(frozen=True, kw_only=True)
class StockParameters(Method):
    """Parameters of `model_stock`."""

    unused = frozenset({"weights"})

    filter_wise: bool = parameter(False, "one angle for every row (last dimension) instead of the tensor")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_weights()
        self._check_flag("filter_wise")


@register_method(
    "model_stock",
    source="Jang et al. 2024, arXiv:2403.19522; mergekit 0.1.5 `model_stock`",
    n_models=(2, None),
)
@dataclass(frozen=True, kw_only=True)
class ModelStock(StockParameters, GramMethod):
    """θ = θ₀ + λ t mean(τ_k), t = K cos / (1 + (K-1) cos), cos the mean cosine of two task vectors."""

    def specialised(self) -> Method:
        if not self.filter_wise:
            return self
        from tvfast.methods.whole.rows import StockOfRows

        return StockOfRows(**own_values(self))

    def coefficients(self, gram: span.Gram, name: str) -> Sequence[float]:
        n = len(gram)
        return [share_of_average(gram) / n] * n


def share_of_average(gram: span.Gram) -> float:
    """t."""
    lengths = span.norms(gram)
    cosines = [
        max(-1.0, min(1.0, gram[j][k] / max(lengths[j] * lengths[k], SMALLEST_PRODUCT)))
        for j, k in combinations(range(len(gram)), 2)
    ]
    cosine = sum(cosines) / len(cosines)
    denominator = 1.0 + (len(gram) - 1) * cosine
    return 0.0 if abs(denominator) < SMALLEST_DENOMINATOR else len(gram) * cosine / denominator
