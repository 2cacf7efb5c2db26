"""Services over host memory given by its address: checksums, values that are not finite, rows of files and
their divergences, draws by magnitude."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import tvfast._C_cpu as _C_cpu
from tvfast.program import DType, View


def crc32c(address: int, n_bytes: int, seed: int = 0) -> int:
    """CRC-32C (Castagnoli) of `n_bytes` at `address`, as a number below 2^32.

    Args:
        seed: the checksum of what comes before; `crc32c(b, seed=crc32c(a))` is that of a and b end to end.

    Notes:
        The processor's instruction where it has one, on the calling thread, without the interpreter's lock.

    Source: RFC 3720, appendix B.4.
    """
    return int(_C_cpu.crc32c(address, n_bytes, seed))


def crc32c_combine(a: int, b: int, n_bytes_b: int) -> int:
    """The checksum of two pieces end to end, from that of each and the length of the second."""
    return int(_C_cpu.crc32c_combine(a, b, n_bytes_b))


def first_nonfinite(address: int, n_elements: int, dtype: DType) -> int:
    """Index of the first infinity or NaN, or -1; any alignment, without the interpreter's lock."""
    return int(_C_cpu.first_nonfinite(address, n_elements, int(dtype)))


def divergences(
    of: View,
    start: View,
    row: int,
    floor: float,
    out: int,
    importances: int = 0,
    n_threads: int = 0,
) -> None:
    """Σ p log(p / q) of every row: p = softmax(row of `of`) + floor, q the same of `start`.

    Within 3e-7 of its value where a row changes by 1/32 at most and spans 4 at most, however small it is;
    otherwise within 1e-14 of it, and 2e-15. A row with NaN or plus infinity has NaN. The same bits on every
    instruction set and number of threads.

    Args:
        of, start: [n_rows * row].
        floor: above 0.
        out: address of float64 [n_rows].
        importances: address of float32 [n_rows * row], |of - start| times the row's divergence, which is at
            least 0 there; 0: not wanted.
    """
    n_rows = of.n_elements // row
    first, second = ((one.address, int(one.dtype)) for one in (of, start))
    _C_cpu.divergences(first, second, n_rows, row, floor, out, importances, n_threads)


def fuse(
    of: View,
    start: View,
    least: float,
    scale: float,
    importances: int,
    n_threads: int = 0,
) -> None:
    """start + (of - start) * taken * scale in float32, taken 1 where the importance is `least` or more, or 0.

    Args:
        importances: address of float32, one of each element; the result is written over them.
    """
    first, second = ((one.address, int(one.dtype)) for one in (of, start))
    _C_cpu.fuse(first, second, of.n_elements, least, scale, importances, n_threads)


MAGNITUDE_BINS = int(_C_cpu.MAGNITUDE_BINS)
"""Bins of magnitudes: the exponent of float32 and nine bits more, 512 bins an octave."""


def magnitude_counts(values: View, out: int, n_threads: int = 0) -> None:
    """How many magnitudes lie in each bin, from that of 0 up.

    Args:
        out: address of int64 [MAGNITUDE_BINS].
    """
    _C_cpu.magnitude_counts((values.address, int(values.dtype)), values.n_elements, out, n_threads)


def drop_binned(values: View, limits: int, key: int, out: int, n_threads: int = 0) -> None:
    """Write the values, and +0 for those that are dropped at random, by Philox 4x32-10 of key and index.

    Args:
        limits: address of uint32 [MAGNITUDE_BINS], 2^31 times the probability of survival in each bin.
        out: address of float32 [n_elements].
    """
    operand = values.address, int(values.dtype)
    _C_cpu.drop_binned(operand, values.n_elements, limits, key, out, n_threads)


ZERO_ROW, MEAN_ROW, CONSTANT_ROW = -1, -2, -3
"""What `gather_rows` fills absent rows with: `kZeroRow`, `kMeanRow` and `kConstant` of csrc/core/rows.hpp."""


@dataclass(frozen=True, slots=True)
class RowSource:
    """One matrix in a file, and the matrix that is made of its rows.

    Attributes:
        descriptor: of the file, open for buffered reading.
        offset: of the matrix in it, bytes.
        stored: storage type there.
        rows: address of int32 [rows of the new matrix]: the row in the file, or negative: absent.
        constants: address of rows of the new storage type; 0: there are none.
        out: address of the window's elements.
        shown: address of the matrix where it stands in memory; 0: it is read from the file.
    """

    descriptor: int
    offset: int
    stored: DType
    rows: int
    constants: int
    out: int
    shown: int = 0


def gather_rows(
    sources: Sequence[RowSource], fill: int, dtype: DType, row: int, start: int, n_elements: int
) -> None:
    """Elements [start, start + n) of new matrices: rows of files in another order.

    A row that a source lacks is zeros, the same row of another source, the mean of those that have it (their
    sum in order, one division), or a constant.

    Args:
        sources: of every new matrix.
        fill: address of int32 [rows]: position of a source, `ZERO_ROW`, `MEAN_ROW`, or `CONSTANT_ROW` - k.
        dtype: storage type of the new matrices: the sources' own, or float32, which means need.
        row: elements of a row.

    Raises:
        OSError: a file cannot be read; `filename` is the position of the source.
        EOFError: a file ends early; its arguments are the position of the source and where in the file.

    Notes:
        On the calling thread, without the interpreter's lock. Neighbours in a file are one request.
    """
    described = [
        (s.descriptor, s.offset, s.shown, int(s.stored), s.rows, s.constants, s.out) for s in sources
    ]
    source, code, at = _C_cpu.gather_rows(described, fill, int(dtype), row, start, n_elements)
    if source >= 0:
        if code:
            raise OSError(code, os.strerror(code), source)
        raise EOFError(source, at)


def add_rows(matrix: int, n_rows: int, row: int, sums: int) -> None:
    """Add the rows of a float32 matrix to float64 sums [row], from the first row on; both by address."""
    _C_cpu.add_rows(matrix, n_rows, row, sums)
