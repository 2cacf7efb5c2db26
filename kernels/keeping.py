"""From a row of the device table to task vectors and their keep stage, one model and block at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels import stages
from tvfast.kernels.lanes import MIXED, load
from tvfast.kernels.stages import (
    CROSS_NONE,
    CROSS_WINNER,
    KEEP_ALL,
    KEEP_BAND,
    KEEP_BAND_BY_RANK,
    KEEP_MASK,
    KEEP_RANDOM,
    KEEP_RANDOM_BY_RANK,
    KEEP_SCORE,
    KEEP_VARIANCE,
    TIE_GE,
    WEIGHTING_SCORE,
    draws,
    in_band,
    in_band_ties,
    mapped_score,
    tie_ranks,
    unless_lost,
)
from tvfast.kernels.table import (
    BASE,
    BASE_DTYPE,
    GAIN_REAL,
    HEADER,
    HI,
    HI_CUT,
    KEY,
    LIMIT,
    LIMIT_STEP,
    LO,
    LO_CUT,
    MAP,
    MASK,
    MODEL,
    MODEL_DTYPE,
    MODEL_FIELDS,
    PROB,
    PROB_STEP,
    RANK,
    RANK_HI,
    RANK_LO,
    REALS,
    SCORE,
    SCORE_DTYPE,
    WEIGHT,
    WHOLES,
)


@triton.jit
def base_of(
    row,  # int64 fields of one entry
    i,  # [n] int64
    inside,
    DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """b, or +0 where nothing is subtracted, which leaves every difference as it is."""
    if HAS_BASE:
        base = load(tl.load(row + BASE), tl.load(row + BASE_DTYPE), i, inside, DTYPE, ALIGNED, MASKED)
    else:
        base = tl.zeros(i.shape, tl.float32)
    return base


@triton.jit
def addend_of(
    row, base, i, inside,
    DTYPE: tl.constexpr, HAS_BASE: tl.constexpr, ADDS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """b where it is added and was not subtracted, otherwise `base`, from `base_of`."""
    if ADDS_BASE and not HAS_BASE:
        base = base_of(row, i, inside, DTYPE, ADDS_BASE, ALIGNED, MASKED)
    return base


@triton.jit
def model_of(row, k, i, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """m_k, float32 [n]."""
    view = row + HEADER + k * MODEL_FIELDS
    return load(tl.load(view + MODEL), tl.load(view + MODEL_DTYPE), i, inside, DTYPE, ALIGNED, MASKED)


@triton.jit
def score_of(row, k, i, inside, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """score_k, float32 [n]; scores have a dtype of their own, so it is always read."""
    view = row + HEADER + k * MODEL_FIELDS
    return load(tl.load(view + SCORE), tl.load(view + SCORE_DTYPE), i, inside, MIXED, ALIGNED, MASKED)


@triton.jit
def _map_real(row, k, NUMBER: tl.constexpr):
    bits = tl.load(row + HEADER + k * MODEL_FIELDS + MAP + NUMBER).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def share_of(row, k, i, inside, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """s_k, float32 [n]: the score read through its map."""
    score = score_of(row, k, i, inside, ALIGNED, MASKED)
    return tl.abs(mapped_score(score, _map_real(row, k, 0), _map_real(row, k, 1), _map_real(row, k, 2)))


@triton.jit
def weight_of(
    row, reals, k, relations, i, inside,
    WEIGHTING: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """w_k: a scalar, or float32 [n]."""
    weight = tl.load(reals + k * REALS + WEIGHT)
    if WEIGHTING == WEIGHTING_SCORE:
        weight = weight * share_of(row, k, i, inside, ALIGNED, MASKED)
    else:
        weight = stages.weight_of(relations, k, weight, WEIGHTING)
    return weight


@triton.jit
def variance(
    row, base, i, inside, n_models, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr
):
    """Population variance of d_1 ... d_K in float64, rounded once to float32; reads the models twice."""
    total = tl.zeros(i.shape, tl.float64)
    count = total + n_models
    for k in range(n_models):
        total += (model_of(row, k, i, inside, DTYPE, ALIGNED, MASKED) - base).to(tl.float64)
    mean = total / count
    squares = tl.zeros(i.shape, tl.float64)
    for k in range(n_models):
        tau = model_of(row, k, i, inside, DTYPE, ALIGNED, MASKED) - base
        deviation = tau.to(tl.float64) - mean
        squares += deviation * deviation
    return (squares / count).to(tl.float32)


@triton.jit
def shared_of(
    row,
    base,
    i,
    inside,
    n_models,
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the keep stage needs of all models: their variance, otherwise the base as a stand-in."""
    if KEEP == KEEP_VARIANCE:
        shared = variance(row, base, i, inside, n_models, DTYPE, ALIGNED, MASKED)
    else:
        shared = base
    return shared


