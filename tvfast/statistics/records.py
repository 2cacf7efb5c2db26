"""What a statistics file holds: records of sums and counts, and whose model and data they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from tvfast import dtypes
from tvfast.checkpoint.files import damaged, shown
from tvfast.errors import ArgumentError, StatisticsError

SCHEMA = 1
"""Version of the schema in `docs/statistics.md`."""

STORAGE = frozenset({"F64", "F32", "BF16", "F16"})
"""Storage types of sums."""

SAMPLES = "samples"
"""The count that a role divides by unless it names another one."""

RECORD_PREFIX = "record:"
"""Metadata keys of records; the document's is `DOCUMENT_KEY`."""

DOCUMENT_KEY = "tvfast.statistics"

Shape: TypeAlias = tuple[int, ...]
Key: TypeAlias = tuple[str, str]
"""Parameter and kind of a record."""

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Summary:
    """Extremes and sums of the elements of one role, so that a merge can scale them without another read."""

    least: float
    most: float
    l1: float
    squares: float


@dataclass(frozen=True, slots=True)
class Array:
    """Sums of one role.

    Attributes:
        dtype: safetensors name of the storage type, one of `STORAGE`.
        shape: of the array, not of the parameter.
        data: packed elements, little-endian, row-major.
        count: which of the record's counts turns the sums into means.
        concatenate: None: two files' sums are added. An axis: they are put end to end along it, as the
            columns of a square root d x S of which L Lᵀ is the sum.
        summary: of the elements; None: not known. Scores need one.
    """

    dtype: str
    shape: Shape
    data: Buffer
    count: str = SAMPLES
    concatenate: int | None = None
    summary: Summary | None = None

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shared:
    """A role whose sums are stored once, with another parameter of the same kind, as q, k and v share A."""

    parameter: str
    count: str = SAMPLES


