"""`score`: importance from gradients, over a work table and of linear layers in factored form."""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels.keeping import base_of, model_of, score_of
from tvfast.kernels.lanes import BF16, F16, F32, INTERPRETED, load, load_fixed, store_fixed
from tvfast.kernels.table import OUT, REALS, TILE, WEIGHT, N, find_entry

# int64 fields of a sample.
GRADIENTS = tl.constexpr(0)
GRADIENTS_DTYPE = tl.constexpr(1)
ACTIVATIONS = tl.constexpr(2)
ACTIVATIONS_DTYPE = tl.constexpr(3)
N_TOKENS = tl.constexpr(4)
SAMPLE_FIELDS = tl.constexpr(5)

SQUARE = tl.constexpr(0)
PRODUCT = tl.constexpr(1)
DELTA = tl.constexpr(2)


@triton.jit
def _score_block(
    row, reals, start, n_models,
    DTYPE: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = start + tl.arange(0, BLOCK)
    inside = i < tl.load(row + N)
    out = tl.load(row + OUT)
    base = base_of(row, i, inside, DTYPE, HAS_BASE, ALIGNED, MASKED)
    total = load_fixed(out, i, inside, F32, ALIGNED, MASKED)
    for k in range(n_models):
        tau = model_of(row, k, i, inside, DTYPE, ALIGNED, MASKED) - base
        product = score_of(row, k, i, inside, ALIGNED, MASKED) * tau
        total += tl.abs(product) * tl.load(reals + k * REALS + WEIGHT)
    store_fixed(out, i, total, inside, F32, ALIGNED, MASKED)


@triton.jit
def score_kernel(
    fields,  # [n_entries, stride] int64
    stride,
    first_tiles,  # [n_entries + 1] int64
    n_entries,
    all_reals,  # [n_entries, n_models, REALS] float32
    n_models,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds |score_k * d_k| * weight_k of one tile, models in order."""
    tile = tl.program_id(0).to(tl.int64)
    entry = find_entry(first_tiles, n_entries, tile)
    row = fields + entry * stride
    reals = all_reals + entry * n_models * REALS
    begin = (tile - tl.load(first_tiles + entry)) * TILE
    end = tl.minimum(begin + TILE, tl.load(row + N))
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        _score_block(row, reals, start, n_models, DTYPE, HAS_BASE, ALIGNED, False, BLOCK)
    if whole < end:
        _score_block(row, reals, whole, n_models, DTYPE, HAS_BASE, ALIGNED, True, BLOCK)


@triton.jit
def product_of(left, right, total, DTYPE: tl.constexpr):
    """total + left right of float32 tiles that were widened from one DTYPE; MIXED multiplies in float32."""
    if INTERPRETED:
        total += tl.dot(left, right, input_precision="ieee")
    elif DTYPE == BF16:
        total = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), total)
    elif DTYPE == F16:
        total = tl.dot(left.to(tl.float16), right.to(tl.float16), total)
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _gradient_tile(
    sample, n_out, n_activations, row, column,
    BIAS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """G [ROWS, COLUMNS] float32 of one sample; zeros outside the layer."""
    e, e_dtype = tl.load(sample + GRADIENTS), tl.load(sample + GRADIENTS_DTYPE)
    a, a_dtype = tl.load(sample + ACTIVATIONS), tl.load(sample + ACTIVATIONS_DTYPE)
    n_tokens = tl.load(sample + N_TOKENS)
    gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n_tokens, DEPTH):
        token = (start + tl.arange(0, DEPTH)).to(tl.int64)
        i = token[None, :] * n_out + row[:, None]
        inside = (row < n_out)[:, None] & (token < n_tokens)[None, :]
        left = load(e, e_dtype, i, inside, DTYPE, False, True)
        i = token[:, None] * n_activations + column[None, :]
        inside = (token < n_tokens)[:, None] & (column < n_activations)[None, :]
        right = load(a, a_dtype, i, inside, DTYPE, False, True)
        if BIAS:
            ones = (token < n_tokens)[:, None] & (column == n_activations)[None, :]
            right = tl.where(ones, 1.0, right)
        gradient = product_of(left, right, gradient, DTYPE)
    return gradient


@triton.jit
def factored_kernel(
    samples,  # [n_samples, SAMPLE_FIELDS] int64
    weights,  # [n_samples] float32
    n_samples,
    model_address,
    base_address,
    out_address,
    n_out,
    n_in,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,  # of gradients and activations
    MODEL_DTYPE: tl.constexpr,
    BASE_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Scores of one tile of a layer over all samples, which stays in registers between them."""
    n_across = (n_in + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    row = tile // n_across * ROWS + tl.arange(0, ROWS)
    column = tile % n_across * COLUMNS + tl.arange(0, COLUMNS)
    i = row[:, None] * n_in + column[None, :]
    inside = (row < n_out)[:, None] & (column < n_in)[None, :]
    total = load_fixed(out_address, i, inside, F32, False, True)
    for j in range(n_samples):
        gradient = _gradient_tile(
            samples + j * SAMPLE_FIELDS, n_out, n_in - BIAS, row, column, BIAS, DTYPE, ROWS, COLUMNS, DEPTH
        )
        if KIND == SQUARE:
            factor = gradient
        else:
            # Read for every sample from the cache: the registers are for the gradient.
            factor = load_fixed(model_address, i, inside, MODEL_DTYPE, False, True)
            if KIND == DELTA:
                factor -= load_fixed(base_address, i, inside, BASE_DTYPE, False, True)
        total += tl.abs(gradient * factor) * tl.load(weights + j)
    store_fixed(out_address, i, total, inside, F32, False, True)
