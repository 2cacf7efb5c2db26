"""Reads a statistics file: the header at once, sums record by record."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tvfast.checkpoint.files import open_regular
from tvfast.checkpoint.header import Header, read_header
from tvfast.checkpoint.stored import Stored
from tvfast.errors import CheckpointError, StatisticsError
from tvfast.statistics.records import (
    DOCUMENT_KEY,
    RECORD_PREFIX,
    STORAGE,
    Array,
    Document,
    Entry,
    Key,
    Record,
    Shape,
    Shared,
    document_of,
    entry_of,
    tensor_name,
)

_SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True)
class StatisticsFile:
    """A statistics file whose header has been checked. No sum has been read.

    Attributes:
        path: as given.
        document: model, data and conventions.
        entries: records without their sums, in file order.
        stored: where the sums lie, by their name in the file.
        header: what the file declares.
    """

    path: str
    document: Document
    entries: Mapping[Key, Entry]
    stored: Mapping[str, Stored]
    header: Header

    def identity(self) -> list[dict[str, Any]]:
        """What tells that the file has changed, as `Checkpoint.identity` does: without its path."""
        header = self.header
        return [
            {
                "name": os.path.basename(header.path),
                "size": header.n_bytes,
                "mtime_ns": header.mtime_ns,
                "crc32": header.crc32,
            }
        ]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is in the file."""
        return tuple(dict.fromkeys(kind for _, kind in self.entries))

    def parameters(self, kind: str) -> list[str]:
        """Parameters with a record of a kind, in file order."""
        return [parameter for parameter, found in self.entries if found == kind]

    def entry(self, parameter: str, kind: str, shape: Shape | None = None) -> Entry:
        """A record without its sums.

        Args:
            shape: of the parameter in the model at hand; None: not compared.

        Raises:
            StatisticsError: there is none, or of a parameter of another shape.
        """
        found = self.entries.get((parameter, kind))
        if found is None:
            raise self._missing(parameter, kind)
        if shape is not None and found.shape != tuple(shape):
            raise StatisticsError(
                f"{self.path}: parameter {parameter!r} has shape {list(found.shape)}, the model's has "
                f"{list(shape)}; expected equal ones. These are the statistics of another model"
                f"{f' ({self.document.model.name})' if self.document.model.name else ''}."
            )
        return found

    def place(self, parameter: str, kind: str, role: str) -> Stored:
        """Where the sums of a role lie, with the parameter that shares them if it has none itself.

        Raises:
            StatisticsError: no such record or role.
        """
        entry = self.entry(parameter, kind)
        if role not in entry.roles:
            raise StatisticsError(
                f"{self.path}: parameter {parameter!r}: {kind} has no {role!r}; it has "
                f"{', '.join(entry.roles)}."
            )
        return self.stored[tensor_name(entry.roles[role].shared or parameter, kind, role)]

    def divisor(self, parameter: str, kind: str, role: str) -> float:
        """What turns the sums of a role into means.

        Raises:
            StatisticsError: no such record, or its count is zero.
        """
        return self.entry(parameter, kind).divisor(role, self.path)

    def norm(self, kind: str, role: str) -> float:
        """‖·‖₂ of the means of all parameters with a record of a kind; those that no data reached have none.

        Raises:
            StatisticsError: a record has no summary.
        """
        squares = []
        for entry in self.entries.values():
            count = entry.counts[entry.roles[role].count] if entry.kind == kind else 0
            if count:
                squares.append(entry.summary(role, self.path).squares / count**2)
        return math.sqrt(math.fsum(squares))

    def read(self, parameter: str, kind: str) -> Record:
        """A record with its sums; those of shared roles are read too, and not marked as shared.

        Raises:
            StatisticsError: no such record, or the file cannot be read.
        """
        return self._read(self.entry(parameter, kind), follow=True)

    def read_role(self, parameter: str, kind: str, role: str) -> Array:
        """The sums of one role.

        Raises:
            StatisticsError: no such record or role, or the file cannot be read.
        """
        stored = self.place(parameter, kind, role)
        found = self.entries[(parameter, kind)].roles[role]
        owner = self.entries[(found.shared or parameter, kind)].roles[role]
        data = self._bytes(stored)
        return Array(stored.dtype, stored.shape, data, found.count, owner.concatenate, owner.summary)

    def records(self) -> Iterator[Record]:
        """Every record as it was written, one in memory at a time."""
        for entry in self.entries.values():
            yield self._read(entry, follow=False)

    def _read(self, entry: Entry, *, follow: bool) -> Record:
        tensors: dict[str, Array | Shared] = {}
        for name, role in entry.roles.items():
            if role.shared is not None and not follow:
                tensors[name] = Shared(role.shared, role.count)
                continue
            tensors[name] = self.read_role(entry.parameter, entry.kind, name)
        return Record(entry.parameter, entry.kind, entry.shape, tensors, entry.counts, entry.options)

    def _bytes(self, stored: Stored) -> bytes:
        try:
            with open_regular(self.path) as file:
                if (file.n_bytes, file.mtime_ns) != (self.header.n_bytes, self.header.mtime_ns):
                    raise StatisticsError(
                        f"{self.path}: changed since it was opened; expected a file at rest. Open it again."
                    )
                return file.read(stored.n_bytes, stored.offset)
        except StatisticsError:
            raise
        except CheckpointError as error:
            raise StatisticsError(str(error)) from None

    def _missing(self, parameter: str, kind: str) -> StatisticsError:
        if kind not in self.kinds:
            found = ", ".join(self.kinds) or "nothing"
            return StatisticsError(
                f"{self.path}: holds {found}; expected {kind}. Collect it, or name another file."
            )
        known = self.parameters(kind)
        names = ", ".join(map(repr, known[:_SHOWN])) + (", ..." if len(known) > _SHOWN else "")
        return StatisticsError(
            f"{self.path}: has no {kind} of parameter {parameter!r}; it has {len(known)}: {names}. "
            "These are the statistics of another model, or of some of its layers; collect the missing ones."
        )


