"""Moments of the task vectors of weights with DTensors, for `compare`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from tvfast._leaves import Weights, model_list
from tvfast.errors import ArgumentError
from tvfast.ops._check import threads
from tvfast.ops.raw import Wants
from tvfast.program import Entry, ModelScalars, Moments, Program, TensorScalars
from tvfast.sharded.agreement import agreement_of
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.exchange import batches, exchange
from tvfast.sharded.layouts import local_of
from tvfast.sharded.leaves import ShardedLeaf, sharded_leaves
from tvfast.sharded.tables import Row, table_of


def measure(
    base: Weights, models: Iterable[Weights], wants: Wants, *, n_threads: int, redistribute: bool
) -> tuple[dict[str, int], dict[str, Moments]]:
    """By name of each leaf how many elements it has, and the moments of its task vectors, over all ranks."""
    with agreement_of(base, models) as said:
        threads(n_threads)
        found = model_list(models)
        if not found:
            raise ArgumentError("models is empty; expected at least one model.")
        said.add("the call", f"compare of {len(found)} models, redistribute={redistribute}")
        leaves = sharded_leaves(base, found, said, redistribute=redistribute)
    scalars = TensorScalars(models=[ModelScalars() for _ in found])
    moments = {one.name: Moments.empty(len(found)) for one in leaves}
    with said.team.telling(), torch.no_grad():
        for rows in _rows(leaves, said.team):
            for double in (False, True):
                own = [row for row in rows if row.leaf.float64 is double and row.part.n_elements > 0]
                if not own:
                    continue
                pairs = [
                    (
                        Entry(name=row.leaf.name, models=row.leaf.model_views, base=row.leaf.base_view),
                        row.part,
                    )
                    for row in own
                ]
                table, backend = table_of(pairs, double, said.team)
                answers = backend.measure(table, Program(), [scalars] * len(own), wants, n_threads)
                moments.update(zip((row.leaf.name for row in own), answers, strict=True))
    return {one.name: one.base.numel() for one in leaves}, moments


def _rows(leaves: Sequence[ShardedLeaf], team: Communicator) -> Iterator[list[Row]]:
    """Tensors that are merged where they lie, then batches of those that are not."""
    yield [Row(one.leaf, one.part, None) for one in leaves if one.leaf is not None and one.part is not None]
    moving = [one for one in leaves if one.leaf is None]
    for batch in batches(moving, team):
        found = (moving[at] for at in batch)
        yield [exchange(one, local_of(one.base), team, ranks_rows=False).row for one in found]
