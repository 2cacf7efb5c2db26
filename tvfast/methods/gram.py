"""Methods whose coefficients follow from dot products: one measuring pass, one merging pass."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tvfast.errors import ArgumentError
from tvfast.methods.base import ProgramMethod
from tvfast.methods.scalars import float32
from tvfast.methods.span import Gram, is_finite
from tvfast.methods.statistics import TableStatistics
from tvfast.program import Program, TensorScalars


@dataclass(frozen=True, kw_only=True)
class GramMethod(ProgramMethod):
    """θ = λ Σ_k c_k x_k, or θ₀ + that; c_k in float64 from the Gram matrix of a tensor's x_k."""

    plain_weights: ClassVar[bool] = False  # every coefficient depends on every weight

    def program(self) -> Program:
        return Program()

    @abstractmethod
    def coefficients(self, gram: Gram, name: str) -> Sequence[float]:
        """c_k of the tensor `name`; its Gram matrix is finite."""

    def _check_sum(self, n_models: int) -> None:
        """Raise where weights that are divided by their sum have none."""
        weights = self.per_model("weights", n_models)
        if math.fsum(weights) == 0.0:
            raise ArgumentError(
                f"method {self.info.name!r}: the weights {weights} sum to 0; expected another sum."
            )

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        """A NaN or infinity anywhere in a tensor makes all of it NaN: its coefficients are unknown."""
        table = statistics.table
        scalars = self.plain_scalars(table)
        grams = statistics.gram(Program(), scalars)
        for entry, tensor, gram in zip(table.entries, scalars, grams, strict=True):
            found: Sequence[float] = [math.nan] * table.n_models
            if is_finite(gram):
                found = self.coefficients(gram, entry.name)
            for model, coefficient in zip(tensor.models, found, strict=True):
                model.weight = float32(coefficient)
        return scalars
