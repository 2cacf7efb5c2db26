"""Merges that weigh entries by what the other tasks have there: consensus, and competition balancing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvfast.errors import ArgumentError
from tvfast.methods.base import PerModel, TensorJob, TensorResult, parameter, register_method
from tvfast.methods.whole.base import WholeMethod


@register_method("consensus", source="Wang et al. 2024, arXiv:2405.07813", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class Consensus(WholeMethod):
    """θ = θ₀ + λ · Σ_t τ_t where `agree` tasks or more have |τ_t| > threshold_t · |Σ τ - τ_t|, else θ₀."""

    unused = frozenset({"weights"})

    threshold: PerModel = parameter(
        0.4, "how small a task's own share may be, 0 or more; one, or one per model"
    )
    agree: int = parameter(2, "tasks whose mask an entry must be in, 1 or more")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_weights()
        self._normalise("threshold", finite=True)
        for value in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if value < 0:
                raise ArgumentError(
                    f"method 'consensus': threshold is {value}; expected a number of 0 or more."
                )
        self._check_count("agree")
        if self.agree < 1:
            raise ArgumentError(f"method 'consensus': agree is {self.agree}; expected 1 or more.")

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        from tvfast.matrices.masks import consensus

        results = []
        for job in jobs:
            assert job.base is not None
            thresholds = self.per_model("threshold", len(job.models))
            results.append(TensorResult(consensus(job.base, job.models, thresholds, self.agree, self.scale)))
        return results


@register_method("pcb", source="Du et al. 2024, arXiv:2410.02396", dialects=("paper",))
@dataclass(frozen=True, kw_only=True)
class Pcb(WholeMethod):
    """θ = θ₀ + λ · Σ_t w_t τ̂_t S_t / Σ_t S_t, S_t from competition within and between the tasks."""

    ratio: float = parameter(0.1, "share of a task's scores that count, in [0, 1]")
    outliers: float = parameter(1e-4, "share of the magnitudes that is clamped at each end, in [0, 0.5)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("ratio", "outliers")
        self._normalise("ratio", per_model=False)
        self._normalise("outliers", per_model=False)
        if self.outliers >= 0.5:
            raise ArgumentError(f"method 'pcb': outliers is {self.outliers}; expected a number below 0.5.")

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        from tvfast.matrices.masks import competition_balanced

        results = []
        for job in jobs:
            assert job.base is not None
            weights = self.per_model("weights", len(job.models))
            merged = competition_balanced(
                job.base, job.models, weights, self.ratio, self.outliers, self.scale
            )
            results.append(TensorResult(merged))
        return results

    def scratch_bytes(self, shape: Sequence[int], n_models: int, record_bytes: int) -> int:
        """Clamped task vectors, sums, scores and a selection in float32."""
        return (4 * n_models + 60) * math.prod(shape) + 64 * 2**20
