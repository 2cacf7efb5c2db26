"""`LiveMerge` of weights with DTensors: local shards are overwritten, sums go over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tvfast._leaves import Leaf, Weights
from tvfast._scores import LeafScores, Scores
from tvfast.errors import LayoutError
from tvfast.methods import ProgramMethod
from tvfast.ops._views import check_same, view
from tvfast.ops.raw import Backend, Wants
from tvfast.program import Moments, Program, TensorScalars, View, WorkTable
from tvfast.sharded.agreement import Description, agreement
from tvfast.sharded.backend import ShardedBackend
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.layouts import check_alike, described, local_of, splits_rows
from tvfast.sharded.leaves import ShardedLeaf, sharded_leaves
from tvfast.sharded.scores import ShardScores, shard_scores
from tvfast.sharded.shards import Part
from tvfast.sharded.tables import Row, sharded_tables, table_of


@dataclass(frozen=True, slots=True)
class LiveShards:
    """The live tensors with base and tasks on this rank.

    Attributes:
        leaves: the live tensors as they were given, with base (if that was) and tasks.
        live: their shards.
        rows: shards of base and tasks.
    """

    team: Communicator
    leaves: list[ShardedLeaf]
    live: list[Leaf]
    rows: list[Leaf]

    @staticmethod
    def of(
        said: Description,
        method: ProgramMethod,
        model: Weights,
        base: Weights | None,
        tasks: Sequence[Weights],
    ) -> LiveShards:
        """
        Raises:
            LayoutError: layouts differ, or the method ranks rows that are spread over ranks.
        """
        others = tasks if base is None else [base, *tasks]
        leaves = sharded_leaves(model, others, said, redistribute=False)
        for one in leaves:
            if method.program().ranks_rows and splits_rows(one.base):
                raise LayoutError(
                    f"tensor {one.name!r}: method {method.info.name!r} ranks rows, and placements "
                    f"{described(one.base)} spread them over ranks; expected whole rows on each. "
                    "Redistribute the tensor, or merge it with merge_."
                )
        live = [one.leaf for one in leaves if one.leaf is not None]
        return LiveShards(said.team, leaves, live, [_row(leaf, copies=base is None) for leaf in live])

    def scores(
        self, said: Description, method: ProgramMethod, stats: Iterable[Scores] | None, n_threads: int
    ) -> ShardScores:
        """Of the shards; `completed` makes them those of the tensors."""
        return shard_scores(said, method, self.leaves, stats, None, n_threads)

    def tables(
        self, method: ProgramMethod, scores: Sequence[LeafScores], *, task_vectors: bool
    ) -> Iterator[tuple[WorkTable, ShardedBackend]]:
        """Logical tables that write the live shards."""
        rows = [
            Row(leaf, part, live.base, own)
            for leaf, part, live, own in zip(self.rows, self.parts, self.live, scores, strict=True)
        ]
        return sharded_tables(method, rows, self.team, task_vectors=task_vectors)

    @property
    def parts(self) -> list[Part]:
        return [one.part for one in self.leaves if one.part is not None]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live tensors as they were given, by name of their leaf."""
        return {one.name: one.base for one in self.leaves}

    def gradients(self, find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `find` finds, gradients by name, once every rank has the same ones.

        Raises:
            ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError: a gradient does not fit its
                tensor, or ranks differ.
        """
        with agreement(self.team) as said:
            found = find()
            tensors = self.tensors
            for name, gradient in found.items():
                _score(name, gradient, tensors[name])
            said.add("gradients", sorted(found))
        return found

    def dots(
        self,
        backend: Backend,
        places: Sequence[int],
        gradients: Sequence[Tensor],
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int,
    ) -> list[Moments]:
        """Products of gradients with kept task vectors of some entries of a table, over all ranks."""
        assert isinstance(backend, ShardedBackend)
        tensors = self.tensors
        pairs = []
        for place, gradient in zip(places, gradients, strict=True):
            entry, part = backend.local.tensors[place]
            score = _score(entry.name, gradient, tensors[entry.name])
            pairs.append((replace(entry, out=None, scores=(score,) * len(entry.models)), part))
        table, inner = table_of(pairs, backend.local.double, self.team)
        return inner.measure(table, program, scalars, Wants.DOTS, n_threads)


def _row(leaf: Leaf, *, copies: bool) -> Leaf:
    """Base and tasks of a live leaf; the base is a copy of it, or the first of its counterparts."""
    if copies:
        copy = leaf.base.detach().clone(memory_format=torch.contiguous_format)
        return replace(leaf, base=copy, base_view=view(copy, leaf.name, "base", float64=True))
    return replace(
        leaf,
        base=leaf.models[0],
        base_view=leaf.model_views[0],
        models=leaf.models[1:],
        model_views=leaf.model_views[1:],
    )


def _score(name: str, gradient: Tensor, live: Tensor) -> View:
    check_same(name, "grads", gradient, "model", live)
    check_alike(name, live, [("grads", gradient)])
    local = local_of(gradient.detach()).contiguous()
    return view(local, name, "grads", float64=live.dtype == torch.float64)
