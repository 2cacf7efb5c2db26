"""Curvature of parameters: what a record of a statistics file holds, as factors divided by their counts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, StatisticsError
from tvfast.factors.forms import Blocks, Dense, Diagonal, Factor, Root, block_shapes, unpack
from tvfast.statistics import (
    Array,
    Document,
    Record,
    Shared,
    StatisticsFile,
    StatisticsWriter,
    StoredForm,
    open_statistics,
)
from tvfast.statistics.tensors import check_finite, tensor_of

KFAC, BLOCK = "kfac", "block"
"""Kinds of records: Kronecker factors of a matrix, a full block of a vector."""

SAMPLES, TOKENS, DRAWS, TOKEN_DRAWS = "samples", "tokens", "draws", "token_draws"
"""Counts: samples, their tokens, and both times the probes of each sample."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature of one parameter: a Kronecker product, or a full block of a vector.

    Attributes:
        parameter: its name.
        shape: of the parameter.
        a: A, second moment of the layer's inputs; with a bias column, its last row and column. None: a
        vector.
        b: B, second moment of the gradients at the layer's outputs; None: the identity, it was not collected.
        block: F, second moment of a vector's gradients; None: a matrix.
        bias: the parameter that the last column belongs to; None: there is no such column.
        transposed: the parameter is [i, o], and X its transpose.
        n_samples: that went into it.
    """

    parameter: str
    shape: tuple[int, ...]
    a: Factor | None
    b: Factor | None
    block: Factor | None
    bias: str | None
    transposed: bool
    n_samples: float

    @property
    def n_in(self) -> int:
        """i, the inputs of the layer, without a bias column."""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def n_out(self) -> int:
        """o, the outputs of the layer."""
        return self.shape[1] if self.transposed else self.shape[0]

    def matrix(self, parameter: Tensor) -> Tensor:
        """A tensor of the parameter's shape as X [o, i], or as a row [1, n] for a vector; a view."""
        if self.block is not None:
            return parameter.reshape(1, -1)
        return parameter.T if self.transposed else parameter

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Those that there are."""
        return tuple(f for f in (self.a, self.b, self.block) if f is not None)

    def without_bias(self) -> Curvature:
        """Without the bias column: merges take biases by themselves."""
        if self.bias is None or self.a is None:
            return self
        return self.replaced(a=self.a.leading(self.n_in), bias=None)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Curvature:
        """On a device, in a dtype."""
        a, b, block = (None if f is None else f.to(device, dtype) for f in (self.a, self.b, self.block))
        return self.replaced(a=a, b=b, block=block)

    def replaced(self, **changes: Any) -> Curvature:
        """A copy with other fields."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Curvature(**{**found, **changes})


