"""`combine`: every tensor of a work table in one pass and, for one kind of entry, one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels import stages
from tvfast.kernels.keeping import addend_of, base_of, kept_entry, rank_of, rescaled, shared_of, weight_of
from tvfast.kernels.lanes import negative_zero, store
from tvfast.kernels.stages import (
    DIVISOR_NONE,
    REDUCE_MAX_ABS,
    VOTE_NONE,
    WEIGHTING_ALONE,
    WEIGHTING_NEARNESS,
)
from tvfast.kernels.table import (
    FILL,
    FLOOR,
    MAJORITY,
    OFFSET,
    OUT,
    OUT_DTYPE,
    REALS,
    SCALE,
    TENSOR_REALS,
    TILE,
    WEIGHT,
    WHOLES,
    N,
    find_entry,
)


@triton.jit
def _rescaled_entry(
    row, reals, wholes, k, n_models, base, shared, first, i, inside,
    KEEP: tl.constexpr, TIE: tl.constexpr, CROSS: tl.constexpr, GAIN: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t_k of model k."""
    entry = kept_entry(
        row, reals, wholes, k, n_models, base, shared, first, i, inside,
        KEEP, TIE, CROSS, DTYPE, ALIGNED, MASKED, BLOCK,
    )  # fmt: skip
    return rescaled(reals, k, entry, rank_of(row, k, i, inside, KEEP), GAIN)


