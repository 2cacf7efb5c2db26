"""The state of a long collection on disk: finished groups of layers, and the sums of the one at work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from tvfast.errors import ArgumentError, StatisticsError
from tvfast.factors.records import Statistics, load
from tvfast.statistics import Document, Record, StatisticsFile, StatisticsWriter, open_statistics
from tvfast.statistics.tensors import array_of, read_sum

if TYPE_CHECKING:
    from tvfast.curvature.sums import Sum
    from tvfast.curvature.tracking import Tracker

_STATE = "state"


@dataclass(frozen=True)
class Settings:
    """What a run writes, and how often.

    Attributes:
        path: of the result; None: in memory.
        every: batches between two states; 0: none.
        said: whatever must be equal for one run to continue another.
    """

    document: Document
    path: str | None
    storage: str
    every: int
    resume: bool
    said: Mapping[str, Any]

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 0:
            raise ArgumentError(f"checkpoint_every is {self.every!r}; expected a number of batches, or 0.")
        if self.path is None and (self.every or self.resume):
            raise ArgumentError("checkpoint_every and resume need a path; expected one.")


@dataclass(frozen=True)
class Begin:
    """Where a run begins."""

    group: int


@dataclass
class Checkpoint:
    """Reads and writes the state beside the result: `PATH.state` and `PATH.group-K`."""

    settings: Settings
    n_samples: int = 0
    _state: StatisticsFile | None = None
    _finished: list[str] = field(default_factory=list)
    _records: list[Record] = field(default_factory=list)

    def open(self) -> Begin:
        """Find what an earlier run left.

        Raises:
            StatisticsError: it was another collection.
        """
        if not self.settings.resume:
            return Begin(0)
        while os.path.exists(self._group_path(len(self._finished))):
            path = self._group_path(len(self._finished))
            self._check(open_statistics(path, unfinished=True))
            self._finished.append(path)
        group = len(self._finished)
        if os.path.exists(self._state_path):
            found = open_statistics(self._state_path, unfinished=True)
            self._check(found)
            if found.document.state["group"] == group:
                self._state = found
        return Begin(group)

    def restore(self, sums: Mapping[str, Sum], members: Sequence[Tracker]) -> int:
        """Put the state's sums and counts in place; the number of batches that they hold."""
        if self._state is None:
            return 0
        state = self._state.document.state
        for name, found in sums.items():
            roles = self._state.entry(name, _STATE).roles
            found.restore({role: read_sum(self._state, name, _STATE, role, torch.float64) for role in roles})
        for tracker in members:
            tracker.counts.update(state["counts"][tracker.name])
        self.n_samples = int(state["samples"])
        return int(state["batches"])

    def due(self, n_batches: int) -> bool:
        """Whether a state is to be saved."""
        return self.settings.every > 0 and n_batches % self.settings.every == 0

    def save(
        self, sums: Mapping[str, Sum], members: Sequence[Tracker], group: int, n_batches: int, n_samples: int
    ) -> None:
        """Write the state of the group at work; the earlier one stays until it is whole.

        Raises:
            StatisticsError: sums are not finite.
            OutputError: it cannot be written.
        """
        state = {
            **self._said(group),
            "batches": n_batches,
            "samples": n_samples,
            "counts": {tracker.name: tracker.counts for tracker in members},
        }
        with StatisticsWriter(self._state_path, replace(self.settings.document, state=state)) as writer:
            for name, found in sums.items():
                tensors = {
                    role: array_of(tensor, f"sums {name!r}", dtype="F64")
                    for role, tensor in found.state().items()
                }
                writer.add(Record(name, _STATE, (found.size,), tensors, {"samples": n_samples}))

    def finish_group(self, group: int, records: list[Record]) -> None:
        """Keep the records of a finished group."""
        if not self.settings.every:
            self._records += records
            return
        path = self._group_path(group)
        document = replace(self.settings.document, state=self._said(group))
        with StatisticsWriter(path, document, n_records=len(records)) as writer:
            for record in records:
                writer.add(record)
        self._finished.append(path)
        self._state = None

    def finish(self, left_out: tuple[str, ...]) -> Statistics:
        """The result of all groups, and nothing beside it."""
        document = self.settings.document
        if self.settings.path is None:
            return Statistics({record.key: record for record in self._records}, document, left_out)
        with StatisticsWriter(self.settings.path, document, n_records=len(self._records)) as writer:
            for path in self._finished:
                for record in open_statistics(path, unfinished=True).records():
                    writer.add(record)
            for record in self._records:
                writer.add(record)
        for path in (*self._finished, self._state_path):
            if os.path.exists(path):
                os.remove(path)
        found = load(self.settings.path)
        found.left_out = left_out
        return found

    @property
    def _state_path(self) -> str:
        return f"{self.settings.path}.state"

    def _group_path(self, group: int) -> str:
        return f"{self.settings.path}.group-{group}"

    def _said(self, group: int) -> dict[str, Any]:
        return {"group": group, "settings": dict(self.settings.said)}

    def _check(self, found: StatisticsFile) -> None:
        document, mine = found.document, self.settings.document
        same = (document.model, document.collection, document.data) == (
            mine.model,
            mine.collection,
            mine.data,
        )
        if not same or document.state.get("settings") != dict(self.settings.said):
            raise StatisticsError(
                f"{found.path}: is the state of a collection with another model, data or settings; expected "
                "this one's. Remove it to begin anew, or call with the same arguments."
            )
