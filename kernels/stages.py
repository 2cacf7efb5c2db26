"""The arithmetic of every stage: the Triton twin of `csrc/core/stages.inl`, same names, same order.

`docs/numerics.md` is their text in words. [n] is a block of elements; scalars are those of one tensor and
model. Upper-case arguments are the program's fields as compile-time integers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from tvfast.kernels.lanes import fused_add

from tvfast.program import (
    Ballot,
    Cross,
    Divisor,
    Gain,
    Keep,
    Members,
    Reduce,
    Tie,
    Vote,
    Weighting,
    ZeroSign,
)

KEEP_ALL = tl.constexpr(int(Keep.ALL))
KEEP_BAND = tl.constexpr(int(Keep.BAND))
KEEP_SCORE = tl.constexpr(int(Keep.SCORE))
KEEP_VARIANCE = tl.constexpr(int(Keep.VARIANCE))
KEEP_RANDOM = tl.constexpr(int(Keep.RANDOM))
KEEP_RANDOM_BY_RANK = tl.constexpr(int(Keep.RANDOM_BY_RANK))
KEEP_BAND_BY_RANK = tl.constexpr(int(Keep.BAND_BY_RANK))
KEEP_MASK = tl.constexpr(int(Keep.MASK))
TIE_GE = tl.constexpr(int(Tie.GE))
TIE_INDEX = tl.constexpr(int(Tie.INDEX))
CROSS_NONE = tl.constexpr(int(Cross.NONE))
CROSS_WINNER = tl.constexpr(int(Cross.WINNER))
WEIGHTING_SCORE = tl.constexpr(int(Weighting.SCORE))
WEIGHTING_NEARNESS = tl.constexpr(int(Weighting.NEARNESS))
WEIGHTING_ALONE = tl.constexpr(int(Weighting.ALONE))
GAIN_MODEL = tl.constexpr(int(Gain.MODEL))
VOTE_NONE = tl.constexpr(int(Vote.NONE))
VOTE_COUNT = tl.constexpr(int(Vote.COUNT))
BALLOT_RAW = tl.constexpr(int(Ballot.RAW))
ZERO_PLUS = tl.constexpr(int(ZeroSign.PLUS))
ZERO_MINUS = tl.constexpr(int(ZeroSign.MINUS))
ZERO_NONE = tl.constexpr(int(ZeroSign.NONE))
MEMBERS_STRICT = tl.constexpr(int(Members.STRICT))
REDUCE_SUM = tl.constexpr(int(Reduce.SUM))
REDUCE_MAX_ABS = tl.constexpr(int(Reduce.MAX_ABS))
DIVISOR_NONE = tl.constexpr(int(Divisor.NONE))
DIVISOR_COUNT = tl.constexpr(int(Divisor.COUNT))


# keep


@triton.jit
def from_end(a, lo):
    """not (a < lo), so that NaN is inside."""
    return (a < lo) == 0


@triton.jit
def in_band(a, lo, hi):
    """lo <= a <= hi; NaN is inside."""
    return from_end(a, lo) & ((a > hi) == 0)


@triton.jit
def in_band_ties(a, lo, hi, under_lo_cut, under_hi_cut):
    """`in_band`, where an end itself is inside only on the right side of its cut."""
    return in_band(a, lo, hi) & ((a != lo) | under_lo_cut) & (((a == hi) & under_hi_cut) == 0)


@triton.jit
def tie_hash(index, key):
    """The 32-bit hash of global indices [n] int64 under a scalar key; uint32 [n]."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    folded_key = key.to(tl.uint32) ^ ((key >> 32).to(tl.uint32) * 0x85EBCA6B)
    x = (low + high * 0x9E3779B9) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) * (folded_key | 1)


@triton.jit
def tie_ranks(index, key, TIE: tl.constexpr):
    """What the cuts are compared with: the index, or its hash; int64 [n]."""
    if TIE == TIE_INDEX:
        rank = index
    else:
        rank = tie_hash(index, key).to(tl.int64)
    return rank