def open_statistics(path: str | os.PathLike[str], *, unfinished: bool = False) -> StatisticsFile:
    """The statistics file at `path`, with its header validated.

    Args:
        unfinished: takes the state of a collection that has not ended, too.

    Raises:
        StatisticsError: missing, damaged, no statistics file, or unfinished.

    Notes:
        No sum is read: about 10 us a record.
    """
    given = os.fspath(path)
    try:
        header = read_header(given)
    except StatisticsError:
        raise
    except CheckpointError as error:
        raise StatisticsError(str(error)) from None
    text = header.metadata.get(DOCUMENT_KEY)
    if text is None:
        raise StatisticsError(
            f"{given}: is a safetensors file without statistics; expected one that `tvfast collect` wrote."
        )
    document = document_of(text, given)
    if document.state and not unfinished:
        raise StatisticsError(
            f"{given}: is the state of a collection that has not ended; expected a finished file. "
            "Resume the collection."
        )
    stored = {tensor.name: tensor for tensor in header.tensors}
    entries = [
        entry_of(text, given, key) for key, text in header.metadata.items() if key.startswith(RECORD_PREFIX)
    ]
    by_key = {entry.key: entry for entry in entries}
    places = {key: min(_offsets(entry, stored), default=0) for key, entry in by_key.items()}
    _check_tensors(given, by_key, stored)
    ordered = {key: by_key[key] for key in sorted(by_key, key=lambda key: (places[key], key))}
    return StatisticsFile(given, document, ordered, stored, header)


def _offsets(entry: Entry, stored: Mapping[str, Stored]) -> Iterator[int]:
    for name in entry.roles:
        found = stored.get(tensor_name(entry.parameter, entry.kind, name))
        if found is not None:
            yield found.offset


def _check_tensors(path: str, entries: Mapping[Key, Entry], stored: Mapping[str, Stored]) -> None:
    """Raise unless every role has its tensor, and every tensor its record."""
    claimed = set()
    for entry in entries.values():
        for name, role in entry.roles.items():
            wanted = tensor_name(role.shared or entry.parameter, entry.kind, name)
            found = stored.get(wanted)
            if found is None or found.dtype not in STORAGE:
                has = f"of type {found.dtype}" if found else "not there"
                raise StatisticsError(
                    f"{path}: tensor {wanted!r} is {has}; expected sums of type "
                    f"{', '.join(sorted(STORAGE))}. The file is damaged; collect again."
                )
            if role.shared is None:
                claimed.add(wanted)
    if unclaimed := sorted(set(stored) - claimed):
        raise StatisticsError(
            f"{path}: tensor {unclaimed[0]!r} belongs to no record; expected one for every tensor. "
            "The file is damaged; collect again."
        )
