"""Consensus Task Arithmetic: entries that several tasks need."""

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

    unused = frozenset({"weights", "tie"})

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

    def scratch_bytes(self, shape: Sequence[int], n_models: int, record_bytes: int) -> int:
        """Task vectors and their sum, base and result in float32."""
        return (4 * n_models + 20) * math.prod(shape) + 64 * 2**20
