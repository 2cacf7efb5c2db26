"""`measure`: order-independent sums, counts and votes, and the bit planes of a keep stage.

Sums follow `docs/adr/0003`: a tile keeps a window and two integers for each sum and adds them to that
window's slot; the host merges the slots by the accumulator's own rule, which does not depend on the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels import stages
from tvfast.kernels.keeping import (
    addend_of,
    base_of,
    keep,
    model_of,
    rank_of,
    rescaled,
    score_of,
    shared_of,
    weight_of,
)
from tvfast.kernels.stages import VOTE_NONE, WEIGHTING_ALONE, WEIGHTING_NEARNESS
from tvfast.kernels.sums import NO_WINDOW, add_sums, take
from tvfast.kernels.table import (
    FLOOR,
    HEADER,
    MASK,
    MODEL_FIELDS,
    OFFSET,
    REALS,
    TENSOR_REALS,
    TILE,
    WEIGHT,
    WHOLES,
    N,
    find_entry,
)

# Bits of `Wants`, which is above this layer; a test compares them.
L1_BEFORE = tl.constexpr(1)
L1 = tl.constexpr(2)
GRAM = tl.constexpr(4)
COUNTS = tl.constexpr(8)
VOTES = tl.constexpr(16)
SQUARES = tl.constexpr(32)
DOTS = tl.constexpr(64)
ALONE = tl.constexpr(128)
LAST = tl.constexpr(256)  # leave to fill less; these kernels fill all of GRAM


@triton.jit
def _count(counts, slot, flags, C: tl.constexpr):
    """Adds the number of set flags [n] to count number `slot` of C."""
    return counts + tl.where(tl.arange(0, C) == slot, tl.sum(flags.to(tl.int64)), 0)


@triton.jit
def _tau_and_kept(
    row, reals, wholes, k, n_models, base, shared, first, i, inside,
    KEEP: tl.constexpr, TIE: tl.constexpr, CROSS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """m_k, d_k and kept_k; entries outside the tensor are +0 and not kept."""
    model = model_of(row, k, i, inside, DTYPE, ALIGNED, True)
    tau = model - base
    rank = rank_of(row, k, i, inside, KEEP)
    kept = keep(
        row, reals, wholes, k, n_models, tau, shared, rank, first, i, inside,
        KEEP, TIE, CROSS, DTYPE, ALIGNED, True, BLOCK,
    )  # fmt: skip
    return model, tau, kept & inside


@triton.jit
def _number_present(
    row, reals, wholes, n_models, base, shared, first, i, inside,
    KEEP: tl.constexpr, TIE: tl.constexpr, CROSS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many models have an entry that is kept and not zero; float32 [n]."""
    found = tl.zeros([BLOCK], tl.float32)
    for k in range(n_models):
        _, tau, kept = _tau_and_kept(
            row, reals, wholes, k, n_models, base, shared, first, i, inside,
            KEEP, TIE, CROSS, DTYPE, ALIGNED, BLOCK,
        )  # fmt: skip
        found += stages.one_if_present(tl.where(kept, tau, 0.0))
    return found


