"""Where sums go while they are collected: a file for each finished group, one for what is unfinished."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tvfast.errors import ArgumentError, StatisticsError
from tvfast.statistics import Document, Record, StatisticsFile, StatisticsWriter, open_statistics
from tvfast.statistics.tensors import array_of, read_sum

STORED = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}
ROLE = "sum"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a collection is.

    Attributes:
        group, n_groups: the pass that is on, counted from 0, and how many there are.
        n_batches, n_samples: of this pass.
    """

    group: int
    n_groups: int
    n_batches: int
    n_samples: int


class Parts:
    """Sums of one group at a time, and the files of a collection.

    Args:
        path: of the statistics file; None: means are kept in memory.
        document: what the finished file is about.
        dtype: of stored sums, as in `STORED`.
        resume: go on with what lies beside `path`; otherwise it is removed.
        every: batches after which unfinished sums are saved; 0: never.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        document: Document,
        kind: str,
        dtype: str,
        *,
        resume: bool,
        every: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        if dtype not in STORED:
            raise ArgumentError(f"collect: dtype is {dtype!r}; expected one of {', '.join(STORED)}.")
        if path is None and (resume or every):
            raise ArgumentError("collect: resume and checkpoint_every need a path to save to.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ArgumentError(f"collect: checkpoint_every is {every!r}; expected an integer, 0 or more.")
        self._path = None if path is None else os.fspath(path)
        self._document, self._kind, self._dtype = document, kind, STORED[dtype]
        self._resume, self._every, self._progress = resume, every, progress
        self._means: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._group = self._n_groups = 0
        self.n_batches_done = 0
        self.n_samples = 0
        if self._path is not None and not resume:
            self._remove_parts()

    def is_done(self, group: int, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether an earlier run has finished a group.

        Raises:
            StatisticsError: what lies there is of other arguments, or of another model.
        """
        if self._path is None or not self._resume or not os.path.exists(self._part(group)):
            return False
        self._check(open_statistics(self._part(group)), self._document, parameters)
        return True

    def begin(self, group: int, n_groups: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Sums of a group, zero, or those that an earlier run has saved; added to in place by the caller."""
        self._group, self._n_groups = group, n_groups
        self.n_batches_done = self.n_samples = 0
        wide = {
            n: torch.float64 if p.dtype == torch.float64 else torch.float32 for n, p in parameters.items()
        }
        self._sums = {n: torch.zeros(p.shape, dtype=wide[n], device=p.device) for n, p in parameters.items()}
        if self._resume and self._path is not None and os.path.exists(self._state):
            self._load(parameters)
        return self._sums

    def advance(self, n_samples: int) -> None:
        """One more batch is in the sums."""
        self.n_batches_done += 1
        self.n_samples += n_samples
        if self._every and self.n_batches_done % self._every == 0:
            self._write(self._state, self._unfinished(), exact=True)
        if self._progress is not None:
            self._progress(Progress(self._group, self._n_groups, self.n_batches_done, self.n_samples))

    def end(self) -> None:
        """All batches of the group are in its sums.

        Raises:
            StatisticsError: there were none, or a sum is not finite.
        """
        if not self.n_samples:
            raise StatisticsError("collect: no sample came; expected one batch at least. Look at the data.")
        if self._path is None:
            for name, total in self._sums.items():
                array_of(total, f"parameter {name!r}: {self._kind}")  # raises where it is not finite
                self._means[name] = (total / self.n_samples).to(torch.float32)
        else:
            self._write(self._part(self._group), self._document, exact=False)
            if os.path.exists(self._state):
                os.remove(self._state)
        self._sums = {}

    def finish(self) -> StatisticsFile | dict[str, Tensor]:
        """Put the parts together."""
        if self._path is None:
            return self._means
        parts = [open_statistics(self._part(group)) for group in range(self._count_parts())]
        if len(parts) == 1:
            os.replace(parts[0].path, self._path)
        else:
            with StatisticsWriter(
                self._path, self._document, n_records=sum(len(p.entries) for p in parts)
            ) as out:
                for part in parts:
                    for record in part.records():
                        out.add(record)
            self._remove_parts()
        return open_statistics(self._path)

    # -- files ------------------------------------------------------------------------------------------

    @property
    def _state(self) -> str:
        return f"{self._path}.state"

    def _part(self, group: int) -> str:
        return f"{self._path}.part{group}"

    def _count_parts(self) -> int:
        n = 0
        while os.path.exists(self._part(n)):
            n += 1
        return n

    def _remove_parts(self) -> None:
        for path in (self._state, *(self._part(group) for group in range(self._count_parts()))):
            if os.path.exists(path):
                os.remove(path)

    def _unfinished(self) -> Document:
        state = {"group": self._group, "batches": self.n_batches_done, "samples": self.n_samples}
        return replace(self._document, state=state)

    def _write(self, path: str, document: Document, *, exact: bool) -> None:
        with StatisticsWriter(path, document, n_records=len(self._sums)) as writer:
            for name, total in self._sums.items():
                where = f"parameter {name!r}: {self._kind}"
                array = array_of(total, where, dtype=None if exact else self._dtype, summary=not exact)
                shape = tuple(total.shape)
                writer.add(Record(name, self._kind, shape, {ROLE: array}, {"samples": self.n_samples}))

    def _load(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sums of an unfinished group, if it is this one."""
        file = open_statistics(self._state, unfinished=True)
        state = file.document.state
        if state.get("group") != self._group:
            return
        self._check(file, replace(self._document, state=state), parameters)
        for name, total in self._sums.items():
            total.copy_(read_sum(file, name, self._kind, ROLE, dtype=None))
        self.n_batches_done, self.n_samples = int(state["batches"]), int(state["samples"])

    def _check(
        self, file: StatisticsFile, expected: Document, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Raise unless a saved file is of this collection."""
        for what in ("model", "data", "collection"):
            found, wanted = getattr(file.document, what), getattr(expected, what)
            if found != wanted:
                raise StatisticsError(
                    f"{file.path}: is of a collection with {what} {found}; this one has {wanted}. Expected "
                    "a run of the same arguments; give another path, or do not resume."
                )
        names = set(file.parameters(self._kind))
        if names != set(parameters):
            different = sorted(names ^ set(parameters))
            raise StatisticsError(
                f"{file.path}: holds other parameters than this collection: {different[0]!r} and "
                f"{len(different) - 1} more differ. Expected a run of the same arguments; give another "
                "path, or do not resume."
            )
