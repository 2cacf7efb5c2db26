"""Gathers rows of files into blocks: what is the same for all windows of a task is found once."""

from __future__ import annotations

import errno
import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from tvfast.checkpoint.stored import Stored
from tvfast.engine.gather import Gather, RowMap, Window
from tvfast.engine.shown import Allowance, Borrow, Matrices, Standing
from tvfast.errors import MergeError
from tvfast.ops.host import ZERO_ROW, RowSource, add_rows, gather_rows
from tvfast.program import DType


class Gatherer:
    """The matrices of one task.

    Args:
        gather: which rows.
        borrow: opens its files.
        ahead: ask the system to read whole matrices at once: rows come in no order.
        allowance: for matrices that stand in memory instead, if the page cache holds them.
    """

    def __init__(self, gather: Gather, borrow: Borrow, *, ahead: bool, allowance: Allowance) -> None:
        self._gather = gather
        self._borrow = borrow
        self._ahead = ahead
        self._lock = threading.Lock()
        self._constants: list[array[Any]] | None = None
        self._matrices = Matrices(gather.sources, borrow, allowance)

    def fill(self, window: Window, address: int) -> None:
        """Fill a window of the block at `address`.

        Raises:
            MergeError: a file cannot be read.
        """
        gather = self._gather
        outs = [address + at for at in window.at]
        with self._matrices.standing() as matrices:
            constants = [part.buffer_info()[0] for part in self._prepared(matrices)]
            self._call(matrices, window.start, window.n, outs, constants, DType[gather.dtype])

    def close(self) -> None:
        """Nothing is filled any more."""
        self._matrices.close()

    # -- constants --------------------------------------------------------------------------------------

    def _prepared(self, matrices: Sequence[Standing | None]) -> list[array[Any]]:
        """Rows of each source that stand for several rows of the result; made by who needs them first."""
        with self._lock:
            if self._constants is None:
                if self._ahead:
                    self._read_ahead(matrices)
                self._constants = self._made(matrices)
            return self._constants

    def _read_ahead(self, matrices: Sequence[Standing | None]) -> None:
        for stored, matrix in zip(self._gather.sources, matrices, strict=True):
            if matrix is not None:
                continue
            with self._borrow(stored.path) as descriptor:
                os.posix_fadvise(descriptor, stored.offset, stored.n_bytes, os.POSIX_FADV_WILLNEED)

    def _made(self, matrices: Sequence[Standing | None]) -> list[array[Any]]:
        """Every source has the same constants but for its own padding, in the storage type of the result."""
        gather = self._gather
        rows = [self._row_of(k, row) for k, row in gather.map.constants]
        shared = b"".join(rows)
        code = "f" if gather.dtype == "F32" else "h"
        made = [array(code, shared) for _ in gather.sources]
        if gather.map.is_padded:
            for constants, mean in zip(made, self._means(matrices, made), strict=True):
                constants.extend(mean)
        return made

    def _row_of(self, k: int, row: int) -> bytes:
        """One row of a source, in the storage type of the result."""
        gather = self._gather
        alone = Gather((gather.sources[k],), gather.dtype, _single_row(row), (0,))
        out = array("f" if gather.dtype == "F32" else "h", [0]) * gather.row
        gatherer = Gatherer(alone, self._borrow, ahead=False, allowance=Allowance(0))
        gatherer.fill(Window(alone, 0, gather.row, (0,)), out.buffer_info()[0])
        return out.tobytes()

    def _means(
        self, matrices: Sequence[Standing | None], constants: Sequence[array[Any]]
    ) -> Iterator[array[Any]]:
        """The mean of the rows before the padding, of every source: exact sums of rows in their order."""
        gather = self._gather
        n, row = gather.map.n_tokens, gather.row
        sums = [array("d", [0.0]) * row for _ in gather.sources]
        known = [part.buffer_info()[0] for part in constants]
        whole = Window(gather, 0, n * row, (0,) * len(sums))
        for piece in whole.pieces():
            parts = [array("f", [0.0]) * piece.n for _ in sums]
            outs = [part.buffer_info()[0] for part in parts]
            self._call(matrices, piece.start, piece.n, outs, known, DType.F32)
            for out, total in zip(outs, sums, strict=True):
                add_rows(out, piece.n // row, row, total.buffer_info()[0])
        return (array("f", (value / n for value in total)) for total in sums)

    # -- files ------------------------------------------------------------------------------------------

    def _call(
        self,
        matrices: Sequence[Standing | None],
        start: int,
        n: int,
        outs: Sequence[int],
        constants: Sequence[int],
        dtype: DType,
    ) -> None:
        """
        Raises:
            MergeError: a file cannot be read.
        """
        sources, row_map = self._gather.sources, self._gather.map
        with ExitStack() as stack:
            described = [
                RowSource(
                    descriptor=stack.enter_context(self._borrow(stored.path)),
                    offset=stored.offset,
                    stored=DType[stored.dtype],
                    rows=rows.buffer_info()[0],
                    constants=constant,
                    out=out,
                    shown=matrix.address if matrix else 0,
                )
                for stored, matrix, rows, constant, out in zip(
                    sources, matrices, row_map.rows, constants, outs, strict=True
                )
            ]
            try:
                gather_rows(described, row_map.fill.buffer_info()[0], dtype, self._gather.row, start, n)
            except OSError as error:
                path = sources[int(error.filename)].path
                raise MergeError(
                    f"{path}: reading rows failed ({os.strerror(error.errno or errno.EIO)}). {_AGAIN}"
                ) from error
            except EOFError as error:
                k, at = error.args
                raise MergeError(
                    f"{sources[k].path}: ends at byte {at}, in the middle of a row. {_AGAIN}"
                ) from error
            for stored, source, matrix in zip(sources, described, matrices, strict=True):
                if matrix is not None:
                    _check_end(stored, source.descriptor)
                    if matrix.lost:
                        raise MergeError(f"{stored.path}: rows of it cannot be read any more. {_AGAIN}")


def _check_end(stored: Stored, descriptor: int) -> None:
    """Raise if a file ends before a matrix that was taken from memory, where zeros stand for the rest.

    Raises:
        MergeError: it was shortened.
    """
    end = os.fstat(descriptor).st_size
    if end < stored.offset + stored.n_bytes:
        raise MergeError(f"{stored.path}: ends at byte {end}, in the middle of a row. {_AGAIN}")


def _single_row(row: int) -> RowMap:
    return RowMap((array("i", [row]),), array("i", [ZERO_ROW]), (), 1)


_AGAIN = "What is merged so far is kept: restore the file and run again with --resume."
