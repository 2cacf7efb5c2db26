"""Arcee Fusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvfast.methods.base import MergeViews, TensorJob, TensorResult, register_method
from tvfast.methods.whole.base import WholeMethod
from tvfast.program import DType, View


@register_method(
    "arcee_fusion",
    source="Arcee AI 2024, arcee.ai; mergekit 0.1.5 `arcee_fusion`",
    dialects=("mergekit", "mergekit_float32"),
    n_models=(1, 1),
)
@dataclass(frozen=True, kw_only=True)
class ArceeFusion(WholeMethod):
    """θ = θ₀ + λ τ where |τ| KL(softmax θ_1 | softmax θ₀) of the row reaches q50 + 1.5 (q75 - q25)."""

    unused = frozenset({"weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_weights()

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        from tvfast.matrices.fusion import fuse

        results = []
        for job in jobs:
            assert job.base is not None
            results.append(TensorResult(fuse(job.base, job.models[0], self.scale, exact=self._exact)))
        return results

    def merge_views(self) -> MergeViews | None:
        return self._merge_views if self._exact else None

    def _merge_views(
        self,
        base: View | None,
        models: Sequence[View],
        out: View,
        shape: Sequence[int],
        scratch: int,
        n_threads: int,
    ) -> None:
        from tvfast.matrices.importances import fuse_rows

        assert base is not None
        importances = View(scratch, out.n_elements, DType.F32)
        row = shape[-1] if shape else 1
        fuse_rows(base, models[0], importances, out, row, self.scale, n_threads)

    @property
    def _exact(self) -> bool:
        return self.dialect == "mergekit"

    def scratch_bytes(self, shape: Sequence[int], n_models: int, record_bytes: int) -> int:
        """Importances, which become the result, and the mark of those that are ranked; blocks in float64."""
        return 8 * math.prod(shape) + 64 * 2**20
