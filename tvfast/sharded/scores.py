"""Scores of sharded leaves: shards as the leaves', and what is known of whole tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tvfast._leaves import Leaf, model_list, named_tensors
from tvfast._scores import LeafScores, one_of, scores_of
from tvfast.methods import ProgramMethod
from tvfast.ops._views import check_same, view
from tvfast.ops.raw import Wants
from tvfast.program import Entry, ModelScalars, Program, ScoreSummary, TensorScalars
from tvfast.sharded.agreement import Description, file_in_words
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.layouts import check_alike, local_of
from tvfast.sharded.leaves import ShardedLeaf
from tvfast.sharded.shards import local_slice, part_of
from tvfast.sharded.tables import table_of
from tvfast.statistics import StatisticsFile, open_statistics


@dataclass(frozen=True, slots=True)
class _Place:
    base: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def cut(self, whole: Tensor) -> Tensor:
        if not isinstance(self.base, DTensor):
            return whole
        return local_slice(whole, self.base.device_mesh, self.base.placements)


@dataclass(frozen=True, slots=True)
class ShardScores:
    """Scores of every leaf on this rank; summaries of models in `partial` are of shards yet."""

    leaves: Sequence[ShardedLeaf]
    scores: list[LeafScores]
    partial: list[int]

    def completed(self, team: Communicator, n_threads: int) -> list[LeafScores]:
        """With summaries of whole tensors: three reductions if any model's scores came in memory."""
        kept = [at for at, one in enumerate(self.leaves) if one.base.numel() > 0]
        if not self.partial or not kept:
            return self.scores
        extremes = torch.tensor(
            [
                [
                    (-math.inf, -math.inf) if s.n_elements == 0 else (-s.least, s.most)
                    for s in self._partial(at)
                ]
                for at in kept
            ],
            dtype=torch.float64,
        )
        extremes = team.most(extremes)
        pairs = []
        for at in kept:
            views = tuple(self.scores[at].views[k] for k in self.partial)
            part = part_of(self.leaves[at].base, team.ranks[0], team.rank)
            pairs.append((Entry(name=self.leaves[at].name, models=views), part))
        table, backend = table_of(pairs, False, team)
        scalars = [TensorScalars(models=[ModelScalars() for _ in self.partial]) for _ in kept]
        sums = backend.measure(table, Program(), scalars, Wants.L1 | Wants.SQUARES, n_threads)
        norms = [
            math.sqrt(math.fsum(moments.gram[i][i] for moments in sums)) for i in range(len(self.partial))
        ]
        result = list(self.scores)
        for at, moments, ends in zip(kept, sums, extremes.tolist(), strict=True):
            summaries = list(self.scores[at].summaries)
            for i, k in enumerate(self.partial):
                summaries[k] = ScoreSummary(
                    n_elements=self.leaves[at].base.numel(),
                    least=-ends[i][0],
                    most=ends[i][1],
                    l1=moments.l1[i],
                    squares=moments.gram[i][i],
                    divisor=summaries[k].divisor,
                    model_norm=norms[i],
                )
            result[at] = replace(self.scores[at], summaries=tuple(summaries))
        return result

    def _partial(self, at: int) -> list[ScoreSummary]:
        return [self.scores[at].summaries[k] for k in self.partial]


def shard_scores(
    said: Description,
    method: ProgramMethod,
    leaves: Sequence[ShardedLeaf],
    stats: Iterable[Any] | None,
    scores: Iterable[Any] | None,
    n_threads: int,
) -> ShardScores:
    """Checked as `_scores.scores_of` does; tensors must be laid out as the base's, or be whole.

    Args:
        said: gets what must be equal on all ranks.

    Raises:
        LayoutError: scores in DTensors of another layout.
    """
    given = one_of(stats, scores)
    if given is not None and method.score_kind is not None:
        given = [
            one
            if isinstance(one, str | os.PathLike | StatisticsFile)
            else _localised(one, leaves, f"stats[{k}]")
            for k, one in enumerate(model_list(given, "stats"))
        ]
    locals_ = []
    for one in leaves:
        local = local_of(one.base)
        locals_.append(
            Leaf(one.name, local, one.models, view(local, one.name, "base", float64=True), (), one.aliases)
        )
    places = [_Place(one.base) for one in leaves]
    found = scores_of(method, locals_, given, n_threads, places)
    if method.score_kind is None or given is None:
        return ShardScores(leaves, found, [])
    partial = []
    for k, one in enumerate(given):
        if isinstance(one, str | os.PathLike | StatisticsFile):
            said.add(
                f"stats[{k}]", file_in_words(one if isinstance(one, StatisticsFile) else open_statistics(one))
            )
        else:
            said.add(f"stats[{k}]", "tensors")
            partial.append(k)
    return ShardScores(leaves, found, partial)


def _localised(scores: Any, leaves: Sequence[ShardedLeaf], role: str) -> dict[str, Tensor]:
    tensors = named_tensors(scores, role)
    found: dict[str, Tensor] = {}
    for one in leaves:
        for name in (one.name, *one.aliases):
            if name not in tensors:
                continue
            tensor = tensors[name]
            check_same(name, role, tensor, "base", one.base)
            if isinstance(tensor, DTensor):
                check_alike(name, one.base, [(role, tensor)])
                found[name] = local_of(tensor)
            else:
                found[name] = _Place(one.base).cut(tensor)
    return found
