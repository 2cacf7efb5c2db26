"""The gradient of a loss to the coefficients of a merge, from products of gradients with task vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, BackendError
from tvfast.methods import ProgramMethod
from tvfast.methods.scalars import float32
from tvfast.ops._views import check_same, view
from tvfast.ops.raw import Backend, Wants
from tvfast.program import (
    Divisor,
    Gain,
    Members,
    Moments,
    Program,
    Reduce,
    TensorScalars,
    View,
    Vote,
    WorkTable,
)

Dots: TypeAlias = Callable[
    [Sequence[int], Sequence[Tensor], Program, Sequence[TensorScalars], int], list[Moments]
]


def check_differentiable(method: ProgramMethod, program: Program) -> None:
    """Raise unless θ is θ₀ + λ Σ w_k t_k, or that divided by Σ w_k, with t_k free of the coefficients.

    Raises:
        ArgumentError: naming what stands against it.
    """
    reasons = {
        "elects signs": program.vote is not Vote.NONE,
        "reads scores": program.reads_scores,
        "takes largest magnitudes": program.reduce is Reduce.MAX_ABS,
        "divides entries by their own probability": program.gain is Gain.INVERSE_PROBABILITY,
        "divides by those that are not zero": program.members is Members.STRICT
        and program.divisor is not Divisor.NONE,
        "computes its own numbers from the weights": not method.plain_weights,
    }
    why = [reason for reason, stands in reasons.items() if stands]
    if why:
        raise ArgumentError(
            f"method {method.info.name!r} {' and '.join(why)}; expected a weighted sum of task vectors, as "
            "task_arithmetic, breadcrumbs or dare_linear are, for gradients to its coefficients."
        )


@dataclass(frozen=True, slots=True)
class TableGradient:
    """dL/dw of the entries of one table whose coefficients are in `scalars`.

    `dots` finds products of gradients with the kept task vectors of entries that have no memory of their own.
    """

    backend: Backend
    table: WorkTable
    program: Program
    scalars: Sequence[TensorScalars]
    dots: Dots | None = None

    def rows(self, gradients: Mapping[str, Tensor], n_threads: int) -> list[list[float]]:
        """[entry][task]; zeros where a tensor has no gradient.

        Raises:
            ShapeError, DTypeError, DeviceError: a gradient that does not fit its tensor.
            BackendError: the backend has no products with scores.
        """
        n_tasks = self.table.n_models
        rows = [[0.0] * n_tasks for _ in self.table.entries]
        places = [i for i, entry in enumerate(self.table.entries) if entry.name in gradients]
        if not places:
            return rows
        own = [self.scalars[place] for place in places]
        found = [gradients[self.table.entries[place].name] for place in places]
        products = (self.dots or self._dots)(places, found, self.program, own, n_threads)
        for place, moments, scalars in zip(places, products, own, strict=True):
            if len(moments.dots) != n_tasks:
                raise BackendError(
                    f"backend {self.backend.name!r} has no products with scores; expected one that measures "
                    "them. Set TVFAST_BACKEND to another."
                )
            rows[place] = _derivative(self.program, scalars, moments.dots)
        return rows

    def _dots(
        self,
        places: Sequence[int],
        gradients: Sequence[Tensor],
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int,
    ) -> list[Moments]:
        entries = []
        for place, gradient in zip(places, gradients, strict=True):
            entry = self.table.entries[place]
            score = _score(gradient, entry.models[0], entry.name)
            entries.append(replace(entry, out=None, scores=(score,) * self.table.n_models))
        table = WorkTable(entries, self.table.n_models)
        return self.backend.measure(table, program, scalars, Wants.DOTS, n_threads)


def _score(gradient: Tensor, model: View, name: str) -> View:
    owner: Tensor = model.owner
    check_same(name, "grads", gradient, "model", owner)
    return view(gradient.detach().contiguous(), name, "grads", float64=owner.dtype == torch.float64)


def _derivative(program: Program, scalars: TensorScalars, dots: Sequence[float]) -> list[float]:
    """dL/dw_k from <g, kept τ_k>, in float64 from the float32 numbers of the merge."""
    scale = float32(scalars.scale)
    products = [float32(m.gain) * dot for m, dot in zip(scalars.models, dots, strict=True)]
    if program.divisor is Divisor.NONE:
        return [scale * product for product in products]
    if program.divisor is Divisor.COUNT:
        return [scale * product / len(products) for product in products]
    weights = [float32(m.weight) for m in scalars.models]
    divisor = sum(weights)
    if abs(divisor) < scalars.divisor_floor:
        return [scale * product / scalars.divisor_fill for product in products]
    mean = sum(w * p for w, p in zip(weights, products, strict=True)) / divisor
    return [scale * (product - mean) / divisor for product in products]
