"""Tensors in pieces: elements are read from the boxes that hold them, straight to where they belong."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tvfast import dtypes
from tvfast.checkpoint.stored import Piece, Stored
from tvfast.errors import MergeError

_PIECE_BYTES = 4 * 2**20
_MOST_RUNS = 1024  # of one system call

Borrow = Callable[[str], AbstractContextManager[int]]
"""Lends the descriptor of a file, open for buffered reading."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """Elements [start, start + n) of a tensor in pieces, and where in a block they go."""

    stored: Stored
    start: int
    n: int
    at: int

    @property
    def n_bytes(self) -> int:
        return dtypes.n_bytes(self.stored.dtype, self.n)

    def pieces(self) -> Iterator[Assembly]:
        """The same in reads of about 4 MiB."""
        item = dtypes.n_bytes(self.stored.dtype, 1)
        step = _PIECE_BYTES // item
        for first in range(0, self.n, step):
            n = min(step, self.n - first)
            yield Assembly(self.stored, self.start + first, n, self.at + first * item)

    def fill(self, view: memoryview, borrow: Borrow) -> None:
        """Read all of it.

        Args:
            view: of the block.

        Raises:
            MergeError: a file ends early, or cannot be read.
        """
        for piece in self.stored.pieces:
            batches = _batches(self, piece)
            first = next(batches, None)
            if first is None:
                continue
            with borrow(piece.path) as descriptor:
                _read(descriptor, piece.path, *first, view)
                for offset, runs in batches:
                    _read(descriptor, piece.path, offset, runs, view)


def _batches(wanted: Assembly, piece: Piece) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(offset in the file, [(position in the block, bytes)]) of runs that follow each other in the file."""
    item = dtypes.n_bytes(wanted.stored.dtype, 1)
    offset, reached, runs = 0, -1, list[tuple[int, int]]()
    for first, n, within in _runs(wanted.stored.shape, piece, wanted.start, wanted.start + wanted.n):
        place = piece.offset + within * item
        if runs and (place != reached or len(runs) == _MOST_RUNS):
            yield offset, runs
            runs = []
        if not runs:
            offset = place
        runs.append((wanted.at + (first - wanted.start) * item, n * item))
        reached = place + n * item
    if runs:
        yield offset, runs


def _runs(shape: tuple[int, ...], piece: Piece, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Elements of [begin, end) that a box holds: (first, how many, position in the box) in order."""
    partial = [k for k, (size, extent) in enumerate(zip(piece.sizes, shape, strict=True)) if size != extent]
    last = partial[-1] if partial else 0  # dimensions behind it are whole, so that rows of it are contiguous
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    length = math.prod(piece.sizes[last:])
    outer, origin = piece.sizes[:last], sum(s * d for s, d in zip(piece.starts, strides, strict=True))

    def first_of(number: int) -> int:
        found = origin
        for k in range(last - 1, -1, -1):
            number, index = divmod(number, outer[k])
            found += index * strides[k]
        return found

    numbers = range(math.prod(outer))
    for number in numbers[max(0, bisect_right(numbers, begin, key=first_of) - 1) :]:
        first = first_of(number)
        if first >= end:
            return
        low, high = max(first, begin), min(first + length, end)
        if low < high:
            yield low, high - low, number * length + low - first


def _read(descriptor: int, path: str, offset: int, runs: list[tuple[int, int]], view: memoryview) -> None:
    views = [view[at : at + n_bytes] for at, n_bytes in runs]
    while views:
        try:
            n_read = os.preadv(descriptor, views, offset)
        except OSError as error:
            raise MergeError(
                f"{path}: reading at byte {offset} failed ({error.strerror}). What is merged so far is kept: "
                "restore the file and run again with --resume."
            ) from error
        if not n_read:
            raise MergeError(
                f"{path}: ends at byte {offset}, expected more. What is merged so far is kept: restore the "
                "file and run again with --resume."
            )
        offset += n_read
        while views and n_read >= len(views[0]):
            n_read -= len(views.pop(0))
        if views:
            views[0] = views[0][n_read:]