@triton.jit
def draws(first, key, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """The 32-bit draws of global indices first .. first + BLOCK - 1; int64 [BLOCK].

    QUADS: `first` is a multiple of four, so that one Philox block serves four elements.
    """
    if QUADS:
        block = (first >> 2) + tl.arange(0, BLOCK // 4)
    else:
        block = (first + tl.arange(0, BLOCK)) >> 2
    low = block.to(tl.uint32)
    zero = low ^ low
    w0, w1, w2, w3 = tl.philox(key, low, (block >> 32).to(tl.uint32), zero, zero)
    if QUADS:
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        word = (first + tl.arange(0, BLOCK)) & 3
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return words.to(tl.int64)


@triton.jit
def rescale(entry, gain, prob, prob_step, rank, GAIN: tl.constexpr):
    """t_k: the kept entry times the model's gain, or divided by its own keep probability."""
    if GAIN == GAIN_MODEL:
        t = entry * gain
    else:
        t = tl.div_rn(entry, prob + rank.to(tl.float32) * prob_step)
    return t


# scores


@triton.jit
def mapped_score(score, scale, shift, floor):
    """max(score * scale + shift, floor); NaN is above the floor."""
    mapped = score * scale + shift
    return tl.where(mapped < floor, floor, mapped)


@triton.jit
def unless_lost(score, lost):
    """A score that no band holds where another model's entry takes this one's place."""
    return tl.where(lost, -1.0, score)


# weights


@triton.jit
def nearness(x, y, limit, floor):
    """How much of y replaces x: all of it where they are no farther apart than `limit`."""
    apart = tl.abs(x - y)
    one = tl.full(apart.shape, 1.0, tl.float32)
    share = tl.div_rn(one, tl.where(apart < floor, floor, apart)) * limit
    least = tl.where(share < 0, 0.0, share)
    return tl.where(least > 1, 1.0, least)


@triton.jit
def one_if_present(t):
    """1 where a model has an entry, otherwise 0; float32 [n]."""
    return tl.where(t != 0, 1.0, 0.0)


@triton.jit
def add_relation(relation, k, t, weight, floor, WEIGHTING: tl.constexpr):
    """What `weight_of` asks of all models, once t_k has joined t_1 ... t_(k-1); float32 [n]."""
    if WEIGHTING == WEIGHTING_NEARNESS:
        relation = tl.where(k == 0, t, nearness(relation, t, weight, floor))
    else:
        tl.static_assert(WEIGHTING == WEIGHTING_ALONE)
        relation = relation + one_if_present(t)
    return relation


@triton.jit
def weight_of(relation, k, weight, WEIGHTING: tl.constexpr):
    """w_k: the model's; of NEARNESS `relation` or what is left of it, of ALONE by the number of entries."""
    if WEIGHTING == WEIGHTING_NEARNESS:
        weight = tl.where(k == 0, 1.0 - relation, relation)
    elif WEIGHTING == WEIGHTING_ALONE:
        weight = tl.where(relation == 1, weight, 1.0)
    return weight


# vote


@triton.jit
def sign_of(x):
    """-1, 0 or 1 as float32; 0 for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def vote(votes, ballot, VOTE: tl.constexpr):
    """S after one more ballot."""
    if VOTE == VOTE_COUNT:
        votes = votes + sign_of(ballot)
    else:
        votes = votes + ballot
    return votes


@triton.jit
def cast_ballot(t, weight, BALLOT: tl.constexpr):
    """x_k: t_k or v_k."""
    if BALLOT == BALLOT_RAW:
        ballot = t
    else:
        ballot = t * weight
    return ballot


@triton.jit
def elected(votes, majority, ZERO_SIGN: tl.constexpr):
    """s: the sign of the vote, and the zero rule where that is zero; float32 [n]."""
    if ZERO_SIGN == ZERO_PLUS:
        zero = 1.0
    elif ZERO_SIGN == ZERO_MINUS:
        zero = -1.0
    elif ZERO_SIGN == ZERO_NONE:
        zero = 0.0
    else:
        zero = majority
    return tl.where(votes > 0, 1.0, tl.where(votes < 0, -1.0, zero))


# members


@triton.jit
def agrees(ballot, sign):
    """Non-zero and of the elected sign, or NaN."""
    turned = ballot.to(tl.int32, bitcast=True) ^ (sign.to(tl.int32, bitcast=True) & -2147483648)
    same = (turned.to(tl.float32, bitcast=True) <= 0) == 0
    return (same & (sign != 0)) | (ballot != ballot)


@triton.jit
def agrees_or_zero(ballot, sign):
    """Of the elected sign, zero included, or NaN."""
    return (sign_of(ballot) == sign) | (ballot != ballot)


@triton.jit
def members(ballot, v, sign, VOTE: tl.constexpr, MEMBERS: tl.constexpr):
    """M: who takes part in the reduction; bool [n]."""
    if VOTE == VOTE_NONE:
        if MEMBERS == MEMBERS_STRICT:
            belongs = v != 0
        else:
            belongs = (v == v) | (v != v)
    elif MEMBERS == MEMBERS_STRICT:
        belongs = agrees(ballot, sign)
    else:
        belongs = agrees_or_zero(ballot, sign)
    return belongs


# reduce


@triton.jit
def larger(best, v, member):
    """The member of larger magnitude, the later of equals; compared as integers, so that NaN is above all."""
    size = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    wins = size >= (best.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.where(member & wins, v, best)


@triton.jit
def reduce(reduced, member, t, weight, REDUCE: tl.constexpr):
    """R after one more model."""
    if REDUCE == REDUCE_MAX_ABS:
        reduced = larger(reduced, t * weight, member)
    elif REDUCE == REDUCE_SUM:
        reduced = reduced + tl.where(member, t * weight, 0.0)
    else:
        entry = tl.where(member, t, 0.0)
        reduced = fused_add(entry, tl.broadcast_to(weight, entry.shape), reduced)
    return reduced


@triton.jit
def add_share(divisor, member, weight, DIVISOR: tl.constexpr):
    """D after one more model."""
    if DIVISOR == DIVISOR_COUNT:
        divisor = divisor + tl.where(member, 1.0, 0.0)
    else:
        divisor = divisor + tl.where(member, weight, 0.0)
    return divisor


@triton.jit
def safe_divisor(divisor, floor, fill):
    """D, with `fill` where |D| is below `floor`."""
    return tl.where(tl.abs(divisor) < floor, fill, divisor)


@triton.jit
def divide(reduced, divisor, floor, fill, DIVISOR: tl.constexpr):
    """R / D."""
    if DIVISOR != DIVISOR_NONE:
        reduced = tl.div_rn(reduced, safe_divisor(divisor, floor, fill))
    return reduced


@triton.jit
def apply(base, reduced, scale, HAS_BASE: tl.constexpr):
    """b + R * scale, or R * scale without a base; not yet rounded to the output's dtype."""
    scaled = reduced * scale
    if HAS_BASE:
        scaled = base + scaled
    return scaled
