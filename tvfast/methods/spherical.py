"""Interpolations of directions: of two models, of any number, and their mean on the sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvfast.errors import MergeError
from tvfast.methods import span
from tvfast.methods.base import Method, own_values, parameter, register_method
from tvfast.methods.gram import GramMethod

SMALLEST_NORM = 1e-7  # nuslerp divides by at least this
SMALLEST_SINE = 1e-8  # nuslerp: below it the arc is a line
SMALLEST_TOTAL = 1e-6  # nuslerp: weights of a smaller sum count as equal


@dataclass(frozen=True, kw_only=True)
class SphericalParameters(Method):
    """What methods with an optional base have."""

    task_vectors: bool = parameter(
        True, "interpolate the task vectors and add θ₀; False: the models, and θ₀ is written, not read"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("task_vectors")

    @property
    def reads_base(self) -> bool:
        return self.task_vectors


@dataclass(frozen=True, kw_only=True)
class NuslerpParameters(SphericalParameters):
    """Parameters of `nuslerp`."""

    nuslerp_flatten: bool = parameter(True, "one angle for the tensor; False: one for every row or column")
    nuslerp_row_wise: bool = parameter(
        False, "if not flattened: vectors run along the first dimension; False: along the last"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("nuslerp_flatten")
        self._check_flag("nuslerp_row_wise")

    @property
    def t(self) -> float:
        """How far from the first model to the second."""
        first, second = self.per_model("weights", 2)
        total = first + second
        return 0.5 if abs(total) < SMALLEST_TOTAL else second / total


@register_method(
    "nuslerp",
    source="Shoemake 1985, doi:10.1145/325165.325242; mergekit 0.1.5 `nuslerp`",
    n_models=(2, 2),
    optional_base=True,
)
@dataclass(frozen=True, kw_only=True)
class Nuslerp(NuslerpParameters, GramMethod):
    """θ = θ₀ + λ (sin((1-t)φ) τ_1 + sin(tφ) τ_2) / sin φ, φ the angle between them, t = w_2 / (w_1 + w_2)."""

    def specialised(self) -> Method:
        if self.nuslerp_flatten:
            return self
        from tvfast.methods.whole.rows import SlerpOfRows

        return SlerpOfRows(**own_values(self))

    def coefficients(self, gram: span.Gram, name: str) -> Sequence[float]:
        first, second = (max(length, SMALLEST_NORM) for length in span.norms(gram))
        return slerp(gram[0][1] / first / second, self.t)


def slerp(cosine: float, t: float) -> tuple[float, float]:
    """What two vectors are multiplied by, `t` of the way from one to the other."""
    cosine = max(-1.0, min(1.0, cosine))
    if 1.0 - cosine * cosine <= SMALLEST_SINE**2:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@register_method(
    "multislerp",
    source="Goddard 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit 0.1.5 `multislerp`",
    optional_base=True,
)
@dataclass(frozen=True, kw_only=True)
class Multislerp(SphericalParameters, GramMethod):
    """θ = θ₀ + λ · Σ_k w_k |τ_k| · m, m = Σ_k w_k τ_k / |τ_k| at norm 1, weights of sum 1."""

    normalize_weights: bool = parameter(True, "divide the weights by their sum")
    eps: float = parameter(1e-8, "added to norms, and the least norm of the mean direction, above 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("normalize_weights")
        self._check_least("eps", zero=False)

    def check_models(self, n_models: int) -> None:
        super().check_models(n_models)
        if n_models > 1 and self.normalize_weights:
            self._check_sum(n_models)

    def coefficients(self, gram: span.Gram, name: str) -> Sequence[float]:
        n = len(gram)
        if n == 1:
            return [1.0]
        shares = list(self.per_model("weights", n))
        if self.normalize_weights:
            total = math.fsum(shares)
            shares = [weight / total for weight in shares]
        lengths = span.norms(gram)
        if not any(lengths):
            return [0.0] * n
        by = [length + self.eps for length in lengths]
        size = span.norm(span.units(gram, by), shares)
        if size < self.eps:
            if n == 2:
                return shares  # opposite directions: a line is left
            raise MergeError(
                f"tensor {name!r}: the weighted directions of the {n} models cancel, so they have no mean "
                f"direction (its norm is {size:.3g}, below eps {self.eps:g}). Give other weights."
            )
        scale = math.fsum(share * length for share, length in zip(shares, lengths, strict=True))
        # Tangents at their own mean have the mean 0, so the exponential map goes no farther than eps.
        scale *= math.cos(self.eps)
        return [scale * share / size / one for share, one in zip(shares, by, strict=True)]


@register_method(
    "karcher",
    source="Karcher 1977, doi:10.1002/cpa.3160300502; arXiv:2603.04972; mergekit 0.1.5 `karcher`",
    needs_base=False,
)
@dataclass(frozen=True, kw_only=True)
class Karcher(GramMethod):
    """θ = λ · Σ_k w_k |θ_k| · the Karcher mean of the directions θ_k / |θ_k|, weights of sum 1."""

    max_iter: int = parameter(10, "iterations at most")
    tol: float = parameter(
        1e-5, "the iteration ends when a step is shorter; shorter models have no direction"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("max_iter")
        self._check_least("tol", zero=False)

    def check_models(self, n_models: int) -> None:
        super().check_models(n_models)
        self._check_sum(n_models)

    def coefficients(self, gram: span.Gram, name: str) -> Sequence[float]:
        n = len(gram)
        if n == 1:
            return [1.0]
        weights = self.per_model("weights", n)
        shares = [weight / math.fsum(weights) for weight in weights]
        scale = math.fsum(share * length for share, length in zip(shares, span.norms(gram), strict=True))
        return [scale * a for a in span.karcher_mean(gram, shares, self.max_iter, self.tol)]
