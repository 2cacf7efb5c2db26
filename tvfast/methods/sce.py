"""SCE: select by variance across models, calculate weights, erase minority signs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tvfast.methods.base import parameter, register_method
from tvfast.methods.scalars import float32, model_key
from tvfast.methods.statistics import Band, TableStatistics
from tvfast.methods.task_vectors import CONSENSUS, TaskVectorMethod, write_bands
from tvfast.program import Ballot, Keep, Program, TensorScalars

SMALLEST = float32(1e-6)  # mergekit: floor of the divisor, and of the energy below which weights are uniform


@register_method("sce", source="Wan et al. 2024, arXiv:2408.07990", dialects=("mergekit", "paper"))
@dataclass(frozen=True, kw_only=True)
class Sce(TaskVectorMethod):
    """θ = θ₀ + λ · elected mean of τ_k by w_k ∝ mean(τ_k²) over the entries of largest variance."""

    plain_weights = False  # they multiply the calculated ones

    select_topk: float = parameter(1.0, "share of the non-zero variances selected, in [0, 1]")
    select_in_merge: bool | None = parameter(
        None, "whether unselected entries also leave the merge; None: mergekit yes, paper no"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("select_topk")
        self._normalise("select_topk", per_model=False)
        self._check_flag("select_in_merge")

    @property
    def _masks_merge(self) -> bool:
        return self.dialect == "mergekit" if self.select_in_merge is None else self.select_in_merge

    def _selection(self) -> Program:
        return Program(keep=Keep.VARIANCE if self.select_topk < 1.0 else Keep.ALL, tie=self.tie_rule)

    def program(self) -> Program:
        keep = self._selection().keep if self._masks_merge else Keep.ALL
        return replace(CONSENSUS, ballot=Ballot.RAW, keep=keep, tie=self.tie_rule)

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        """Weights passed by the caller multiply the calculated ones."""
        table = statistics.table
        scalars = self.plain_scalars(table)
        selection = self._selection()
        if selection.keep is Keep.VARIANCE:
            for entry, tensor in zip(table.entries, scalars, strict=True):
                shared = model_key(self.seed, entry.name, 0)  # one mask for all models
                for model in tensor.models:
                    model.key = shared
            write_bands(scalars, self._bands(statistics))
        squares = statistics.squares(selection, scalars)
        for entry, tensor, row in zip(table.entries, scalars, squares, strict=True):
            for model, weight in zip(tensor.models, self._weights(row, entry.n_elements), strict=True):
                model.weight = float32(model.weight * weight)
            if self.dialect == "mergekit":
                tensor.divisor_floor = tensor.divisor_fill = SMALLEST
        return scalars

    def _bands(self, statistics: TableStatistics) -> list[list[Band]]:
        counts = [self._n_selected(n) for n in statistics.n_nonzero_variances()]
        return statistics.bands(lambda group, model, n: (0, counts[group]), self.tie_rule, Keep.VARIANCE)

    def _n_selected(self, n_nonzero: int) -> int:
        if self.dialect == "mergekit":  # its product is a float32 one: 100 of 0.29 are 29
            return int(float32(float32(n_nonzero) * float32(self.select_topk)))
        return int(n_nonzero * self.select_topk)

    def _weights(self, squares: list[float], n: int) -> list[float]:
        """Shares of the mean squares; equal where there is too little to share."""
        means = [float32(square / n) if n else 0.0 for square in squares]
        total = math.fsum(means) if all(map(math.isfinite, means)) else math.nan
        smallest = SMALLEST if self.dialect == "mergekit" else math.nextafter(0.0, 1.0)
        if total < smallest:
            return [1.0 / len(means)] * len(means)
        return [mean / total for mean in means]
