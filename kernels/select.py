"""Exact ranks: histograms of the 31-bit magnitude keys by 11, 10 and 10 bits, and the r-th equal entry.

Three passes, each with one launch over the tiles and one that picks every query's digit: nothing in between
depends on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels.keeping import base_of, model_of, share_of, variance
from tvfast.kernels.lanes import magnitude_bits
from tvfast.kernels.stages import KEEP_BAND, KEEP_SCORE
from tvfast.kernels.table import GROUP, POSITION, TILE, N, find_entry

DIGITS = ((20, 11), (10, 10), (0, 10))
"""(shift, bits) of each pass."""

BINS = tl.constexpr(1 << 11)

# int64 fields of a query's state.
PREFIX = tl.constexpr(0)
RANK_LEFT = tl.constexpr(1)  # k less the keys that are known to be greater
GREATER = tl.constexpr(2)
EQUAL = tl.constexpr(3)
STATE = tl.constexpr(4)


@triton.jit
def _keys(
    row, model, start, n, n_models,
    KEEP: tl.constexpr, DTYPE: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys of a block as int32 [n], and which of them are inside the tensor."""
    i = start + tl.arange(0, BLOCK)
    inside = i < n
    if KEEP == KEEP_SCORE:
        value = share_of(row, model, i, inside, ALIGNED, MASKED)
    else:
        base = base_of(row, i, inside, DTYPE, HAS_BASE, ALIGNED, MASKED)
        if KEEP == KEEP_BAND:
            value = model_of(row, model, i, inside, DTYPE, ALIGNED, MASKED) - base
        else:
            value = variance(row, base, i, inside, n_models, DTYPE, ALIGNED, MASKED)
    return magnitude_bits(value), inside


