"""nuslerp and Model Stock with a coefficient for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvfast.methods.base import TensorJob, TensorResult
from tvfast.methods.model_stock import (
    SMALLEST_DENOMINATOR,
    SMALLEST_PRODUCT,
    ModelStock,
    StockParameters,
)
from tvfast.methods.spherical import SMALLEST_NORM, SMALLEST_SINE, Nuslerp, NuslerpParameters
from tvfast.methods.whole.base import WholeMethod


@dataclass(frozen=True, kw_only=True)
class SlerpOfRows(NuslerpParameters, WholeMethod):
    """`nuslerp` with an angle for every row, or for every column."""

    info = Nuslerp.info

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        from tvfast.matrices import rows

        return [
            TensorResult(
                rows.combine_rows(
                    job.base,
                    job.models,
                    lambda gram: rows.slerp(gram, self.t, SMALLEST_NORM, SMALLEST_SINE),
                    along_first=self.nuslerp_row_wise,
                    scale=self.scale,
                )
            )
            for job in jobs
        ]


@dataclass(frozen=True, kw_only=True)
class StockOfRows(StockParameters, WholeMethod):
    """`model_stock` with an angle for every row."""

    info = ModelStock.info

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        from tvfast.matrices import rows

        return [
            TensorResult(
                rows.combine_rows(
                    job.base,
                    job.models,
                    lambda gram: rows.stock(gram, SMALLEST_PRODUCT, SMALLEST_DENOMINATOR),
                    along_first=False,
                    scale=self.scale,
                )
            )
            for job in jobs
        ]
