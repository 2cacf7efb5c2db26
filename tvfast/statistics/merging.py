"""Adds up statistics files of one model: sums with sums, counts with counts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvfast.errors import ArgumentError, StatisticsError
from tvfast.statistics.reading import StatisticsFile, open_statistics
from tvfast.statistics.records import Array, Document, Entry, Key, Model, Record, Role, Shared
from tvfast.statistics.writing import StatisticsWriter


def merge_statistics(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """One file with the sums and counts of several, as if all of their data had been collected in one run.

    Args:
        paths: two files or more, of one model, of the same records and conventions.
        out: the new file; may be one of `paths`.

    Raises:
        StatisticsError: a file is missing or damaged, or files differ in model, records or conventions.
        ArgumentError: fewer than two files.
        OutputError: `out` cannot be written.

    Notes:
        One record of every file is in memory at a time. Sums are added in the order of the files, in float64
        for float64 and in float32 otherwise, and rounded once to their storage type.
    """
    if len(paths) < 2:
        raise ArgumentError(f"merge_statistics got {len(paths)} files; expected two at least.")
    files = [open_statistics(path) for path in paths]
    first = files[0]
    for other in files[1:]:
        _check_same(first, other)
    data = tuple(item for file in files for item in file.document.data)
    document = Document(_model(files), data, first.document.collection)
    with StatisticsWriter(out, document, n_records=len(first.entries)) as writer:
        for key, entry in first.entries.items():
            entries = [file.entries[key] for file in files]
            tensors = {role: _merged(files, key, role) for role in entry.roles}
            counts = {name: sum(found.counts[name] for found in entries) for name in entry.counts}
            writer.add(Record(entry.parameter, entry.kind, entry.shape, tensors, counts, entry.options))


def _merged(files: Sequence[StatisticsFile], key: Key, role: str) -> Array | Shared:
    found = files[0].entries[key].roles[role]
    if found.shared is not None:
        return Shared(found.shared, found.count)
    from tvfast.statistics.tensors import added, concatenated

    arrays = [file.read_role(*key, role) for file in files]
    return added(arrays) if found.concatenate is None else concatenated(arrays, found.concatenate)


def _model(files: Sequence[StatisticsFile]) -> Model:
    """The model of all files; digests that only some of them have are kept."""
    models = [file.document.model for file in files]

    def known(name: str) -> str:
        return next((value for model in models if (value := str(getattr(model, name)))), "")

    return Model(known("name"), known("structure"), known("content"), known("dtype"))


def _check_same(first: StatisticsFile, other: StatisticsFile) -> None:
    for name in ("structure", "content"):
        mine, theirs = getattr(first.document.model, name), getattr(other.document.model, name)
        if mine and theirs and mine != theirs:
            raise StatisticsError(
                f"{other.path}: is of a model with another {name} than that of {first.path} "
                f"({other.document.model.name or '?'} and {first.document.model.name or '?'}); expected "
                "statistics of one model."
            )
    _check_equal(first, other, first.document.collection, other.document.collection, "collection")
    if different := sorted(first.entries.keys() ^ other.entries.keys()):
        parameter, kind = different[0]
        holder = first if different[0] in first.entries else other
        raise StatisticsError(
            f"{holder.path}: has {kind} of parameter {parameter!r}, the other of {first.path} and "
            f"{other.path} has not; expected the same records ({len(different)} differ)."
        )
    for key, entry in first.entries.items():
        theirs = other.entries[key]
        where = f"parameter {entry.parameter!r}: {entry.kind}"
        _check_equal(first, other, entry.options, theirs.options, where)
        shapes = [_shapes(file, key) for file in (first, other)]
        if (
            entry.shape != theirs.shape
            or _conventions(entry) != _conventions(theirs)
            or entry.counts.keys() != theirs.counts.keys()
            or shapes[0] != shapes[1]
        ):
            raise StatisticsError(
                f"{other.path}: {where} has shape {list(theirs.shape)}, roles {shapes[1]} and counts "
                f"{', '.join(theirs.counts)}; {first.path} has shape {list(entry.shape)}, roles {shapes[0]} "
                f"and counts {', '.join(entry.counts)}. Expected the same ones."
            )


def _conventions(entry: Entry) -> dict[str, Role]:
    """Roles without what depends on the data."""
    return {name: replace(role, summary=None) for name, role in entry.roles.items()}


def _shapes(file: StatisticsFile, key: Key) -> dict[str, tuple[int | None, ...]]:
    """Shapes by role; None along the axis that files may differ in."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    for name, role in file.entries[key].roles.items():
        shape: list[int | None] = list(file.place(*key, name).shape)
        if role.concatenate is not None:
            shape[role.concatenate] = None
        shapes[name] = tuple(shape)
    return shapes


def _check_equal(
    first: StatisticsFile,
    other: StatisticsFile,
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    where: str,
) -> None:
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            raise StatisticsError(
                f"{other.path}: {where}: {name} is {theirs.get(name)!r}, in {first.path} {mine.get(name)!r}; "
                "expected one convention. Sums of different ones cannot be added."
            )
