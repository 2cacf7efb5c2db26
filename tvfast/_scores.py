"""From what callers bring as scores to views and summaries of every leaf."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from tvfast._leaves import Leaf, Weights, model_list, named_tensors
from tvfast.errors import ArgumentError, StateDictError
from tvfast.methods import ProgramMethod
from tvfast.ops._views import check_same, view
from tvfast.ops.raw import Wants, backend_for
from tvfast.program import Entry, ModelScalars, Program, ScoreSummary, TensorScalars, View, WorkTable
from tvfast.statistics import StatisticsFile, open_statistics
from tvfast.statistics.tensors import read_sum

ROLE = "sum"

Scores: TypeAlias = Weights | StatisticsFile | str | os.PathLike[str]
"""Scores of one model: tensors by name, or the statistics file that holds them."""


@dataclass(frozen=True, slots=True)
class LeafScores:
    """Of one leaf, by model; empty where the method asks for none."""

    views: tuple[View, ...] = ()
    summaries: tuple[ScoreSummary, ...] = ()


def one_of(stats: Iterable[Any] | None, scores: Iterable[Scores] | None) -> Iterable[Any] | None:
    """`scores` is another word for `stats` where methods read importances.

    Raises:
        ArgumentError: both were given.
    """
    if stats is not None and scores is not None:
        raise ArgumentError("stats and scores are both given; expected one of them, stats.")
    return stats if scores is None else scores


class Place(Protocol):
    """Where a leaf's elements lie in a whole tensor of which it is a part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def cut(self, whole: Tensor) -> Tensor:
        """The leaf's elements of a tensor of that shape."""


def scores_of(
    method: ProgramMethod,
    leaves: Sequence[Leaf],
    stats: Iterable[Scores] | None,
    n_threads: int,
    places: Sequence[Place] | None = None,
) -> list[LeafScores]:
    """The scores of every leaf, checked.

    Args:
        places: of leaves that are parts of tensors. Statistics files hold whole tensors; what comes in memory
            is of the leaf, and so are its summaries.

    Raises:
        ArgumentError: statistics are missing, of another number than the models, negative or not finite, or
            given to a method that reads none.
        StateDictError: a leaf has no score.
        ShapeError, DTypeError, DeviceError, LayoutError: a score does not fit its leaf.
        StatisticsError: a statistics file is damaged, or of another model.
    """
    if method.score_kind is None:
        if stats is not None:
            raise ArgumentError(f"method {method.info.name!r} takes no stats; expected None.")
        return [LeafScores()] * len(leaves)
    if stats is None:
        raise ArgumentError(
            f"method {method.info.name!r} needs statistics of every model, and stats is None; expected one "
            f"per model: a statistics file that holds {method.score_kind!r}, or tensors by name. Collect it "
            "with tvfast.importance.collect."
        )
    given = stats if isinstance(stats, list | tuple) else model_list(stats, "stats")
    n_models = len(leaves[0].models) if leaves else len(given)
    if len(given) != n_models:
        raise ArgumentError(f"stats has {len(given)} items for {n_models} models; expected one per model.")
    by_model = [
        _of_model(method.score_kind, one, leaves, f"stats[{k}]", n_threads, places)
        for k, one in enumerate(given)
    ]
    return [
        LeafScores(tuple(v for v, _ in row), tuple(s for _, s in row)) for row in zip(*by_model, strict=True)
    ]


def _of_model(
    kind: str,
    scores: Any,
    leaves: Sequence[Leaf],
    role: str,
    n_threads: int,
    places: Sequence[Place] | None,
) -> list[tuple[View, ScoreSummary]]:
    """View and summary of every leaf's score of one model."""
    if isinstance(scores, str | os.PathLike):
        scores = open_statistics(scores)
    if isinstance(scores, StatisticsFile):
        norm = scores.norm(kind, ROLE)
        return [
            _of_file(kind, scores, leaf, role, norm, None if places is None else places[at])
            for at, leaf in enumerate(leaves)
        ]
    tensors = named_tensors(scores, role)
    found = []
    for leaf in leaves:
        tensor = _named(tensors, leaf, role)
        check_same(leaf.name, role, tensor, "base", leaf.base)
        seen = view(tensor, leaf.name, role)
        found.append((seen, _summary(seen, leaf.name, role, n_threads)))
    norm = math.sqrt(math.fsum(summary.squares for _, summary in found))
    return [(seen, replace(summary, model_norm=norm)) for seen, summary in found]


def _of_file(
    kind: str, file: StatisticsFile, leaf: Leaf, role: str, norm: float, place: Place | None
) -> tuple[View, ScoreSummary]:
    """View and summary of a leaf's sums, as a merge of checkpoints reads them."""
    entry = file.entry(leaf.name, kind, tuple(leaf.base.shape) if place is None else place.shape)
    whole = read_sum(file, leaf.name, kind, ROLE)
    n_elements = whole.numel()
    sums = (whole if place is None else place.cut(whole)).to(leaf.base.device)
    check_same(leaf.name, role, sums, "base", leaf.base)
    known = entry.summary(ROLE, file.path)
    summary = ScoreSummary(
        n_elements=n_elements,
        least=known.least,
        most=known.most,
        l1=known.l1,
        squares=known.squares,
        divisor=file.divisor(leaf.name, kind, ROLE),
        model_norm=norm,
    )
    return view(sums, leaf.name, role), summary


def _named(tensors: Mapping[str, Tensor], leaf: Leaf, role: str) -> Tensor:
    for name in (leaf.name, *leaf.aliases):
        if name in tensors:
            found = tensors[name].detach()
            return found.to(torch.float32) if found.dtype == torch.float64 else found
    raise StateDictError(
        f"{role} has no score of tensor {leaf.name!r}; expected one for every floating-point tensor of base."
    )


def _summary(scores: View, name: str, role: str, n_threads: int) -> ScoreSummary:
    """Extremes and exact sums.

    Raises:
        ArgumentError: a score is negative, NaN or infinite.
    """
    n = scores.n_elements
    if n == 0:
        return ScoreSummary(n_elements=0, least=0.0, most=0.0, l1=0.0, squares=0.0)
    least, most = (float(value) for value in torch.aminmax(scores.owner))
    if not (least >= 0.0 and math.isfinite(most)):
        raise ArgumentError(
            f"tensor {name!r}: {role} has values from {least} to {most}; expected finite ones of 0 or more."
        )
    table = WorkTable([Entry(name=name, models=(scores,))], 1)
    plain = [TensorScalars(models=[ModelScalars()])]
    wants = Wants.L1 | Wants.SQUARES
    (sums,) = backend_for(table).measure(table, Program(), plain, wants, n_threads)
    return ScoreSummary(n_elements=n, least=least, most=most, l1=sums.l1[0], squares=sums.gram[0][0])