@triton.jit
def _relations(
    row, tensor, reals, wholes, n_models, base, shared, first, i, inside,
    KEEP: tl.constexpr, TIE: tl.constexpr, CROSS: tl.constexpr, GAIN: tl.constexpr, WEIGHTING: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `stages.weight_of` asks of all models' t_k; float32 [n]."""
    relations = tl.zeros([BLOCK], tl.float32)
    if WEIGHTING == WEIGHTING_NEARNESS or WEIGHTING == WEIGHTING_ALONE:  # noqa: SIM109
        floor = tl.load(tensor + FLOOR)
        for k in range(n_models):
            _, tau, kept = _tau_and_kept(
                row, reals, wholes, k, n_models, base, shared, first, i, inside,
                KEEP, TIE, CROSS, DTYPE, ALIGNED, BLOCK,
            )  # fmt: skip
            rank = rank_of(row, k, i, inside, KEEP)
            t = rescaled(reals, k, tl.where(kept, tau, 0.0), rank, GAIN)
            weight = tl.load(reals + k * REALS + WEIGHT)
            relations = stages.add_relation(relations, k, t, weight, floor, WEIGHTING)
    return relations


@triton.jit
def measure_kernel(
    fields,  # [n_entries, stride] int64
    stride,
    first_tiles,  # [n_entries + 1] int64
    n_entries,
    tensors,  # [n_entries, TENSOR_REALS] float32
    all_reals,  # [n_entries, n_models, REALS] float32
    all_wholes,  # [n_entries, n_models, WHOLES] int64
    n_models,
    limbs,  # [n_entries, S, WINDOWS, LIMBS] int64, zero
    nonfinite_sums,  # [n_entries, S] float64, zero
    all_counts,  # [n_entries, C] int64, zero
    WANTS: tl.constexpr,
    S: tl.constexpr,  # sums: L1 before [K], L1 [K], Gram [K, K], dots [K] if wanted; padded to a power of two
    C: tl.constexpr,  # kept, non-zero, non-finite [K] each; base, elected, conflict; alone [K]; padded
    KEEP: tl.constexpr,
    TIE: tl.constexpr,
    CROSS: tl.constexpr,
    GAIN: tl.constexpr,
    WEIGHTING: tl.constexpr,
    VOTE: tl.constexpr,
    BALLOT: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,  # and it is subtracted
    ADDS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of one tile, added to those of its entry."""
    tile = tl.program_id(0).to(tl.int64)
    entry = find_entry(first_tiles, n_entries, tile)
    row = fields + entry * stride
    reals = all_reals + entry * n_models * REALS
    wholes = all_wholes + entry * n_models * WHOLES
    n = tl.load(row + N)
    begin = (tile - tl.load(first_tiles + entry)) * TILE
    windows = tl.full([S], NO_WINDOW, tl.int32)
    highs = tl.zeros([S], tl.int64)
    lows = tl.zeros([S], tl.int64)
    nonfinites = tl.zeros([S], tl.float64)
    counts = tl.zeros([C], tl.int64)
    for start in range(begin, tl.minimum(begin + TILE, n), BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        first = tl.load(row + OFFSET)
        if ALIGNED:
            first = tl.multiple_of(first, 4)
        first += start
        base = base_of(row, i, inside, DTYPE, HAS_BASE, ALIGNED, True)
        shared = shared_of(row, base, i, inside, n_models, KEEP, DTYPE, ALIGNED, True)
        relations = _relations(
            row, tensors + entry * TENSOR_REALS, reals, wholes, n_models, base, shared, first, i, inside,
            KEEP, TIE, CROSS, GAIN, WEIGHTING, DTYPE, ALIGNED, BLOCK,
        )  # fmt: skip
        if ALONE & WANTS:
            n_present = _number_present(
                row, reals, wholes, n_models, base, shared, first, i, inside,
                KEEP, TIE, CROSS, DTYPE, ALIGNED, BLOCK,
            )  # fmt: skip
        votes = tl.zeros([BLOCK], tl.float32)
        positive = i < 0
        negative = i < 0
        for k in range(n_models):
            model, tau, kept = _tau_and_kept(
                row, reals, wholes, k, n_models, base, shared, first, i, inside,
                KEEP, TIE, CROSS, DTYPE, ALIGNED, BLOCK,
            )  # fmt: skip
            value = tl.where(kept, tau, 0.0)
            if L1_BEFORE & WANTS:
                windows, highs, lows, nonfinites = take(
                    windows, highs, lows, nonfinites, k, tl.abs(tau).to(tl.float64), S
                )
            if L1 & WANTS:
                windows, highs, lows, nonfinites = take(
                    windows, highs, lows, nonfinites, n_models + k, tl.abs(value).to(tl.float64), S
                )
            if GRAM & WANTS:
                for j in range(k + 1):
                    _, other_tau, other_kept = _tau_and_kept(
                        row, reals, wholes, j, n_models, base, shared, first, i, inside,
                        KEEP, TIE, CROSS, DTYPE, ALIGNED, BLOCK,
                    )  # fmt: skip
                    other = tl.where(other_kept, other_tau, 0.0)
                    windows, highs, lows, nonfinites = take(
                        windows, highs, lows, nonfinites, 2 * n_models + j * n_models + k,
                        other.to(tl.float64) * value.to(tl.float64), S,
                    )  # fmt: skip
            elif SQUARES & WANTS:
                windows, highs, lows, nonfinites = take(
                    windows, highs, lows, nonfinites, 2 * n_models + k * n_models + k,
                    value.to(tl.float64) * value.to(tl.float64), S,
                )  # fmt: skip
            if DOTS & WANTS:
                score = score_of(row, k, i, inside, ALIGNED, True)
                windows, highs, lows, nonfinites = take(
                    windows, highs, lows, nonfinites, 2 * n_models + n_models * n_models + k,
                    value.to(tl.float64) * score.to(tl.float64), S,
                )  # fmt: skip
            if COUNTS & WANTS:
                counts = _count(counts, k, kept, C)
                counts = _count(counts, n_models + k, value != 0, C)
                unlike = (tl.abs(model) < float("inf")) == 0
                counts = _count(counts, 2 * n_models + k, unlike & inside, C)
            if ALONE & WANTS:
                counts = _count(counts, 3 * n_models + 3 + k, (value != 0) & (n_present == 1), C)
            if VOTES & WANTS:
                positive = positive | (value > 0)
                negative = negative | (value < 0)
                if VOTE != VOTE_NONE:
                    t = rescaled(reals, k, value, rank_of(row, k, i, inside, KEEP), GAIN)
                    weight = weight_of(row, reals, k, relations, i, inside, WEIGHTING, ALIGNED, True)
                    votes = stages.vote(votes, stages.cast_ballot(t, weight, BALLOT), VOTE)
        if COUNTS & WANTS:
            base = addend_of(row, base, i, inside, DTYPE, HAS_BASE, ADDS_BASE, ALIGNED, True)
            counts = _count(counts, 3 * n_models, ((tl.abs(base) < float("inf")) == 0) & inside, C)
        if VOTES & WANTS:
            if VOTE != VOTE_NONE:
                elected = (votes > 0).to(tl.int64) - (votes < 0).to(tl.int64)
                counts = _count(counts, 3 * n_models + 1, tl.where(inside, elected, 0), C)
            counts = _count(counts, 3 * n_models + 2, positive & negative, C)
    if (L1_BEFORE | L1 | GRAM | SQUARES | DOTS) & WANTS:
        add_sums(limbs, nonfinite_sums, entry, windows, highs, lows, nonfinites, S)
    if (COUNTS | VOTES | ALONE) & WANTS:
        tl.atomic_add(all_counts + entry * C + tl.arange(0, C), counts, mask=counts != 0)


@triton.jit
def planes_kernel(
    fields,
    stride,
    first_tiles,
    n_entries,
    all_reals,
    all_wholes,
    n_models,
    KEEP: tl.constexpr,
    TIE: tl.constexpr,
    CROSS: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,  # a multiple of 64
):
    """Writes kept_k of one tile into the entry's bit planes; padding bits are zero."""
    tile = tl.program_id(0).to(tl.int64)
    entry = find_entry(first_tiles, n_entries, tile)
    row = fields + entry * stride
    reals = all_reals + entry * n_models * REALS
    wholes = all_wholes + entry * n_models * WHOLES
    n = tl.load(row + N)
    begin = (tile - tl.load(first_tiles + entry)) * TILE
    for start in range(begin, tl.minimum(begin + TILE, n), BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        first = tl.load(row + OFFSET)
        if ALIGNED:
            first = tl.multiple_of(first, 4)
        first += start
        base = base_of(row, i, inside, DTYPE, HAS_BASE, ALIGNED, True)
        shared = shared_of(row, base, i, inside, n_models, KEEP, DTYPE, ALIGNED, True)
        for k in range(n_models):
            _, _, kept = _tau_and_kept(
                row, reals, wholes, k, n_models, base, shared, first, i, inside,
                KEEP, TIE, CROSS, DTYPE, ALIGNED, BLOCK,
            )  # fmt: skip
            flags = tl.reshape(kept.to(tl.int64), [BLOCK // 64, 64])
            # Distinct powers of two modulo 2^64: the sum is their bitwise or.
            words = tl.sum(flags << tl.arange(0, 64).to(tl.int64)[None, :], axis=1)
            word = (start >> 6) + tl.arange(0, BLOCK // 64)
            plane = tl.load(row + HEADER + k * MODEL_FIELDS + MASK).to(tl.pointer_type(tl.int64))
            tl.store(plane + word, words, mask=word < (n + 63) // 64)
