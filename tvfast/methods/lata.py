"""LATA: layers of a task vector that merely follow instructions count less than those that know the task."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from tvfast.errors import ArgumentError
from tvfast.methods.base import Aside, ProgramMethod, parameter, register_method
from tvfast.methods.scalars import float32
from tvfast.methods.span import Gram
from tvfast.methods.statistics import TableStatistics
from tvfast.methods.task_arithmetic import TaskArithmetic
from tvfast.ops.raw import Wants
from tvfast.program import ModelScalars, Program, TensorScalars, WorkTable

SIGMA = 0.95
ALIGNED = 1.0  # the cosine of a layer that has no direction in one of the two vectors

Position: TypeAlias = tuple[tuple[int, str], ...]

_LAYER = re.compile(r"((?:.*?\.)?[0-9]+)\.([^.]+)(?:\..+)?", re.DOTALL)
_DIGITS = re.compile(r"([0-9]+)")


def linear_drop(rank: int, n_layers: int) -> float:
    """r / L."""
    return rank / n_layers


def logarithmic_drop(rank: int, n_layers: int) -> float:
    """ln r / ln L: nothing of the first; all of the only one."""
    return math.log(rank) / math.log(n_layers) if n_layers > 1 else 1.0


THRESHOLD = "threshold"
DROPS = MappingProxyType({"linear": linear_drop, "logarithmic": logarithmic_drop})


@register_method(
    "lata",
    source="Layer-Aware Task Arithmetic 2025, arXiv:2502.20186",
    dialects=("paper",),
    needs_instruct=True,
)
@dataclass(frozen=True, kw_only=True)
class Lata(ProgramMethod):
    """θ = θ_target ± λ Σ_k w_k c_kl τ_k; c_kl falls with the cosine of τ_k and θ_instruct - θ₀ in layer l."""

    plain_weights = False

    drop: str | None = parameter(
        None,
        "what c is of a layer's rank or cosine; 'linear' where something is learned, else 'threshold'",
        (*DROPS, THRESHOLD),
    )
    sigma: float = parameter(
        SIGMA, "drop 'threshold': layers of at least this cosine are dropped, in [-1, 1]"
    )
    granularity: str = parameter(
        "block",
        "what counts as a layer: a block of the model, a module of a block, a tensor",
        ("block", "module", "tensor"),
    )
    direction: str = parameter(
        "learn", "'learn' adds the task vectors, 'forget' takes them away", ("learn", "forget")
    )
    target: str = parameter("instruct", "θ_target: the instruct model, or the base", ("instruct", "base"))
    outside: str = parameter(
        "target",
        "a tensor outside of blocks: θ_target's own, with the 'whole' task vectors, or 'ranked' as a layer",
        ("target", "whole", "ranked"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drop", "granularity", "direction", "target", "outside"):
            self._check_word(name)
        self._normalise("sigma", finite=True, per_model=False)
        if not -1.0 <= self.sigma <= 1.0:
            raise ArgumentError(
                f"method {self.info.name!r}: sigma is {self.sigma}; expected a cosine, in [-1, 1]."
            )
        if self.sigma != SIGMA and self.drops_by_rank:
            raise ArgumentError(
                f"method {self.info.name!r}: sigma is {self.sigma}, which drop={self._drop!r} does not use; "
                "expected drop='threshold'."
            )

    @property
    def _drop(self) -> str:
        return self.drop or ("linear" if self.direction == "learn" else THRESHOLD)

    @property
    def drops_by_rank(self) -> bool:
        """Whether the share of a layer depends on all others."""
        return self._drop != THRESHOLD

    @property
    def whole_model(self) -> bool:
        return self.drops_by_rank

    def group_of(self, name: str) -> str | None:
        if self.drops_by_rank:
            return ""
        return None if self.granularity == "tensor" else self.layer_of(name)

    def layer_of(self, name: str) -> str | None:
        """The layer of a tensor, as `granularity` cuts it; None: it is in none."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return name if self.outside == "ranked" else None
        if self.granularity == "tensor":
            return name
        return match[1] if self.granularity == "block" else f"{match[1]}.{match[2]}"

    def aside(self, name: str, n_models: int) -> Aside | None:
        if self.layer_of(name) is not None:
            return None
        n_tasks = n_models - 1
        shares = [1.0 if self.outside == "whole" else 0.0] * n_tasks
        method = TaskArithmetic(weights=self._coefficients(shares))
        copied = None if self.outside == "whole" else (n_models if self.target == "instruct" else 0)
        return Aside(method, copied)

    def nothing_ranked(self) -> str:
        return (
            f"method {self.info.name!r}: no tensor is in a numbered layer, as 'layers.3.mlp.weight' is, so "
            "there is nothing to rank; expected one at least. outside='ranked' makes layers of the others."
        )

    def program(self) -> Program:
        return Program()

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        """A NaN or infinity in a layer makes its cosine unknown, and with ranks that of all layers."""
        table = statistics.table
        scalars = self.plain_scalars(table)
        grams = [m.gram for m in statistics.measure(Program(), scalars, Wants.GRAM | Wants.LAST)]
        layers: dict[str, list[int]] = {}
        for row, entry in enumerate(table.entries):
            if entry.n_elements:
                layers.setdefault(str(self.layer_of(entry.name)), []).append(row)
        names = sorted(layers, key=position)
        of_layer = [_added([grams[row] for row in layers[name]]) for name in names]
        shares = [self.shares([cosine(gram, k) for gram in of_layer]) for k in range(table.n_models - 1)]
        for index, name in enumerate(names):
            found = self._coefficients([of_task[index] for of_task in shares])
            for row in layers[name]:
                for model, coefficient in zip(scalars[row].models, found, strict=True):
                    model.weight = float32(coefficient)
        return scalars

    def plain_scalars(self, table: WorkTable) -> list[TensorScalars]:
        return [TensorScalars(models=[ModelScalars() for _ in entry.models]) for entry in table.entries]

    def shares(self, cosines: Sequence[float]) -> list[float]:
        """c of every layer of one task vector, from its cosines in order of the layers."""
        if not self.drops_by_rank:
            return [math.nan if math.isnan(c) else float(c < self.sigma) for c in cosines]
        if any(map(math.isnan, cosines)):
            return [math.nan] * len(cosines)
        share = DROPS[self._drop]
        found = [0.0] * len(cosines)
        descending = sorted(range(len(cosines)), key=lambda layer: -cosines[layer])  # equal ones: lower first
        for rank, layer in enumerate(descending, start=1):
            found[layer] = share(rank, len(cosines))
        return found

    def _coefficients(self, shares: Sequence[float]) -> tuple[float, ...]:
        """Of the task vectors and of the instruct model's."""
        sign = 1.0 if self.direction == "learn" else -1.0
        weights = self.per_model("weights", len(shares))
        found = (sign * self.scale * weight * share for weight, share in zip(weights, shares, strict=True))
        return (*found, 1.0 if self.target == "instruct" else 0.0)


def cosine(gram: Gram, k: int) -> float:
    """Of the k-th vector and the last; `ALIGNED` where one of them is 0."""
    own, other = gram[k][k], gram[-1][-1]
    if not all(map(math.isfinite, (gram[k][-1], own, other))):
        return math.nan
    if own == 0.0 or other == 0.0:
        return ALIGNED
    # The root of the product, not the product of the roots: exactly 1 where the vectors are equal.
    return max(-1.0, min(1.0, gram[k][-1] / math.sqrt(own * other)))


def position(layer: str) -> Position:
    """What layers are in order by: numbers in their names as numbers."""
    parts = _DIGITS.split(layer)
    return tuple((int(part), "") if odd % 2 else (-1, part) for odd, part in enumerate(parts))


def _added(grams: Sequence[Gram]) -> Gram:
    """The Gram matrix of several tensors as one vector: its diagonal, and products with the last model."""
    last = len(grams[0]) - 1
    found = [[0.0] * (last + 1) for _ in range(last + 1)]
    for k in range(last + 1):
        for j in {k, last}:
            products = [gram[k][j] for gram in grams]
            found[k][j] = math.fsum(products) if all(map(math.isfinite, products)) else math.nan
    return found