@triton.jit
def _add_keys(
    found, row, model, prefix, start, n, n_models,
    SHIFT: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr, DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A histogram [BINS] after one more block."""
    key, inside = _keys(row, model, start, n, n_models, KEEP, DTYPE, HAS_BASE, ALIGNED, MASKED, BLOCK)
    if SHIFT + BITS < 31:
        inside = inside & ((key >> (SHIFT + BITS)) == prefix)
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    return found + tl.histogram(digit, BINS, mask=inside)


@triton.jit
def histogram_kernel(
    fields,  # [n_entries, stride] int64
    stride,
    first_tiles,  # [n_entries + 1] int64
    n_entries,
    n_models,
    first_queries,  # [n_groups + 1] int64
    models,  # [n_queries] int64
    states,  # [n_queries, STATE] int64
    bins,  # [n_queries, BINS] int64
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds one tile's keys that begin with a query's prefix to that query's histogram."""
    tile = tl.program_id(0).to(tl.int64)
    entry = find_entry(first_tiles, n_entries, tile)
    row = fields + entry * stride
    n = tl.load(row + N)
    begin = (tile - tl.load(first_tiles + entry)) * TILE
    end = tl.minimum(begin + TILE, n)
    whole = begin + (end - begin) // BLOCK * BLOCK
    group = tl.load(row + GROUP)
    digits = tl.arange(0, BINS)
    for query in range(tl.load(first_queries + group), tl.load(first_queries + group + 1)):
        model = tl.load(models + query)
        prefix = tl.load(states + query * STATE + PREFIX).to(tl.int32)
        found = tl.zeros([BINS], tl.int32)
        for start in range(begin, whole, BLOCK):
            found = _add_keys(
                found, row, model, prefix, start, n, n_models,
                SHIFT, BITS, KEEP, DTYPE, HAS_BASE, ALIGNED, False, BLOCK,
            )  # fmt: skip
        if whole < end:
            found = _add_keys(
                found, row, model, prefix, whole, n, n_models,
                SHIFT, BITS, KEEP, DTYPE, HAS_BASE, ALIGNED, True, BLOCK,
            )  # fmt: skip
        tl.atomic_add(bins + query * BINS + digits, found.to(tl.int64), mask=found != 0)


@triton.jit
def pick_kernel(
    states,  # [n_queries, STATE] int64
    bins,  # [n_queries, BINS] int64; left zero
    BITS: tl.constexpr,
):
    """The digit that holds a query's rank: the highest one that, with all above it, has enough keys."""
    query = tl.program_id(0).to(tl.int64)
    digits = tl.arange(0, BINS)
    counts = tl.load(bins + query * BINS + digits)
    tl.store(bins + query * BINS + digits, tl.zeros([BINS], tl.int64))
    state = states + query * STATE
    left = tl.load(state + RANK_LEFT)
    above = tl.sum(counts) - tl.cumsum(counts)  # keys of a higher digit
    chosen = (above < left) & (above + counts >= left)
    digit = tl.sum(tl.where(chosen, digits, 0)).to(tl.int64)
    skipped = tl.sum(tl.where(chosen, above, 0))
    tl.store(state + PREFIX, (tl.load(state + PREFIX) << BITS) | digit)
    tl.store(state + RANK_LEFT, left - skipped)
    tl.store(state + GREATER, tl.load(state + GREATER) + skipped)
    tl.store(state + EQUAL, tl.sum(tl.where(chosen, counts, 0)))


@triton.jit
def count_equal_kernel(
    fields,
    stride,
    first_tiles,
    n_entries,
    n_models,
    first_queries,  # [n_groups + 1] int64
    models,  # [n_queries] int64
    keys,  # [n_queries] int64
    first_places,  # [n_queries + 1] int64: where a query's tiles begin in `counts`
    tile_places,  # [n_tiles] int64: place of a tile among those of its group, in the order of positions
    counts,  # int64
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys of one tile equal each of its group's queried values."""
    tile = tl.program_id(0).to(tl.int64)
    entry = find_entry(first_tiles, n_entries, tile)
    row = fields + entry * stride
    n = tl.load(row + N)
    begin = (tile - tl.load(first_tiles + entry)) * TILE
    end = tl.minimum(begin + TILE, n)
    group = tl.load(row + GROUP)
    place = tl.load(tile_places + tile)
    for query in range(tl.load(first_queries + group), tl.load(first_queries + group + 1)):
        model = tl.load(models + query)
        wanted = tl.load(keys + query).to(tl.int32)
        found = tl.zeros([BLOCK], tl.int32)
        for start in range(begin, end, BLOCK):
            key, inside = _keys(row, model, start, n, n_models, KEEP, DTYPE, HAS_BASE, ALIGNED, True, BLOCK)
            found += ((key == wanted) & inside).to(tl.int32)
        tl.store(counts + tl.load(first_places + query) + place, tl.sum(found).to(tl.int64))


@triton.jit
def find_equal_kernel(
    fields,
    stride,
    first_tiles,
    n_entries,
    n_models,
    first_queries,  # [n_groups + 1] int64
    models,  # [n_queries] int64
    keys,  # [n_queries] int64
    chosen_places,  # [n_queries] int64: place of the tile that holds the entry; -1 for none
    ranks,  # [n_queries] int64: which of the tile's equal entries
    tile_places,  # [n_tiles] int64
    positions,  # [n_queries] int64
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the wanted equal entry is, if it is in this tile."""
    tile = tl.program_id(0).to(tl.int64)
    entry = find_entry(first_tiles, n_entries, tile)
    row = fields + entry * stride
    n = tl.load(row + N)
    begin = (tile - tl.load(first_tiles + entry)) * TILE
    end = tl.minimum(begin + TILE, n)
    group = tl.load(row + GROUP)
    place = tl.load(tile_places + tile)
    for query in range(tl.load(first_queries + group), tl.load(first_queries + group + 1)):
        if tl.load(chosen_places + query) == place:
            model = tl.load(models + query)
            wanted = tl.load(keys + query).to(tl.int32)
            rank = tl.load(ranks + query)
            for start in range(begin, end, BLOCK):
                key, inside = _keys(
                    row, model, start, n, n_models, KEEP, DTYPE, HAS_BASE, ALIGNED, True, BLOCK
                )
                equal = ((key == wanted) & inside).to(tl.int64)
                before = tl.cumsum(equal) - equal
                here = (equal > 0) & (before == rank)
                at = tl.load(row + POSITION) + start + tl.arange(0, BLOCK)
                # Positions count from zero; one more tells them from "not in this block".
                position = tl.sum(tl.where(here, at + 1, 0))
                tl.store(positions + query, position - 1, mask=position > 0)
                rank -= tl.sum(equal)
