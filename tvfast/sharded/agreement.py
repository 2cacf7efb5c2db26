"""One check before anything is written: every rank does the same, or every rank raises the same error."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tvfast import errors
from tvfast.errors import ArgumentError, TvfastError
from tvfast.sharded.communicator import Communicator, communicator_of
from tvfast.sharded.layouts import team_meshes
from tvfast.sharded.notes import TOKEN_BYTES
from tvfast.statistics import StatisticsFile

_DIGEST_BYTES = 32
_OTHER_ERROR = TvfastError


@dataclass(slots=True)
class Description:
    """What has to be equal on every rank of a team: a line for each choice and each tensor."""

    team: Communicator
    lines: list[str] = field(default_factory=list)

    def add(self, topic: str, value: object) -> None:
        self.lines.append(f"{topic}: {value}")

    def digest(self) -> bytes:
        return hashlib.blake2b("\n".join(self.lines).encode(), digest_size=_DIGEST_BYTES).digest()


def file_in_words(file: StatisticsFile) -> str:
    """What tells statistics files apart, wherever each rank has its own copy."""
    return f"a statistics file of {file.header.n_bytes} bytes, header {file.header.crc32:08x}"


def agreement_of(*weights: Any) -> AbstractContextManager[Description]:
    """`agreement` of the ranks on whose meshes the tensors lie."""
    return agreement(communicator_of(team_meshes(*weights)))


@contextmanager
def agreement(team: Communicator) -> Iterator[Description]:
    """Runs the checks of a call, then compares the descriptions of all ranks: one gather of 41 bytes each.

    A rank whose checks fail says so instead, so that no other waits for it. The last 8 bytes, drawn by one
    rank, name the place where a rank leaves a note that fails after this.

    Raises:
        TvfastError: the first failing rank's error, of its class, on every rank.
        ArgumentError: ranks differ; the first difference is named on every rank.
    """
    description = Description(team)
    failure: Exception | None = None
    try:
        yield description
    except Exception as error:
        failure = error
        description.lines = [f"error: {type(error).__name__}: {error}"]
    message = bytes([failure is not None]) + description.digest()
    token = os.urandom(TOKEN_BYTES)
    said = team.gather(torch.tensor(list(message + token), dtype=torch.uint8))
    team.note.agree(bytes(said[0, len(message) :].tolist()))
    said = said[:, : len(message)]
    alike = bool((said == said[0]).all())
    if alike and failure is None:
        return
    if alike and failure is not None:
        raise failure
    others = team.gather_objects(
        (team.rank, type(failure).__name__ if failure else "", str(failure), description.lines)
    )
    others.sort(key=lambda item: item[0])
    for rank, kind, text, _ in others:
        if kind:
            if rank == team.rank and failure is not None:
                raise failure
            raise _class_of(kind)(f"rank {rank}: {text}") from failure
    raise ArgumentError(_difference([(rank, lines) for rank, _, _, lines in others]))


def _class_of(name: str) -> type[TvfastError]:
    found = getattr(errors, name, _OTHER_ERROR)
    return found if isinstance(found, type) and issubclass(found, TvfastError) else _OTHER_ERROR


def _difference(said: list[tuple[int, list[str]]]) -> str:
    """The first line that is not the same on every rank."""
    first_rank, first = said[0]
    for rank, lines in said[1:]:
        for mine, theirs in zip(first, lines, strict=False):
            if mine != theirs:
                topic, _, here = mine.partition(": ")
                other_topic, _, there = theirs.partition(": ")
                if topic != other_topic:
                    here, there, topic = mine, theirs, "what to merge"
                return (
                    f"ranks do not agree on {topic}: rank {first_rank} has {here}, rank {rank} has {there}; "
                    "expected every rank to make the same call."
                )
        if len(first) != len(lines):
            longer, more = (first_rank, first) if len(first) > len(lines) else (rank, lines)
            return (
                f"ranks do not agree on what to merge: rank {longer} alone has "
                f"{more[min(len(first), len(lines))]}; expected every rank to make the same call."
            )
    return "ranks do not agree; expected every rank to make the same call."
