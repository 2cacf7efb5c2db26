"""From leaves and their parts to a logical work table, and the backend that answers for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tvfast._leaves import Leaf
from tvfast._scores import LeafScores
from tvfast.methods import ProgramMethod
from tvfast.methods.base import share_groups
from tvfast.ops._views import view
from tvfast.ops.raw import backend_for
from tvfast.program import Entry, View, WorkTable
from tvfast.sharded.backend import LocalTable, ShardedBackend, part_of_view
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.shards import Part


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a merge on this rank: its shards, where they lie, and where the result goes."""

    leaf: Leaf
    part: Part
    out: Tensor | None
    scores: LeafScores = field(default_factory=LeafScores)


def sharded_tables(
    method: ProgramMethod, rows: Sequence[Row], team: Communicator, *, task_vectors: bool = False
) -> Iterator[tuple[WorkTable, ShardedBackend]]:
    """One logical table per kind of device and arithmetic, on every rank the same ones."""
    from tvfast.merging import check_devices

    logical: dict[tuple[torch.device, bool], list[Entry]] = {}
    own: dict[tuple[torch.device, bool], list[tuple[Entry, Part]]] = {}
    double = any(row.leaf.float64 for row in rows)
    for row in rows:
        if row.part.n_elements == 0:
            continue
        entry = _local(method, row, task_vectors)
        together = method.group_of(row.leaf.name) is not None
        key = (torch.device(row.leaf.base.device.type), double if together else row.leaf.float64)
        logical.setdefault(key, []).append(_logical(entry, row.part))
        own.setdefault(key, []).append((entry, row.part))
    check_devices(method, logical)
    for key, entries in logical.items():
        share_groups(method, entries)
        yield _table(entries, own[key], key[1], team)


def table_of(
    pairs: Sequence[tuple[Entry, Part]], double: bool, team: Communicator
) -> tuple[WorkTable, ShardedBackend]:
    """A table of this rank's entries, each tensor by itself."""
    entries = [_logical(entry, part) for entry, part in pairs]
    for group, entry in enumerate(entries):
        entry.group = group
    return _table(entries, pairs, double, team)


def _table(
    entries: list[Entry], own: Sequence[tuple[Entry, Part]], double: bool, team: Communicator
) -> tuple[WorkTable, ShardedBackend]:
    from tvfast.merging import float64_backend

    n_models = len(entries[0].models)
    local = LocalTable(WorkTable([], n_models), [], [], [], double, list(own))
    for place, (logical, (entry, part)) in enumerate(zip(entries, own, strict=True)):
        local.whole.append(part.whole)
        for piece in part.pieces:
            start, stop = piece.start, piece.start + piece.n_elements
            local.table.entries.append(
                Entry(
                    name=entry.name,
                    models=_cut(entry.models, start, stop),
                    base=None if entry.base is None else part_of_view(entry.base, start, stop),
                    out=None if entry.out is None else part_of_view(entry.out, start, stop),
                    scores=_cut(entry.scores, start, stop),
                    score_maps=entry.score_maps,
                    score_summaries=entry.score_summaries,
                    row=logical.row,
                    offset=piece.offset,
                    run=piece.run,
                    run_step=piece.run_step,
                    group=logical.group,
                    group_offset=logical.group_offset,
                    task_vectors=entry.task_vectors,
                )
            )
            local.rows.append(place)
            local.counted.append(part.counted)
    inner = float64_backend() if double else backend_for(local.table)
    return WorkTable(entries, n_models), ShardedBackend(inner, local, team)


def _local(method: ProgramMethod, row: Row, task_vectors: bool) -> Entry:
    leaf = row.leaf
    operand, operands = method.operands(leaf.base_view, leaf.model_views)
    out = row.out
    return Entry(
        name=leaf.name,
        models=operands,
        base=operand,
        out=None
        if out is None
        else leaf.base_view
        if out is leaf.base
        else view(out, leaf.name, "out", float64=True),
        row=method.row_elements(row.part.shape),
        scores=method.score_operands(row.scores.views),
        score_summaries=method.score_operands(row.scores.summaries),
        task_vectors=task_vectors,
    )


def _logical(entry: Entry, part: Part) -> Entry:
    """The entry of the whole tensor: lengths without addresses."""

    def whole(view: View) -> View:
        return View(0, part.n_elements, view.dtype)

    return Entry(
        name=entry.name,
        models=tuple(map(whole, entry.models)),
        base=None if entry.base is None else whole(entry.base),
        scores=tuple(map(whole, entry.scores)),
        score_maps=entry.score_maps,
        score_summaries=entry.score_summaries,
        row=entry.row,
        task_vectors=entry.task_vectors,
    )


def _cut(views: Sequence[View], start: int, stop: int) -> tuple[View, ...]:
    return tuple(part_of_view(view, start, stop) for view in views)