@triton.jit
def rank_of(row, k, i, inside, KEEP: tl.constexpr):
    """Ranks for the keep stages that use them, otherwise zero; int64 [n]."""
    if KEEP == KEEP_RANDOM_BY_RANK or KEEP == KEEP_BAND_BY_RANK:  # noqa: SIM109  (no `in` for constexpr)
        ranks = tl.load(row + HEADER + k * MODEL_FIELDS + RANK).to(tl.pointer_type(tl.int64))
        rank = tl.load(ranks + i, mask=inside, other=0)
    else:
        rank = tl.zeros(i.shape, tl.int64)
    return rank


@triton.jit
def banded(magnitude, index, reals, wholes, TIE: tl.constexpr):
    """lo <= magnitude <= hi with the tie rule at both ends; NaN is inside."""
    lo = tl.load(reals + LO)
    hi = tl.load(reals + HI)
    if TIE == TIE_GE:
        kept = in_band(magnitude, lo, hi)
    else:
        rank = tie_ranks(index, tl.load(wholes + KEY), TIE)
        kept = in_band_ties(
            magnitude, lo, hi, rank < tl.load(wholes + LO_CUT), rank < tl.load(wholes + HI_CUT)
        )
    return kept


@triton.jit
def crossed_score(
    row, reals, wholes, k, n_models, index, i, inside,
    TIE: tl.constexpr, CROSS: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """s_k, and -1 where another model takes the entry's place; reads the scores of all models then."""
    own = share_of(row, k, i, inside, ALIGNED, MASKED)
    if CROSS != CROSS_NONE:
        lost = i < 0
        for j in range(n_models):
            other = share_of(row, j, i, inside, ALIGNED, MASKED)
            if CROSS == CROSS_WINNER:
                takes = other >= own
            else:
                takes = banded(other, index, reals + j * REALS, wholes + j * WHOLES, TIE)
            lost = lost | (takes & (k != j))
        own = unless_lost(own, lost)
    return own


@triton.jit
def keep(
    row,  # int64 fields of one entry
    reals,  # [K, REALS] float32
    wholes,  # [K, WHOLES] int64
    k,
    n_models,
    tau,  # d_k
    shared,  # from `shared_of`
    rank,  # from `rank_of`
    first,  # global index of the block's first element
    i,
    inside,
    KEEP: tl.constexpr,
    TIE: tl.constexpr,
    CROSS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kept_k = keep(d_k) or isnan(d_k); bool [n]."""
    real = reals + k * REALS
    whole = wholes + k * WHOLES
    index = first + tl.arange(0, BLOCK)
    if KEEP == KEEP_ALL:
        kept = tau == tau
    elif KEEP == KEEP_BAND:
        kept = banded(tl.abs(tau), index, real, whole, TIE)
    elif KEEP == KEEP_SCORE:
        score = crossed_score(row, reals, wholes, k, n_models, index, i, inside, TIE, CROSS, ALIGNED, MASKED)
        kept = banded(score, index, real, whole, TIE)
    elif KEEP == KEEP_VARIANCE:
        kept = banded(shared, index, real, whole, TIE)
    elif KEEP == KEEP_RANDOM:
        kept = draws(first, tl.load(whole + KEY), ALIGNED, BLOCK) < tl.load(whole + LIMIT)
    elif KEEP == KEEP_RANDOM_BY_RANK:
        rise = ((rank * tl.load(whole + LIMIT_STEP)) >> 32) & 0xFFFFFFFF
        kept = draws(first, tl.load(whole + KEY), ALIGNED, BLOCK) < tl.load(whole + LIMIT) + rise
    elif KEEP == KEEP_BAND_BY_RANK:
        kept = (rank >= tl.load(whole + RANK_LO)) & (rank < tl.load(whole + RANK_HI))
    else:
        tl.static_assert(KEEP == KEEP_MASK)
        plane = tl.load(row + HEADER + k * MODEL_FIELDS + MASK).to(tl.pointer_type(tl.int64))
        words = tl.load(plane + (i >> 6), mask=inside, other=0)
        kept = ((words >> (i & 63)) & 1) != 0
    return kept | (tau != tau)


@triton.jit
def kept_entry(
    row,
    reals,
    wholes,
    k,
    n_models,
    base,
    shared,
    first,
    i,
    inside,
    KEEP: tl.constexpr,
    TIE: tl.constexpr,
    CROSS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_k where kept, otherwise +0."""
    tau = model_of(row, k, i, inside, DTYPE, ALIGNED, MASKED) - base
    rank = rank_of(row, k, i, inside, KEEP)
    kept = keep(
        row, reals, wholes, k, n_models, tau, shared, rank, first, i, inside,
        KEEP, TIE, CROSS, DTYPE, ALIGNED, MASKED, BLOCK,
    )  # fmt: skip
    return tl.where(kept, tau, 0.0)


@triton.jit
def rescaled(reals, k, entry, rank, GAIN: tl.constexpr):
    """t_k of a kept entry."""
    real = reals + k * REALS
    return stages.rescale(
        entry, tl.load(real + GAIN_REAL), tl.load(real + PROB), tl.load(real + PROB_STEP), rank, GAIN
    )
