"""Storage to numbers and back over host memory given by its address: 8-bit codes, adapters."""

from __future__ import annotations

from typing import NamedTuple

import tvfast._C_cpu as _C_cpu
from tvfast.program import DType


class ScaledBlocks(NamedTuple):
    """Matrices of 8-bit codes, one after the other, in blocks that each have a factor.

    Attributes:
        format: 0 for E4M3, 1 for E5M2.
        n_rows, n_columns: of a matrix.
        block_rows, block_columns: of a block; those at the end of a matrix may be smaller.
        factor_type: 0 float32, 1 bfloat16, 2 float16, 3 E8M0.
    """

    format: int
    n_rows: int
    n_columns: int
    block_rows: int
    block_columns: int
    factor_type: int


class ThinFactor(NamedTuple):
    """L or R of a product L R: element (i, k) is at i * along + k * rank_step; one of them is 1."""

    address: int
    dtype: DType
    along: int
    rank_step: int


def widen_scaled(
    blocks: ScaledBlocks,
    codes: int,
    factors: int,
    first_row: int,
    begin: int,
    end: int,
    out: int,
    n_threads: int = 0,
) -> None:
    """Numbers of elements [begin, end): code times factor, one rounding to float32.

    Args:
        codes: address of element `begin`.
        factors: address of the factors of block row `first_row`, counted over all matrices.
        out: address of float32.
    """
    _C_cpu.widen_scaled(_C_cpu.ScaledBlocks(*blocks), codes, factors, first_row, begin, end, out, n_threads)


def narrow_scaled(
    blocks: ScaledBlocks,
    values: int,
    begin: int,
    end: int,
    power_of_two: bool,
    codes: int,
    factors: int,
    n_threads: int = 0,
) -> None:
    """Codes and factors of elements [begin, end), which are whole rows of blocks.

    A factor is the largest finite magnitude of its block over the format's, one division in float32, rounded
    to the factors' type, or up to a power of two; 1 for a block of zeros. A code is the nearest to
    x / factor, ties to even; finite numbers saturate, NaN stays NaN.

    Args:
        values: address of float32.
        codes, factors: where results for `begin` go.
    """
    _C_cpu.narrow_scaled(
        _C_cpu.ScaledBlocks(*blocks), values, begin, end, power_of_two, codes, factors, n_threads
    )


def widen_fp8(codes: int, n_elements: int, format: int, out: int) -> None:
    """Numbers of 8-bit codes, exact, as float32."""
    _C_cpu.widen_fp8(codes, n_elements, format, out)


def narrow_fp8(values: int, n_elements: int, format: int, saturate: bool, codes: int) -> None:
    """Codes of float32 numbers, ties to even.

    Beyond the largest number comes NaN (E4M3) or infinity (E5M2), as in torch; with `saturate` that number,
    for everything finite. Every NaN is the code 0x7f.
    """
    _C_cpu.narrow_fp8(values, n_elements, format, saturate, codes)


def add_low_rank(
    matrix: tuple[int, DType],
    out: tuple[int, DType],
    begin: int,
    end: int,
    n_columns: int,
    rank: int,
    factor: float,
    left: ThinFactor,
    left_first: int,
    right: ThinFactor,
    n_threads: int = 0,
) -> None:
    """Elements [begin, end) of W + factor · (L R), rounded once to the type of `out`.

    L R is a chain of fused multiply-adds over the rank, from +0, as in docs/numerics.md; the multiplication
    and the addition are float32. However the elements are cut, the bits are the same.

    Args:
        matrix, out: address and type of element `begin`; they may be the same memory of one type.
        left: of which row `left_first` is at its address.
        right: whole.
    """
    sums = _C_cpu.LowRankSum(
        (matrix[0], int(matrix[1])),
        (out[0], int(out[1])),
        begin,
        n_columns,
        rank,
        factor,
        (left.address, int(left.dtype), left.along, left.rank_step),
        left_first,
        (right.address, int(right.dtype), right.along, right.rank_step),
    )
    _C_cpu.add_low_rank(sums, begin, end, n_threads)
