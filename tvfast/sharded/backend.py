"""A backend over tables whose tensors are spread over ranks: elements stay where they are.

Questions are answered from the local shards and small reductions, with the bits that one process holding
everything would find: counts are integers, sums do not depend on order, thresholds are exact, and draws and
ties know the place of an element in its whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from torch import Tensor

from tvfast.errors import BackendError
from tvfast.ops.raw import Backend, ExportingAccumulation, PartitioningBackend, Wants
from tvfast.program import (
    Entry,
    Keep,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    View,
    WorkTable,
    reads_index,
)
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.keys import LocalKeys
from tvfast.sharded.selection import nth_equal, select
from tvfast.sharded.shards import Part
from tvfast.sharded.sums import totals

_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")

_FOLLOW_RUNS = ("cpp", "reference")
"""Backends that read `Entry.run`; others are given an entry for each run."""


@dataclass(slots=True)
class LocalTable:
    """What this rank holds of a logical table.

    Attributes:
        table: pieces of shards; empty ones are not there.
        rows: the logical entry of each of them.
        counted: whether this rank speaks for it among its replicas.
        whole: of each logical entry, whether every rank has all of it.
        double: whether arithmetic is float64.
        tensors: of each logical entry this rank's shard, uncut, and where it lies.
    """

    table: WorkTable
    rows: list[int]
    counted: list[bool]
    whole: list[bool]
    double: bool
    tensors: list[tuple[Entry, Part]]

    def only(self, places: Sequence[int]) -> tuple[WorkTable, list[int]]:
        """A table of some of the pieces, and their rows."""
        entries = [self.table.entries[place] for place in places]
        return WorkTable(entries, self.table.n_models), [self.rows[place] for place in places]


def _telling(
    question: Callable[Concatenate[ShardedBackend, _Given], _Answer],
) -> Callable[Concatenate[ShardedBackend, _Given], _Answer]:
    """A question that fails on one rank ends the call on all."""

    @wraps(question)
    def telling(self: ShardedBackend, /, *given: _Given.args, **named: _Given.kwargs) -> _Answer:
        with self.team.telling():
            return question(self, *given, **named)

    return telling


@dataclass(slots=True)
class ShardedBackend:
    """`Backend` over one logical table, whose views have lengths but no addresses.

    Args:
        inner: what processes the pieces.
        local: the pieces.
        team: the ranks that hold the others.
    """

    inner: Backend
    local: LocalTable
    team: Communicator
    name: str = field(init=False, default="sharded")

    def why_not(self, table: WorkTable) -> str | None:
        return self.inner.why_not(self.local.table)

    @_telling
    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        self._follow(table)
        spread = self._spread_groups(table)
        sizes = _group_sizes(table)
        answers: dict[RankQuery, Threshold] = {}
        here = [query for query in queries if not spread[query.group]]
        if here:
            found = self.inner.thresholds(self.local.table, keep, here, n_threads)
            answers.update(zip(here, found, strict=True))
        there = [query for query in dict.fromkeys(queries) if spread[query.group]]
        if there:
            answers.update(
                zip(there, select(self.team, self._keys(keep, n_threads), there, sizes), strict=True)
            )
        return [answers[query] for query in queries]

    @_telling
    def nth_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float, int]],
        n_threads: int = 0,
    ) -> list[int]:
        self._follow(table)
        spread = self._spread_groups(table)
        answers: dict[tuple[int, int, float, int], int] = {}
        here = [query for query in queries if not spread[query[0]]]
        if here:
            found = self.inner.nth_equal(self.local.table, keep, here, n_threads)
            answers.update(zip(here, found, strict=True))
        there = [query for query in queries if spread[query[0]]]
        places = nth_equal(self.team, self._keys(keep, n_threads), there, _group_sizes(table))
        answers.update(zip(there, places, strict=True))
        return [answers[query] for query in queries]

    @_telling
    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        self._follow(table)
        sums = self._accumulation(len(table.entries), table.n_models)
        counts = zip(self.local.rows, self.local.counted, strict=True)
        places = [at for at, (row, counted) in enumerate(counts) if counted or self.local.whole[row]]
        part, rows = self._indexed(*self.local.only(places), program)
        if rows:
            sums.measure(part, rows, program, [scalars[row] for row in rows], wants, n_threads)
        spread = [row for row, whole in enumerate(self.local.whole) if not whole]
        moments = sums.finish()
        if spread:
            found = totals(sums.states(), spread, table.n_models, self.team, wants)
            for row, total in zip(spread, found, strict=True):
                moments[row] = total
        return moments

    def row_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """
        Raises:
            BackendError: always; the entries of the table have no memory whose bits a plane could tell.
        """
        raise BackendError(
            "bit planes were asked of a table that is spread over ranks; expected `TableStatistics` without "
            "`new_plane`, so that every pass evaluates the keep stage."
        )

    @_telling
    def combine(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        self._follow(table)
        part, rows = self._indexed(self.local.table, self.local.rows, program)
        if rows:
            self.inner.combine(part, program, [scalars[row] for row in rows], n_threads)

    def _follow(self, table: WorkTable) -> None:
        """Gives the pieces what a method has set of its tensors meanwhile."""
        for entry, row in zip(self.local.table.entries, self.local.rows, strict=True):
            if entry.score_maps != table.entries[row].score_maps:
                entry.score_maps = table.entries[row].score_maps
                self.local.table.cache.clear()

    def _keys(self, keep: Keep, n_threads: int) -> LocalKeys:
        places = [at for at, counted in enumerate(self.local.counted) if counted]
        part, _ = self.local.only(places)
        return LocalKeys(self.inner, part, keep, self.local.double, n_threads)

    def _accumulation(self, n_entries: int, n_models: int) -> ExportingAccumulation:
        if isinstance(self.inner, PartitioningBackend) and not self.local.double:
            return self.inner.accumulate(n_entries, n_models)
        from tvfast.sharded.accumulating import TorchAccumulation

        return TorchAccumulation(n_entries, n_models, double=self.local.double)

    def _spread_groups(self, table: WorkTable) -> list[bool]:
        """Of each group, whether some rank lacks a part of it."""
        spread = [False] * table.n_groups
        for entry, whole in zip(table.entries, self.local.whole, strict=True):
            spread[entry.group] = spread[entry.group] or not whole
        return spread

    def _indexed(self, table: WorkTable, rows: list[int], program: Program) -> tuple[WorkTable, list[int]]:
        """The table for a program, an entry for each run where the backend needs it."""
        if self.inner.name in _FOLLOW_RUNS or not reads_index(program):
            return table, rows
        if not any(entry.run for entry in table.entries):
            return table, rows
        pairs = [
            (part, row) for entry, row in zip(table.entries, rows, strict=True) for part in _runs_of(entry)
        ]
        return WorkTable([part for part, _ in pairs], table.n_models), [row for _, row in pairs]


def _group_sizes(table: WorkTable) -> list[int]:
    sizes = [0] * table.n_groups
    for entry in table.entries:
        sizes[entry.group] += entry.n_elements
    return sizes


def _runs_of(entry: Entry) -> Iterator[Entry]:
    """An entry for each run of one."""
    if not entry.run:
        yield entry
        return
    for start in range(0, entry.n_elements, entry.run):
        stop = min(start + entry.run, entry.n_elements)
        yield replace(
            entry,
            models=tuple(part_of_view(view, start, stop) for view in entry.models),
            base=None if entry.base is None else part_of_view(entry.base, start, stop),
            out=None if entry.out is None else part_of_view(entry.out, start, stop),
            scores=tuple(part_of_view(view, start, stop) for view in entry.scores),
            offset=entry.index_of(start),
            run=0,
            run_step=0,
        )


def part_of_view(view: View, start: int, stop: int) -> View:
    """Elements [start, stop) of a view."""
    owner: Tensor = view.owner
    if (start, stop) == (0, view.n_elements):
        return view
    part = owner.detach().view(-1)[start:stop]
    return View(part.data_ptr(), stop - start, view.dtype, part)
