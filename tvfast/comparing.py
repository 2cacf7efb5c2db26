"""`compare`: how task vectors relate, per tensor, per layer and in total."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from tvfast._leaves import Leaf, Weights, any_sharded, match, model_list
from tvfast.errors import ArgumentError
from tvfast.merging import float64_backend
from tvfast.ops._check import threads
from tvfast.ops.raw import Wants, backend_for
from tvfast.program import Entry, ModelScalars, Moments, Program, TensorScalars, WorkTable

Matrix = list[list[float]]

_WANTS = Wants.GRAM | Wants.VOTES

_LAYER = re.compile(r"^(?:.*?\.)??(?:layers?|h|blocks?|block|stages?)\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """Task vectors of one tensor, or of several as if they were one vector; K models.

    Attributes:
        gram: [K][K] dot products ⟨τ_j, τ_k⟩.
        norms: [K] Euclidean norms.
        cosines: [K][K]; NaN where one of the two norms is zero, since no angle is defined.
        sign_conflict: share of entries, in [0, 1], where one task vector is positive and another negative.
        n_elements: entries of one task vector.
    """

    gram: Matrix
    norms: list[float]
    cosines: Matrix
    sign_conflict: float
    n_elements: int


@dataclass(frozen=True, slots=True)
class ComparisonTable(Mapping[str, TensorComparison]):
    """Comparisons by name of tensor or layer; each quantity also as a dict by name."""

    rows: dict[str, TensorComparison]

    def __getitem__(self, name: str) -> TensorComparison:
        return self.rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def gram(self) -> dict[str, Matrix]:
        return {name: row.gram for name, row in self.rows.items()}

    @property
    def norms(self) -> dict[str, list[float]]:
        return {name: row.norms for name, row in self.rows.items()}

    @property
    def cosines(self) -> dict[str, Matrix]:
        return {name: row.cosines for name, row in self.rows.items()}

    @property
    def sign_conflict(self) -> dict[str, float]:
        return {name: row.sign_conflict for name, row in self.rows.items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found. `gram`, `norms`, `cosines` and `sign_conflict` are those of `tensors`, by name.

    Attributes:
        tensors: per tensor.
        layers: per layer, "model.layers.3" for "model.layers.3.mlp.up_proj.weight"; tensors outside any
            layer under the first component of their name.
        total: of all tensors together.
    """

    tensors: ComparisonTable
    layers: ComparisonTable
    total: TensorComparison

    @property
    def gram(self) -> dict[str, Matrix]:
        return self.tensors.gram

    @property
    def norms(self) -> dict[str, list[float]]:
        return self.tensors.norms

    @property
    def cosines(self) -> dict[str, Matrix]:
        return self.tensors.cosines

    @property
    def sign_conflict(self) -> dict[str, float]:
        return self.tensors.sign_conflict


def compare(
    base: Weights, models: Iterable[Weights], *, redistribute: bool = False, n_threads: int = 0
) -> Comparison:
    """Gram matrix, norms, cosines and sign conflict of the task vectors τ_k = θ_k - θ₀.

    Args:
        base: tensor, list or dict of tensors, or module, as for `merge_`; not modified.
        models: K of the same names and shapes; not modified.
        redistribute: of DTensors whose models are not laid out as the base, as for `merge_`.
        n_threads: 0 is all cores that the process may use. Does not change the result.

    Returns:
        A `Comparison` of Python floats. Tied tensors and integer tensors count once and not at all.

    Raises:
        ArgumentError: no models, or `models` is a single one.
        StateDictError, ShapeError, DTypeError, DeviceError, LayoutError: models do not fit the base.
        BackendError: no backend can run the call.

    Notes:
        τ_k is float32; dot products are exact products summed in the order-independent accumulator. One pass
        over base and models, no extra memory. NaN makes the sums of its tensor NaN.
    """
    models = list(models) if isinstance(models, Iterator) else models
    if any_sharded(base, models):
        from tvfast.sharded.measuring import measure

        sizes, moments = measure(base, models, _WANTS, n_threads=n_threads, redistribute=redistribute)
        return _comparison(sizes, moments, len(model_list(models)))
    threads(n_threads)
    found = model_list(models)
    if not found:
        raise ArgumentError("models is empty; expected at least one model.")
    leaves = match(base, found)
    names = [leaf.name for leaf in leaves]
    moments = dict(zip(names, _measure(leaves, len(found), n_threads), strict=True))
    return _comparison({leaf.name: leaf.base.numel() for leaf in leaves}, moments, len(found))


def _comparison(sizes: Mapping[str, int], moments: Mapping[str, Moments], n_models: int) -> Comparison:
    def together(names: Iterable[str]) -> TensorComparison:
        rows = list(names)
        return _together([moments[name] for name in rows], [sizes[name] for name in rows], n_models)

    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(layer_of(name), []).append(name)
    return Comparison(
        ComparisonTable({name: together([name]) for name in sizes}),
        ComparisonTable({layer: together(names) for layer, names in layers.items()}),
        together(sizes),
    )


def layer_of(name: str) -> str:
    """The name up to its layer number; outside layers its first component."""
    match_ = _LAYER.match(name)
    return match_.group(0) if match_ else name.split(".", 1)[0]


def _measure(leaves: list[Leaf], n_models: int, n_threads: int) -> list[Moments]:
    rows: dict[tuple[torch.device, bool], list[int]] = {}
    entries = []
    for row, leaf in enumerate(leaves):
        entries.append(Entry(name=leaf.name, models=leaf.model_views, base=leaf.base_view))
        rows.setdefault((leaf.base.device, leaf.float64), []).append(row)
    moments: dict[int, Moments] = {}
    with torch.no_grad():
        for (_, float64), members in rows.items():
            table = WorkTable([entries[row] for row in members], n_models)
            backend = float64_backend() if float64 else backend_for(table)
            scalars = [TensorScalars(models=[ModelScalars() for _ in range(n_models)]) for _ in members]
            found = backend.measure(table, Program(), scalars, _WANTS, n_threads)
            moments.update(zip(members, found, strict=True))
    return [moments[row] for row in range(len(leaves))]


def _together(moments: list[Moments], sizes: list[int], n_models: int) -> TensorComparison:
    """Several tensors as one vector; sums over tensors are rounded once."""
    models = range(n_models)
    gram = [[_sum([m.gram[j][k] for m in moments]) for k in models] for j in models]
    norms = [math.sqrt(gram[k][k]) for k in models]
    n = sum(sizes)
    return TensorComparison(
        gram=gram,
        norms=norms,
        cosines=[[_cosine(gram, j, k) for k in models] for j in models],
        sign_conflict=sum(m.n_conflict for m in moments) / n if n else 0.0,
        n_elements=n,
    )


def _sum(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _cosine(gram: Matrix, j: int, k: int) -> float:
    # The root of the product, exactly 1 on the diagonal; the product of the roots where that is out of range.
    product = gram[j][j] * gram[k][k]
    normal = sys.float_info.min <= product < math.inf
    length = math.sqrt(product) if normal else math.sqrt(gram[j][j]) * math.sqrt(gram[k][k])
    if length == 0.0:
        return math.nan
    cosine = gram[j][k] / length
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))
