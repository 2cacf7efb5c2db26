"""Tensors by token whose rows are gathered from those of models with other vocabularies."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from tvfast.checkpoint.stored import Stored
from tvfast.errors import CheckpointError
from tvfast.ops.host import CONSTANT_ROW, MEAN_ROW

WINDOW_BYTES = 4 * 2**20
"""Of all sources together, gathered by one call."""


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """Which rows make up the matrices of some models after their vocabularies are aligned.

    Attributes:
        rows: [model][new row] its row in the model's file; -1: the model has none, so it takes `fill`.
        fill: [new row] position of the model whose row it is, `ZERO_ROW`, `MEAN_ROW` (of the models that
            have one), or `CONSTANT_ROW` - k for the k-th constant.
        constants: (position of a model, row in its file): rows that stand for other tokens.
        n_tokens: rows before the padding, which is the mean of them.
    """

    rows: tuple[array[int], ...]
    fill: array[int]
    constants: tuple[tuple[int, int], ...]
    n_tokens: int

    @property
    def n_rows(self) -> int:
        return len(self.fill)

    @property
    def is_padded(self) -> bool:
        return self.n_rows > self.n_tokens

    @property
    def is_computed(self) -> bool:
        """Whether some rows are means, which the models' storage types may not hold."""
        return self.is_padded or MEAN_ROW in self.fill

    @property
    def n_bytes(self) -> int:
        return sum(len(part) * part.itemsize for part in (*self.rows, self.fill))

    @property
    def is_identity(self) -> bool:
        """Whether every model has every row at its place."""
        first = array("i", range(self.n_rows))
        return all(part == first for part in self.rows)

    def digest(self) -> str:
        """Equal for equal maps."""
        found = hashlib.sha256(repr((self.constants, self.n_tokens)).encode())
        for part in (*self.rows, self.fill):
            found.update(part.tobytes())
        return found.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """The inputs of one task, and how their rows are found.

    Attributes:
        sources: matrices as the files have them, in the order of the models.
        dtype: safetensors name of the new matrices' storage type.
        map: one entry of `rows` per source.
        inputs: of each source, which of the task's inputs it is.
    """

    sources: tuple[Stored, ...]
    dtype: str
    map: RowMap
    inputs: tuple[int, ...]

    def __post_init__(self) -> None:
        for stored in self.sources:
            if stored.pieces:
                raise CheckpointError(
                    f"{stored.path}: tensor {stored.name!r} is in {len(stored.pieces)} pieces; expected "
                    "one where rows are taken by token. Merge this checkpoint by passthrough into "
                    "safetensors first."
                )

    @property
    def row(self) -> int:
        """Elements of a row."""
        shape = self.sources[0].shape
        return self.sources[0].n_elements // shape[0]

    @property
    def n_constants(self) -> int:
        """Constant rows of each source: those of the map, and its padding."""
        return len(self.map.constants) + self.map.is_padded

    @property
    def sampled_bytes(self) -> int:
        """What is read of the sources before any row of the result: the mean needs all of them."""
        return sum(stored.n_bytes for stored in self.sources) if self.map.is_padded else 0

    def aligned(self) -> tuple[Stored, ...]:
        """The sources as the task sees them: not what is in the files, but as large as it will be."""
        return tuple(
            Stored(
                stored.name,
                stored.path,
                stored.offset,
                self.map.n_rows * self.row * _BYTES[self.dtype],
                self.dtype,
                (self.map.n_rows, *stored.shape[1:]),
            )
            for stored in self.sources
        )


@dataclass(frozen=True, slots=True)
class Window:
    """Elements [start, start + n) of gathered matrices, and where in a block each of them goes."""

    gather: Gather
    start: int
    n: int
    at: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Of the results."""
        return len(self.at) * self.n * _BYTES[self.gather.dtype]

    def pieces(self) -> Iterator[Window]:
        """The same in windows of about `WINDOW_BYTES`, each of whole rows but for its ends."""
        gather, size = self.gather, _BYTES[self.gather.dtype]
        n_rows = max(1, WINDOW_BYTES // (len(self.at) * size * gather.row))
        start, end = self.start, self.start + self.n
        while start < end:
            stop = min(end, (start // gather.row + n_rows) * gather.row)
            at = tuple(at + (start - self.start) * size for at in self.at)
            yield Window(gather, start, stop - start, at)
            start = stop


def padding_row(row_map: RowMap) -> int:
    """What `fill` has for padding."""
    return CONSTANT_ROW - len(row_map.constants)


_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
