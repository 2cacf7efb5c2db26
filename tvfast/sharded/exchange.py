"""Tensors that cannot be merged where they lie: brought together, some at a time, and returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tvfast.sharded.communicator import Communicator
from tvfast.sharded.layouts import (
    Placements,
    as_dtensor,
    brought,
    local_of,
    return_to,
    rows_together,
    settled,
    splits_rows,
)
from tvfast.sharded.leaves import ShardedLeaf, leaf_of
from tvfast.sharded.shards import part_of
from tvfast.sharded.tables import Row

BATCH_BYTES = 256 * 2**20
"""Of the copies that a rank holds at a time, unless one tensor's are more."""


def batches(leaves: Sequence[ShardedLeaf], team: Communicator) -> Iterator[list[int]]:
    """Positions of leaves whose copies fit `BATCH_BYTES`; the same on every rank."""
    batch: list[int] = []
    used = 0
    for at, leaf in enumerate(leaves):
        wanted = -(-leaf.n_bytes // team.size)
        if batch and used + wanted > BATCH_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(at)
        used += wanted
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Exchanged:
    """One tensor whose copies lie as a merge needs them."""

    row: Row
    base: Tensor
    target: Tensor
    placements: Placements

    def give_back(self) -> None:
        """Brings the result to the shard it belongs to; collective."""
        if self.row.out is self.target:
            return
        assert self.row.out is not None
        assert isinstance(self.base, DTensor)
        return_to(self.row.out, self.target, self.base, self.placements)


def exchange(one: ShardedLeaf, target: Tensor, team: Communicator, *, ranks_rows: bool) -> Exchanged:
    """Brings base and models to one layout: the base's own, or whole rows where those are ranked; collective.

    Args:
        target: this rank's shard of the result.
    """
    base = one.base
    if not isinstance(base, DTensor):
        models = [brought(model, base, ()) for model in one.models]
        leaf = leaf_of(one.name, base, models)
        return Exchanged(Row(leaf, part_of(base, team.ranks[0], team.rank), target), base, target, ())
    placements = settled(base)
    if ranks_rows and splits_rows(base):
        placements = rows_together(base, placements)
    stays = placements == tuple(base.placements)
    local = local_of(base) if stays else brought(base, base, placements)
    models = [brought(model, base, placements) for model in one.models]
    out = target if stays else torch.empty_like(local)
    part = part_of(as_dtensor(local, base, placements), team.ranks[0], team.rank)
    return Exchanged(Row(leaf_of(one.name, local, models), part, out), base, target, placements)
