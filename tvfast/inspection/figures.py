"""Figures of task vectors: what is counted and summed, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvfast.inspection.names import layer_of, module_of
from tvfast.ops.raw import OCTAVES

TIE_DENSITY = 0.2
"""The tie mass is counted at the threshold of this density, the default of TIES."""

_BIAS = 127  # octave of [1, 2)


@dataclass(slots=True)
class TaskVectors:
    """Sums over the task vectors τ_k = θ_k - θ₀ of some tensors; K models.

    Attributes:
        gram: [K][K] dot products.
        n_zero: [K] entries of τ_k that are 0.
        n_tied: [K] entries whose magnitude equals the threshold at `TIE_DENSITY`.
        n_conflict: entries where one task vector is positive and another negative.
        n_elements: entries of one task vector.
        base_square: ‖θ₀‖².
        chance: entries that would be in conflict if the signs of all that is not 0 were drawn.
    """

    gram: list[list[float]]
    n_zero: list[int]
    n_tied: list[int]
    n_conflict: int
    n_elements: int
    base_square: float = 0.0
    chance: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        densities = [1.0 - self.share(n) for n in self.n_zero]
        one_sign = math.prod(1.0 - density / 2 for density in densities)
        nothing = math.prod(1.0 - density for density in densities)
        self.chance = self.n_elements * (1.0 - 2.0 * one_sign + nothing)

    @property
    def norms(self) -> list[float]:
        return [math.sqrt(self.gram[k][k]) for k in range(len(self.gram))]

    def cosine(self, j: int, k: int) -> float:
        """NaN where one of the norms is zero, since no angle is defined."""
        length = math.sqrt(self.gram[j][j] * self.gram[k][k])
        if length == 0.0:
            return math.nan
        cosine = self.gram[j][k] / length
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))

    def share(self, count: float) -> float:
        return count / self.n_elements if self.n_elements else 0.0

    def as_json(self) -> dict[str, Any]:
        models = range(len(self.gram))
        cosines = [[self.cosine(j, k) for k in models] for j in models]
        return {
            "n_elements": self.n_elements,
            "base_norm": number(math.sqrt(self.base_square)),
            "norms": [number(norm) for norm in self.norms],
            "cosines": [[number(cosine) for cosine in row] for row in cosines],
            "sign_conflict": self.share(self.n_conflict),
            "sign_conflict_by_chance": self.share(self.chance),
            "sparsity": [self.share(n) for n in self.n_zero],
            "tie_mass": [self.share(n) for n in self.n_tied],
        }


def together(parts: Sequence[TaskVectors]) -> TaskVectors:
    """Several tensors as if they were one vector; sums are rounded once."""
    models = range(len(parts[0].gram))
    found = TaskVectors(
        gram=[[_sum([part.gram[j][k] for part in parts]) for k in models] for j in models],
        n_zero=[sum(part.n_zero[k] for part in parts) for k in models],
        n_tied=[sum(part.n_tied[k] for part in parts) for k in models],
        n_conflict=sum(part.n_conflict for part in parts),
        n_elements=sum(part.n_elements for part in parts),
        base_square=_sum([part.base_square for part in parts]),
    )
    found.chance = math.fsum(part.chance for part in parts)
    return found


def by_layer(tensors: dict[str, TaskVectors]) -> dict[str, TaskVectors]:
    """Tensors of one layer together; a layer is the name up to its first number, or its first component."""
    return _grouped(tensors, layer_of)


def by_module(tensors: dict[str, TaskVectors]) -> dict[str, TaskVectors]:
    """Tensors of one kind of module together, over all layers."""
    return _grouped(tensors, module_of)


def _grouped(tensors: dict[str, TaskVectors], key: Callable[[str], str]) -> dict[str, TaskVectors]:
    groups: dict[str, list[TaskVectors]] = {}
    for name, row in tensors.items():
        groups.setdefault(key(name), []).append(row)
    return {name: together(rows) for name, rows in groups.items()}


class Histograms:
    """How many magnitudes of task vectors are in each octave, by layer and in all."""

    def __init__(self, n_models: int) -> None:
        self.layers: dict[str, list[list[int]]] = {}
        self.total = [[0] * OCTAVES for _ in range(n_models)]

    def add(self, name: str, counts: Sequence[Sequence[int]], n_zero: Sequence[int]) -> None:
        """Of a tensor: [model][octave], and how many of octave 0 are zero: they are in no histogram."""
        layer = self.layers.setdefault(layer_of(name), [[0] * OCTAVES for _ in counts])
        for rows in (layer, self.total):
            for row, of_model, zeros in zip(rows, counts, n_zero, strict=True):
                row[0] -= zeros
                for octave, n in enumerate(of_model):
                    row[octave] += n

    def order(self, names: Sequence[str]) -> None:
        """Layers come in the order of tensors, in whatever order these were added."""
        layers = dict.fromkeys(map(layer_of, names))
        self.layers = {layer: self.layers[layer] for layer in layers if layer in self.layers}

    def as_json(self) -> dict[str, Any]:
        """Counts of [2^e, 2^(e + 1)) for e from `first_exponent` on; what is not finite is left out."""
        used = [o for o in range(OCTAVES - 1) if any(row[o] for row in self.total)] or [_BIAS]
        first, end = used[0], used[-1] + 1
        return {
            "first_exponent": first - _BIAS,
            "total": [row[first:end] for row in self.total],
            "layers": {name: [row[first:end] for row in rows] for name, rows in self.layers.items()},
        }


def _sum(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