@dataclass(frozen=True, slots=True)
class Record:
    """Statistics of one kind of one parameter.

    Attributes:
        parameter: its name in the model.
        kind: what the sums are of, such as "weight", "fisher" or "kfac"; `docs/statistics.md` lists them.
        shape: of the parameter.
        tensors: sums by role: "sum" for what has the parameter's shape; "A" and "B" for factors.
        counts: how many of what went into the sums. Two files' counts add up.
        options: conventions that sums of two files must share to be added: block size, packing, scaling.
    """

    parameter: str
    kind: str
    shape: Shape
    tensors: Mapping[str, Array | Shared]
    counts: Mapping[str, int | float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.parameter, self.kind


@dataclass(frozen=True, slots=True)
class Model:
    """Whose parameters the statistics are of.

    Attributes:
        name: path or id, for people.
        structure: digest of the names and shapes of all parameters; "" if unknown.
        content: digest of their values; "" if it was not asked for.
        dtype: storage type of most parameters.
    """

    name: str = ""
    structure: str = ""
    content: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """What a whole file is about.

    Attributes:
        model: whose statistics these are.
        data: one mapping per data set that went into the sums, as the collector describes it.
        collection: how they were collected: conventions by name. Equal in files that are added.
        state: of an unfinished collection; empty in a finished file.
    """

    model: Model = Model()
    data: tuple[Mapping[str, Any], ...] = ()
    collection: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Role:
    """How a record's metadata describe one role."""

    count: str
    concatenate: int | None
    shared: str | None
    summary: Summary | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A record without its sums.

    Attributes:
        roles: by name. Sums of a shared role lie with the parameter that it names.
    """

    parameter: str
    kind: str
    shape: Shape
    roles: Mapping[str, Role]
    counts: Mapping[str, int | float]
    options: Mapping[str, Any]

    @property
    def key(self) -> Key:
        return self.parameter, self.kind

    def divisor(self, role: str, where: str) -> float:
        """What turns the sums of a role into means.

        Raises:
            StatisticsError: the count is zero: nothing reached this parameter.
        """
        count = self.counts[self.roles[role].count]
        if count <= 0:
            raise StatisticsError(
                f"{where}: parameter {self.parameter!r}: {self.kind} has {count} {self.roles[role].count}; "
                "expected at least one. No data reached this layer; collect on more data, or leave the "
                "parameter out."
            )
        return float(count)

    def summary(self, role: str, where: str) -> Summary:
        """Extremes and sums of a role.

        Raises:
            StatisticsError: they were not stored.
        """
        found = self.roles[role].summary
        if found is None:
            raise StatisticsError(
                f"{where}: parameter {self.parameter!r}: {self.kind} {role!r} has no summary; expected its "
                "extremes and sums, which `array_of(..., summary=True)` stores. Write the file again."
            )
        return found


def tensor_name(parameter: str, kind: str, role: str) -> str:
    """The name of a role's sums in the file."""
    return f"{parameter}:{kind}:{role}"


def record_text(record: Record) -> str:
    """The metadata of a record.

    Raises:
        ArgumentError: a count, shape, role or option that the schema does not take.
    """
    _check_record(record)
    roles: dict[str, dict[str, Any]] = {}
    for role, found in record.tensors.items():
        roles[role] = {"count": found.count}
        if isinstance(found, Shared):
            roles[role]["shared"] = found.parameter
            continue
        if found.concatenate is not None:
            roles[role]["concatenate"] = found.concatenate
        if found.summary is not None:
            roles[role]["summary"] = asdict(found.summary)
    return dumps(
        {
            "parameter": record.parameter,
            "kind": record.kind,
            "shape": list(record.shape),
            "roles": roles,
            "counts": dict(record.counts),
            "options": dict(record.options),
        },
        f"record {record.parameter!r}, {record.kind!r}",
    )


def entry_of(text: str, path: str, key: str) -> Entry:
    """The record that metadata describe.

    Raises:
        StatisticsError: they do not.
    """
    found = _object(text, path, key)
    try:
        roles = {
            name: Role(role["count"], role.get("concatenate"), role.get("shared"), _summary(role))
            for name, role in found["roles"].items()
        }
        entry = Entry(
            found["parameter"],
            found["kind"],
            tuple(found["shape"]),
            MappingProxyType(roles),
            MappingProxyType(found["counts"]),
            MappingProxyType(found["options"]),
        )
    except (KeyError, TypeError, AttributeError):
        raise _bad(path, f"metadata {shown(key)} lack fields of a record") from None
    integers = [*entry.shape, *(role.concatenate for role in roles.values() if role.concatenate is not None)]
    counts = entry.counts.values()
    if (
        not all(isinstance(value, str) for value in (entry.parameter, entry.kind))
        or not all(type(value) is int and value >= 0 for value in integers)
        or not all(type(value) in (int, float) and 0 <= value < math.inf for value in counts)
        or not all(role.count in entry.counts for role in roles.values())
        or not all(role.shared is None or isinstance(role.shared, str) for role in roles.values())
        or not all(_is_plausible(role.summary) for role in roles.values())
        or not roles
    ):
        raise _bad(path, f"metadata {shown(key)} hold a shape, role or count that is none")
    return entry


def _summary(role: Mapping[str, Any]) -> Summary | None:
    return Summary(**role["summary"]) if "summary" in role else None


def _is_plausible(summary: Summary | None) -> bool:
    values = () if summary is None else astuple(summary)
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def document_text(document: Document) -> str:
    """The metadata of a whole file."""
    model = document.model
    return dumps(
        {
            "schema": SCHEMA,
            "model": {
                "name": model.name,
                "structure": model.structure,
                "content": model.content,
                "dtype": model.dtype,
            },
            "data": [dict(item) for item in document.data],
            "collection": dict(document.collection),
            "state": dict(document.state),
        },
        "statistics file",
    )


def document_of(text: str, path: str) -> Document:
    """The document that metadata describe.

    Raises:
        StatisticsError: they do not, or are of a later schema.
    """
    found = _object(text, path, DOCUMENT_KEY)
    schema = found.get("schema")
    if schema != SCHEMA:
        raise StatisticsError(
            f"{path}: has schema {shown(schema)}; expected {SCHEMA}. "
            "Read it with the release of tvfast that wrote it, or collect again."
        )
    model, data = found.get("model"), found.get("data")
    collection, state = found.get("collection"), found.get("state")
    texts = ("name", "structure", "content", "dtype")
    if (
        not isinstance(model, dict)
        or not all(isinstance(model.get(name), str) for name in texts)
        or not isinstance(data, list)
        or not all(isinstance(item, dict) for item in data)
        or not isinstance(collection, dict)
        or not isinstance(state, dict)
    ):
        raise _bad(path, f"metadata {DOCUMENT_KEY!r} lack model, data, collection or state")
    return Document(Model(**{name: model[name] for name in texts}), tuple(data), collection, state)


def dumps(value: Any, where: str) -> str:
    """JSON with one spelling.

    Raises:
        ArgumentError: something that JSON does not have.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{where}: {error}; expected texts, finite numbers, lists and mappings."
        ) from None


def _object(text: str, path: str, key: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _bad(path, f"metadata {shown(key)} are no JSON object")
    return found


def _bad(path: str, found: str) -> StatisticsError:
    return StatisticsError(str(damaged(path, found)))


def _check_record(record: Record) -> None:
    where = f"record {record.parameter!r}, {record.kind!r}"
    if not record.parameter or not record.kind:
        raise ArgumentError(f"{where}: expected the name of a parameter, and a kind.")
    for word in (record.kind, *record.tensors, *record.counts):
        if not word.isidentifier():
            raise ArgumentError(f"{where}: {word!r} is no name of a kind, role or count; expected a word.")
    if not record.tensors:
        raise ArgumentError(f"{where}: has no tensor; expected one role at least.")
    for name, value in record.counts.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ArgumentError(f"{where}: count {name!r} is {value!r}; expected a finite number, 0 or more.")
    for role, found in record.tensors.items():
        if found.count not in record.counts:
            raise ArgumentError(
                f"{where}: role {role!r} divides by {found.count!r}; expected one of its counts: "
                f"{', '.join(record.counts) or 'none is given'}."
            )
        if isinstance(found, Shared):
            continue
        if found.dtype not in STORAGE:
            raise ArgumentError(
                f"{where}: role {role!r} has storage type {found.dtype!r}; expected one of "
                f"{', '.join(sorted(STORAGE))}."
            )
        expected = dtypes.n_bytes(found.dtype, found.n_elements)
        n_bytes = memoryview(found.data).nbytes
        if n_bytes != expected:
            raise ArgumentError(
                f"{where}: role {role!r} has {n_bytes} bytes; expected {expected} for {found.dtype} of shape "
                f"{list(found.shape)}."
            )
        if found.concatenate is not None and not 0 <= found.concatenate < len(found.shape):
            raise ArgumentError(
                f"{where}: role {role!r} is put end to end along axis {found.concatenate}; expected an axis "
                f"of shape {list(found.shape)}."
            )
