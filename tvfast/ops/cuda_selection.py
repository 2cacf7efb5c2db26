"""Adapter to the selection of the CUDA kernels: ranks, counts and positions of keys, and trimming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tvfast.errors import ArgumentError
from tvfast.ops._native import check_outputs, check_ranked, check_ranks, program_tuple
from tvfast.ops.cuda_memory import Home, Resident, device_of, native_of
from tvfast.program import Keep, Program, RankQuery, TensorScalars, Threshold, Tie, WorkTable


class Outcome(IntEnum):
    """How a tensor of a trimmed merge was merged; twin of `csrc/cuda/select_plan.hpp`."""

    PROVED = 0  # with guesses, which the same pass proved right: its inputs were read once
    UNGUESSED = 1  # with thresholds that a pass before found: no guess was likely enough
    WRONG = 2  # with both, because a guess was wrong


@dataclass(frozen=True, slots=True)
class Trimmed:
    """A merge whose bands are thresholds of its own table, ready to run as often as the data change.

    `guesses`: tensors whose thresholds a sample can guess are merged while the guesses are checked, and
    again where one was wrong. The result has the same bits.
    """

    module: ModuleType
    program: tuple[int, ...]
    table: Resident
    scalars: Resident
    queries: Resident
    equals: Resident | None
    workspaces: tuple[Tensor, Tensor]
    guesses: bool
    n_entries: int
    home: Home
    place: Callable[[], tuple[int, int]]

    def run(self) -> None:
        """Thresholds, bands and merge: a fixed number of launches on the current stream.

        Nothing is allocated and nothing waits for the device, so a CUDA graph can capture it.
        """
        of_ties = () if self.equals is None else self.equals.alive
        made = (*self.table.alive, *self.scalars.alive, *self.queries.alive, *of_ties)
        self.home.share((*made, *self.workspaces))
        self.module.combine_trimmed(
            self.table.native,
            self.program,
            self.scalars.native,
            self.queries.native,
            self.workspaces[0].data_ptr(),
            None if self.equals is None else self.equals.native,
            self.workspaces[1].data_ptr(),
            self.guesses,
            *self.place(),
        )

    def outcomes(self) -> list[Outcome]:
        """How each tensor was merged in the last run; waits for the device."""
        if not self.guesses:
            return [Outcome.UNGUESSED] * self.n_entries
        found = self.module.read_outcomes(self.queries.native, self.workspaces[0].data_ptr(), *self.place())
        return list(map(Outcome, found))


class CudaSelection:
    """The verbs of the CUDA kernels that rank keys."""

    _module: ModuleType
    limits: tuple[int, int, int]
    """Of a selection: a group taken as a whole, keys collected at a time, queries of a batch."""

    def _place(self, device: torch.device) -> tuple[int, int]:
        raise NotImplementedError

    def _table(self, table: WorkTable) -> Resident:
        raise NotImplementedError

    def _scalars(self, scalars: Sequence[TensorScalars], part: WorkTable) -> Resident:
        raise NotImplementedError

    def _resident(self, native: Any, device: torch.device, alive: Sequence[Tensor] = ()) -> Resident:
        raise NotImplementedError

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        """Exact k-th largest keys.

        Raises:
            ArgumentError: k is not in [1, number of entries of the group].
        """
        if not queries:
            return []
        asked = self._asked(table, keep, queries)
        found = self._answers(table, asked, "thresholds", "read_thresholds")
        return [Threshold(*answer) for answer in found]

    def nth_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float, int]],
        n_threads: int = 0,
    ) -> list[int]:
        """Group positions of the r-th entries whose key equals a value.

        Raises:
            ArgumentError: fewer than r + 1 entries equal the value.
        """
        check_ranked(keep)
        if not queries:
            return []
        asked = self._module.ResidentEquals(native_of(self._module, table), int(keep), list(queries), False)
        found = self._answers(table, asked, "nth_equal", "read_positions")
        for (group, model, value, r), (position, number) in zip(queries, found, strict=True):
            if position < 0:
                raise ArgumentError(
                    f"group {group}, model {model}: {number} entries equal {value}; "
                    f"expected more than r = {r}."
                )
        return [position for position, _ in found]

    def count_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float]],
        n_threads: int = 0,
    ) -> list[list[int]]:
        """[entry][query] keys of `(group, model, value)` that equal the value; 0 in other groups."""
        check_ranked(keep)
        n = len(queries)
        if n == 0 or not table.entries:
            return [[0] * n for _ in table.entries]
        asked = [(*query, 0) for query in queries]
        packed = self._module.ResidentEquals(native_of(self._module, table), int(keep), asked, True)
        counts = self._answers(table, packed, "count_equal", "read_equals")
        return [counts[e * n : (e + 1) * n] for e in range(len(table.entries))]

    def verify(
        self, table: WorkTable, queries: Sequence[tuple[int, int, float]], n_threads: int = 0
    ) -> list[Threshold]:
        """How many magnitudes of `(group, model, value)` are greater than the value, and equal to it."""
        if not queries:
            return []
        packed = self._module.ResidentQueries(native_of(self._module, table), list(queries))
        return [Threshold(*answer) for answer in self._answers(table, packed, "verify", "read_counts")]

    def _asked(self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery]) -> Any:
        """Rank queries packed for the device."""
        check_ranked(keep)
        check_ranks(table, queries)
        asked = [(query.group, query.model, query.k) for query in queries]
        return self._module.ResidentQueries(native_of(self._module, table), int(keep), asked, self.limits)

    def _answers(self, table: WorkTable, queries: Any, verb: str, read: str) -> list[Any]:
        """Runs a verb over the table and waits for its answers."""
        device = device_of(table)
        place = self._place(device)
        resident, own = self._table(table), self._resident(queries, device)
        workspace = torch.empty(own.native.n_workspace, dtype=torch.uint8, device=device)
        getattr(self._module, verb)(resident.native, own.native, workspace.data_ptr(), *place)
        return list(getattr(self._module, read)(own.native, workspace.data_ptr(), *place))

    def combine_trimmed(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        queries: Sequence[RankQuery],
    ) -> None:
        """`combine` with lower ends at the k-th largest keys, ties resolved so that k survive.

        The same bits as `thresholds` followed by `combine`, without waiting for the device in between.

        Raises:
            ArgumentError: as `trimmed`.
        """
        if table.entries:
            self.trimmed(table, program, scalars, queries).run()

    def trimmed(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        queries: Sequence[RankQuery],
    ) -> Trimmed:
        """A merge of a table with entries that trims each queried (group, model) to its k largest keys.

        `scalars` give everything but the bands of what is queried; with `Keep.VARIANCE` a query of model 0
        is for all models. Workspace is 4 bytes for each collected key, a few of a thousand entries, and 16
        KiB for a query.

        Raises:
            ArgumentError: the keep stage does not rank, a k is out of range, two queries are for one
                (group, model), or an entry has no output.
        """
        check_outputs(table)
        asked = self._asked(table, program.keep, queries)
        if len({(query.group, query.model) for query in queries}) < len(queries):
            raise ArgumentError("two queries are for one group and model; expected one lower end for each.")
        device = device_of(table)
        owned = self._resident(asked, device)
        equals = None
        if program.tie is Tie.INDEX:
            equals = self._resident(
                self._module.equals_of(native_of(self._module, table), owned.native), device
            )
        sizes = (owned.native.n_workspace, 0 if equals is None else equals.native.n_workspace)
        first, second = (torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)
        resident = self._scalars(scalars, table)
        guesses = program.keep is Keep.BAND and self._module.can_guess(
            native_of(self._module, table), program_tuple(program), resident.native
        )
        return Trimmed(
            module=self._module,
            program=program_tuple(program),
            table=self._table(table),
            scalars=resident,
            queries=owned,
            equals=equals,
            workspaces=(first, second),
            guesses=guesses,
            n_entries=len(table.entries),
            home=Home(device),
            place=lambda: self._place(device),
        )
