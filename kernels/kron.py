"""`kron`: block-diagonal B X A with its dot product, and panels of products that were multiplied elsewhere.

The dot product is summed in the order-independent accumulator, so it does not depend on tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels.lanes import F32, load, load_fixed, store_fixed
from tvfast.kernels.sums import NO_WINDOW, add_sums, take


@triton.jit
def _diagonal_tile(
    block, dtype, rows, columns, size, PACKED: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Elements rows x columns of a diagonal block of `size` a side, float32; zeros outside it."""
    row, column = rows[:, None], columns[None, :]
    inside = (row < size) & (column < size)
    if PACKED:
        low, high = tl.minimum(row, column), tl.maximum(row, column)
        i = high * (high + 1) // 2 + low
    else:
        i = row * size + column
    return load(block, dtype, i, inside, DTYPE, False, True)


@triton.jit
def _finish(
    x, product, out_address, i, inside, scale, limbs, nonfinite_sums,
    OUT_DTYPE: tl.constexpr, HAS_OUT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Adds <x, product> to the sum, and writes the product to elements i of `out`."""
    windows = tl.full([1], NO_WINDOW, tl.int32)
    zeros = tl.zeros([1], tl.int64)
    addends = tl.where(inside, x.to(tl.float64) * product.to(tl.float64), 0.0)
    windows, highs, lows, nonfinites = take(
        windows, zeros, zeros, tl.zeros([1], tl.float64), 0, addends, 1
    )  # fmt: skip
    add_sums(limbs, nonfinite_sums, 0, windows, highs, lows, nonfinites, 1)
    if HAS_OUT:
        result = product * scale
        if ACCUMULATE:
            result = load_fixed(out_address, i, inside, OUT_DTYPE, False, True) + result
        store_fixed(out_address, i, result, inside, OUT_DTYPE, False, True)


@triton.jit
def kron_kernel(
    x_address,
    out_address,
    n_out,
    n_in,
    a_blocks,  # [n_a, 2] int64: address and dtype
    b_blocks,  # [n_b, 2] int64
    n_a,
    a_block,
    b_block,
    scale,
    limbs,  # [WINDOWS, LIMBS] int64, zero
    nonfinite_sums,  # [1] float64, zero
    X_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,  # of the blocks
    PACKED: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,  # at least a block of B
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """COLUMNS columns of one block of P: P = sum over k of B[:, k] (X[k, :] A), k in steps of DEPTH."""
    n_parts = (a_block + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    across = n_a * n_parts
    block_row, rest = tile // across, tile % across
    block_column, part = rest // n_parts, rest % n_parts
    first_row, first_column = block_row * b_block, block_column * a_block
    n_rows = tl.minimum(b_block, n_out - first_row).to(tl.int32)
    n_columns = tl.minimum(a_block, n_in - first_column).to(tl.int32)
    a, a_dtype = tl.load(a_blocks + 2 * block_column), tl.load(a_blocks + 2 * block_column + 1)
    b, b_dtype = tl.load(b_blocks + 2 * block_row), tl.load(b_blocks + 2 * block_row + 1)
    rows = tl.arange(0, ROWS)
    columns = (part * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for m in range(0, n_rows, DEPTH):
        middle = m + tl.arange(0, DEPTH)
        half = tl.zeros([DEPTH, COLUMNS], tl.float32)
        for k in range(0, n_columns, DEPTH):
            steps = k + tl.arange(0, DEPTH)
            i = (first_row + middle)[:, None] * n_in + (first_column + steps)[None, :]
            inside = (middle < n_rows)[:, None] & (steps < n_columns)[None, :]
            x = load_fixed(x_address, i, inside, X_DTYPE, False, True)
            right = _diagonal_tile(a, a_dtype, steps, columns, n_columns, PACKED, DTYPE)
            half = tl.dot(x, right, half, input_precision="ieee")
        left = _diagonal_tile(b, b_dtype, rows, middle, n_rows, PACKED, DTYPE)
        product = tl.dot(left, half, product, input_precision="ieee")
    i = (first_row + rows)[:, None] * n_in + (first_column + columns)[None, :]
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    x = load_fixed(x_address, i, inside, X_DTYPE, False, True)
    _finish(x, product, out_address, i, inside, scale, limbs, nonfinite_sums, OUT_DTYPE, HAS_OUT, ACCUMULATE)


@triton.jit
def finish_kernel(
    x_address,
    x_stride,
    product_address,
    product_stride,
    out_address,
    out_stride,
    n_rows,
    n_columns,
    scale,
    limbs,  # [WINDOWS, LIMBS] int64, zero
    nonfinite_sums,  # [1] float64, zero
    X_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of a panel."""
    n_across = (n_columns + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    rows = (tile // n_across * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tile % n_across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < n_rows) & (columns < n_columns)
    x = load_fixed(x_address, rows * x_stride + columns, inside, X_DTYPE, False, True)
    product = load_fixed(product_address, rows * product_stride + columns, inside, F32, False, True)
    i = rows * out_stride + columns
    _finish(x, product, out_address, i, inside, scale, limbs, nonfinite_sums, OUT_DTYPE, HAS_OUT, ACCUMULATE)
