"""Ranks of magnitudes within rows, for rows that one program instance can sort."""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels.keeping import base_of, model_of
from tvfast.kernels.lanes import magnitude_bits
from tvfast.kernels.table import HEADER, MODEL_FIELDS, RANK, N

LONGEST_ROW = 2048
"""Elements that `ranks_kernel` sorts: 16 KiB of keys, which stay in the registers of four warps."""


@triton.jit
def ranks_kernel(
    row,  # int64 fields of one entry
    width,  # elements of a row of the tensor
    k,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least `width`
):
    """Rank of |d_k| within one row, equals by index, written to the entry's ranks."""
    begin = tl.program_id(0).to(tl.int64) * width
    n = tl.load(row + N)
    column = tl.arange(0, BLOCK).to(tl.int64)
    i = begin + column
    inside = (column < width) & (i < n)
    base = base_of(row, i, inside, DTYPE, HAS_BASE, ALIGNED, True)
    bits = magnitude_bits(model_of(row, k, i, inside, DTYPE, ALIGNED, True) - base).to(tl.int64)
    # Key and column in one integer: the order is total, and elements outside come last.
    ordered = tl.sort(tl.where(inside, (bits << 32) | column, 0x7FFFFFFFFFFFFFFF))
    ranks = tl.load(row + HEADER + k * MODEL_FIELDS + RANK).to(tl.pointer_type(tl.int64))
    tl.store(ranks + begin + (ordered & 0xFFFFFFFF), column, mask=ordered < 0x7FFFFFFFFFFFFFFF)