@triton.jit
def _join(
    reduced, divisor, t, sign, weight,
    VOTE: tl.constexpr, BALLOT: tl.constexpr, MEMBERS: tl.constexpr, REDUCE: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """R and D after one more model."""
    ballot = stages.cast_ballot(t, weight, BALLOT)
    member = stages.members(ballot, t * weight, sign, VOTE, MEMBERS)
    reduced = stages.reduce(reduced, member, t, weight, REDUCE)
    if DIVISOR != DIVISOR_NONE:
        divisor = stages.add_share(divisor, member, weight, DIVISOR)
    return reduced, divisor


@triton.jit
def _combine_block(
    row, tensor, reals, wholes, start, n_models,
    K: tl.constexpr, KEEP: tl.constexpr, TIE: tl.constexpr, CROSS: tl.constexpr, GAIN: tl.constexpr,
    WEIGHTING: tl.constexpr, VOTE: tl.constexpr, BALLOT: tl.constexpr, ZERO_SIGN: tl.constexpr,
    MEMBERS: tl.constexpr, REDUCE: tl.constexpr, DIVISOR: tl.constexpr, DTYPE: tl.constexpr,
    OUT_KIND: tl.constexpr, HAS_BASE: tl.constexpr, ADDS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = start + tl.arange(0, BLOCK)
    inside = i < tl.load(row + N)
    first = tl.load(row + OFFSET)
    if ALIGNED:
        first = tl.multiple_of(first, 4)
    first += start
    base = base_of(row, i, inside, DTYPE, HAS_BASE, ALIGNED, MASKED)
    shared = shared_of(row, base, i, inside, n_models, KEEP, DTYPE, ALIGNED, MASKED)
    floor, fill = tl.load(tensor + FLOOR), tl.load(tensor + FILL)
    relations = tl.zeros([BLOCK], tl.float32)
    votes = tl.zeros([BLOCK], tl.float32)
    held = ()
    if K > 0:
        for k in tl.static_range(K):
            t = _rescaled_entry(
                row, reals, wholes, k, n_models, base, shared, first, i, inside,
                KEEP, TIE, CROSS, GAIN, DTYPE, ALIGNED, MASKED, BLOCK,
            )  # fmt: skip
            held = held + (t,)  # noqa: RUF005  (the compiler knows no unpacking)
        if WEIGHTING == WEIGHTING_NEARNESS or WEIGHTING == WEIGHTING_ALONE:  # noqa: SIM109
            for k in tl.static_range(K):
                own = tl.load(reals + k * REALS + WEIGHT)
                relations = stages.add_relation(relations, k, held[k], own, floor, WEIGHTING)
        if VOTE != VOTE_NONE:
            for k in tl.static_range(K):
                weight = weight_of(row, reals, k, relations, i, inside, WEIGHTING, ALIGNED, MASKED)
                votes = stages.vote(votes, stages.cast_ballot(held[k], weight, BALLOT), VOTE)
    else:
        if WEIGHTING == WEIGHTING_NEARNESS or WEIGHTING == WEIGHTING_ALONE:  # noqa: SIM109
            for k in range(n_models):
                t = _rescaled_entry(
                    row, reals, wholes, k, n_models, base, shared, first, i, inside,
                    KEEP, TIE, CROSS, GAIN, DTYPE, ALIGNED, MASKED, BLOCK,
                )  # fmt: skip
                own = tl.load(reals + k * REALS + WEIGHT)
                relations = stages.add_relation(relations, k, t, own, floor, WEIGHTING)
        if VOTE != VOTE_NONE:
            for k in range(n_models):
                t = _rescaled_entry(
                    row, reals, wholes, k, n_models, base, shared, first, i, inside,
                    KEEP, TIE, CROSS, GAIN, DTYPE, ALIGNED, MASKED, BLOCK,
                )  # fmt: skip
                weight = weight_of(row, reals, k, relations, i, inside, WEIGHTING, ALIGNED, MASKED)
                votes = stages.vote(votes, stages.cast_ballot(t, weight, BALLOT), VOTE)
    sign = stages.elected(votes, tl.load(tensor + MAJORITY), ZERO_SIGN)
    if REDUCE == REDUCE_MAX_ABS:
        reduced = tl.zeros([BLOCK], tl.float32)
    else:
        reduced = negative_zero(base)
    divisor = tl.zeros([BLOCK], tl.float32)
    if K > 0:
        for k in tl.static_range(K):
            weight = weight_of(row, reals, k, relations, i, inside, WEIGHTING, ALIGNED, MASKED)
            reduced, divisor = _join(
                reduced, divisor, held[k], sign, weight, VOTE, BALLOT, MEMBERS, REDUCE, DIVISOR
            )
    else:
        for k in range(n_models):
            t = _rescaled_entry(
                row, reals, wholes, k, n_models, base, shared, first, i, inside,
                KEEP, TIE, CROSS, GAIN, DTYPE, ALIGNED, MASKED, BLOCK,
            )  # fmt: skip
            weight = weight_of(row, reals, k, relations, i, inside, WEIGHTING, ALIGNED, MASKED)
            reduced, divisor = _join(
                reduced, divisor, t, sign, weight, VOTE, BALLOT, MEMBERS, REDUCE, DIVISOR
            )
    quotient = stages.divide(reduced, divisor, floor, fill, DIVISOR)
    added = addend_of(row, base, i, inside, DTYPE, HAS_BASE, ADDS_BASE, ALIGNED, MASKED)
    result = stages.apply(added, quotient, tl.load(tensor + SCALE), ADDS_BASE)
    store(
        tl.load(row + OUT), tl.load(row + OUT_DTYPE), i, result, inside, OUT_KIND, ALIGNED, MASKED
    )  # fmt: skip


@triton.jit
def combine_kernel(
    fields,  # [n_entries, stride] int64
    stride,
    first_tiles,  # [n_entries + 1] int64
    n_entries,
    tensors,  # [n_entries, TENSOR_REALS] float32
    all_reals,  # [n_entries, n_models, REALS] float32
    all_wholes,  # [n_entries, n_models, WHOLES] int64
    n_models,
    K: tl.constexpr,  # n_models, whose entries stay in registers; 0: a loop that reads them again
    KEEP: tl.constexpr,
    TIE: tl.constexpr,
    CROSS: tl.constexpr,
    GAIN: tl.constexpr,
    WEIGHTING: tl.constexpr,
    VOTE: tl.constexpr,
    BALLOT: tl.constexpr,
    ZERO_SIGN: tl.constexpr,
    MEMBERS: tl.constexpr,
    REDUCE: tl.constexpr,
    DIVISOR: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_KIND: tl.constexpr,
    HAS_BASE: tl.constexpr,  # and it is subtracted
    ADDS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one entry: whole blocks without a mask, the rest with one."""
    tile = tl.program_id(0).to(tl.int64)
    entry = find_entry(first_tiles, n_entries, tile)
    row = fields + entry * stride
    tensor = tensors + entry * TENSOR_REALS
    reals = all_reals + entry * n_models * REALS
    wholes = all_wholes + entry * n_models * WHOLES
    begin = (tile - tl.load(first_tiles + entry)) * TILE
    end = tl.minimum(begin + TILE, tl.load(row + N))
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        _combine_block(
            row, tensor, reals, wholes, start, n_models, K, KEEP, TIE, CROSS, GAIN, WEIGHTING, VOTE, BALLOT,
            ZERO_SIGN, MEMBERS, REDUCE, DIVISOR, DTYPE, OUT_KIND, HAS_BASE, ADDS_BASE, ALIGNED, False, BLOCK,
        )  # fmt: skip
    if whole < end:
        _combine_block(
            row, tensor, reals, wholes, whole, n_models, K, KEEP, TIE, CROSS, GAIN, WEIGHTING, VOTE, BALLOT,
            ZERO_SIGN, MEMBERS, REDUCE, DIVISOR, DTYPE, OUT_KIND, HAS_BASE, ADDS_BASE, ALIGNED, True, BLOCK,
        )  # fmt: skip