class Statistics(Mapping[str, Curvature]):
    """Curvature by name of parameter, read when it is asked for; from a file, or from memory.

    Attributes:
        document: whose model and data.
        path: of the file; None: in memory.
        left_out: what was not collected, with the reason.
        kinds: of each parameter's record, `KFAC` or `BLOCK`.
    """

    def __init__(
        self,
        source: StatisticsFile | Mapping[tuple[str, str], Record],
        document: Document,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self._source = source
        self.document = document
        self.left_out = left_out
        self.path = source.path if isinstance(source, StatisticsFile) else None
        keys = source.entries if isinstance(source, StatisticsFile) else source
        self.kinds = {parameter: kind for parameter, kind in keys if kind in (KFAC, BLOCK)}

    def __getitem__(self, parameter: str) -> Curvature:
        return self.read(parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def read(self, parameter: str, dtype: torch.dtype = torch.float32) -> Curvature:
        """The curvature of a parameter, with factors in a dtype.

        Raises:
            KeyError: there is none.
            StatisticsError: NaN or infinity, or a count of zero.
        """
        where = self.path or "statistics"
        return curvature_of(self._record(parameter, self.kinds[parameter]), where, dtype)

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Of a parameter, as its statistics have it; reads no sums."""
        key = parameter, self.kinds[parameter]
        found = self._source.entries[key] if isinstance(self._source, StatisticsFile) else self._source[key]
        return tuple(found.shape)

    @property
    def file(self) -> StatisticsFile | None:
        """Where they are read from; None: in memory."""
        return self._source if isinstance(self._source, StatisticsFile) else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a statistics file.

        Raises:
            OutputError: it cannot be written.
        """
        with StatisticsWriter(path, self.document, n_records=len(self.kinds)) as writer:
            records = (
                self._source.records() if isinstance(self._source, StatisticsFile) else self._source.values()
            )
            for record in records:
                writer.add(record)

    def _record(self, parameter: str, kind: str) -> Record:
        if isinstance(self._source, StatisticsFile):
            return self._source.read(parameter, kind)
        record = self._source[parameter, kind]
        tensors = {
            role: self._owned(kind, role, found) if isinstance(found, Shared) else found
            for role, found in record.tensors.items()
        }
        return Record(parameter, kind, record.shape, tensors, record.counts, record.options)

    def _owned(self, kind: str, role: str, shared: Shared) -> Array:
        assert not isinstance(self._source, StatisticsFile)
        owner = self._source[shared.parameter, kind].tensors[role]
        assert isinstance(owner, Array)
        return Array(owner.dtype, owner.shape, owner.data, shared.count, owner.concatenate)


def load(path: str | os.PathLike[str]) -> Statistics:
    """The curvature in a statistics file, read parameter by parameter.

    Raises:
        StatisticsError: no such file, damaged, or without Kronecker factors.
    """
    file = open_statistics(path)
    found = Statistics(file, file.document)
    if not found:
        kinds = ", ".join(file.kinds) or "nothing"
        raise StatisticsError(
            f"{file.path}: holds {kinds}; expected Kronecker factors. Collect them with "
            "tvfast.curvature.collect."
        )
    return found


def curvature_of(record: Record, where: str, dtype: torch.dtype = torch.float32) -> Curvature:
    """What a record with its sums says, divided by its counts.

    Raises:
        StatisticsError: NaN, infinity, a count of zero, or sums that do not fit the record.
    """
    place = f"{where}: parameter {record.parameter!r}"
    factors = {role: _factor(record, role, place, dtype) for role in record.tensors}
    if record.kind == BLOCK:
        factors = {"block": factors["F"]}
    options = record.options
    found = Curvature(
        parameter=record.parameter,
        shape=record.shape,
        a=factors.get("A"),
        b=factors.get("B"),
        block=factors.get("block"),
        bias=options.get("bias"),
        transposed=bool(options.get("transposed", False)),
        n_samples=float(record.counts[SAMPLES]),
    )
    expected = (
        {"block": math.prod(record.shape)}
        if found.block is not None
        else {"a": found.n_in + (found.bias is not None), "b": found.n_out}
    )
    for role, size in expected.items():
        factor = getattr(found, role)
        if factor is not None and factor.size != size:
            raise StatisticsError(
                f"{place}: {role.upper()} has side {factor.size}; expected {size} for a shape of "
                f"{list(record.shape)}. The file is damaged; collect it again."
            )
    return found


def _factor(record: Record, role: str, place: str, dtype: torch.dtype) -> Factor:
    array = record.tensors[role]
    assert isinstance(array, Array)
    count = record.counts[array.count]
    if count <= 0:
        raise StatisticsError(
            f"{place}: {role} has {count} {array.count}; expected at least one. No data reached this layer; "
            "collect on more data, or leave the parameter out."
        )
    sums = tensor_of(array, dtype)
    check_finite(sums, f"{place}: {role}")
    form = StoredForm.of(record.options, role, place)
    if not form.holds(array.shape):
        raise StatisticsError(
            f"{place}: {role} has shape {list(array.shape)}, which holds no {form.name} matrix of side "
            f"{form.size}. The file is damaged; collect it again."
        )
    match form.name:
        case "dense":
            return Dense(unpack(sums, form.size).div_(count))
        case "diagonal":
            return Diagonal(sums.div_(count))
        case "block":
            return _blocks(sums.div_(count), form.size, form.block)
    return Root(sums.div_(count**0.5))


def _blocks(packed: Tensor, size: int, block: int) -> Blocks:
    whole, rest = block_shapes(size, block)
    triangle = block * (block + 1) // 2
    cut = whole[0] * triangle
    return Blocks(unpack(packed[:cut].reshape(whole[0], triangle), block), unpack(packed[cut:], rest[0]))


Source = Statistics | Mapping[str, Curvature] | str | os.PathLike[str]
"""Statistics, or the path of a file with them."""


def statistics_of(source: Source, role: str = "stats") -> Mapping[str, Curvature]:
    """Statistics, opened where a path was given.

    Raises:
        StatisticsError: no statistics file.
        ArgumentError: something else.
    """
    if isinstance(source, str | os.PathLike):
        return load(source)
    if not isinstance(source, Mapping):
        raise ArgumentError(
            f"{role} is a {type(source).__name__}; expected statistics of tvfast.curvature.collect, or "
            "their path."
        )
    return source
