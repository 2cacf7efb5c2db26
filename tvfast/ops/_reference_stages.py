"""The stages of `docs/numerics.md` in torch, one function each, for one tile of one entry.

`K` tensors [n] stand for the models in order, in the tile's compute dtype unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.errors import ArgumentError
from tvfast.ops._philox_torch import draws, tie_hash
from tvfast.program import (
    Ballot,
    Cross,
    Divisor,
    Gain,
    Keep,
    Members,
    ModelScalars,
    Program,
    Reduce,
    ScoreMap,
    TensorScalars,
    Tie,
    Vote,
    Weighting,
    ZeroSign,
)

_INT64_MAX = 2**63 - 1
_UINT64 = 2**64
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_CANONICAL_NAN = {
    torch.float64: 0x7FF8000000000000,
    torch.float32: 0x7FC00000,
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
}


@dataclass(slots=True)
class Tile:
    """Elements `start` to `start + n` of an entry, widened to the compute dtype."""

    start: int  # within the entry
    index: int  # global index of the first element
    base: Tensor | None  # [n]
    models: list[Tensor]  # K tensors [n]
    scores: list[Tensor]  # K tensors [n], or none
    score_maps: tuple[ScoreMap, ...]  # K, or none
    masks: list[Tensor]  # K planes of int64 words, of the whole entry
    row: int  # elements per row; the tile holds whole rows wherever ranks are asked for
    task_vectors: bool  # the models are task vectors already

    @property
    def n(self) -> int:
        return self.models[0].numel()


def float32_value(number: float, like: Tensor) -> Tensor:
    """A scalar rounded to float32, as a 0-d tensor of the dtype and device of `like`."""
    return torch.tensor(number, dtype=torch.float32).to(dtype=like.dtype, device=like.device)


def task_vectors(tile: Tile) -> list[Tensor]:
    """d_k = m_k - b; m_k where the models are task vectors, or without a base."""
    if tile.base is None or tile.task_vectors:
        return list(tile.models)
    return [model - tile.base for model in tile.models]


def magnitude_bits(x: Tensor) -> Tensor:
    """Bit patterns of |x| as int64 [n], every NaN alike: ordered as magnitudes are, NaN above infinity."""
    bits = x.abs().view(_BITS[x.element_size()]).to(torch.int64)
    return torch.where(torch.isnan(x), _CANONICAL_NAN[x.dtype], bits)


def variance(taus: Sequence[Tensor]) -> Tensor:
    """Population variance of d_1 ... d_K in float64, rounded once to float32."""
    total = torch.zeros_like(taus[0], dtype=torch.float64)
    for tau in taus:
        total = total + tau.to(torch.float64)
    n_models = torch.full_like(total, len(taus))
    mean = total / n_models
    squares = torch.zeros_like(total)
    for tau in taus:
        deviation = tau.to(torch.float64) - mean
        squares = squares + deviation * deviation
    return (squares / n_models).to(torch.float32).to(taus[0].dtype)


def key_bits(tile: Tile, keep: Keep, model: int) -> Tensor:
    """Bit patterns of what a keep stage ranks, int64 [n].

    Raises:
        ArgumentError: the stage ranks nothing.
    """
    match keep:
        case Keep.BAND:
            return magnitude_bits(task_vectors(tile)[model])
        case Keep.SCORE:
            return magnitude_bits(score(tile, model))
        case Keep.VARIANCE:
            return magnitude_bits(variance(task_vectors(tile)))
        case _:
            raise ArgumentError(f"keep must be BAND, SCORE or VARIANCE to rank; found {keep.name}.")


def ranks(tau: Tensor, row: int) -> Tensor:
    """Rank of |tau| within its row of `row` elements (0: one row), equals by index; int64 [n]."""
    n = tau.numel()
    if n == 0:
        return torch.zeros(0, dtype=torch.int64, device=tau.device)
    width = min(row or n, n)
    n_rows = -(-n // width)
    padded = torch.full((n_rows * width,), _INT64_MAX, dtype=torch.int64, device=tau.device)
    padded[:n] = magnitude_bits(tau)
    order = torch.sort(padded.view(n_rows, width), dim=1, stable=True).indices
    rank = torch.empty_like(order)
    positions = torch.arange(width, dtype=torch.int64, device=tau.device).expand(n_rows, width)
    rank.scatter_(1, order, positions)
    return rank.view(-1)[:n]


def tie_ranks(tile: Tile, program: Program, key: int) -> Tensor:
    """What `lo_cut` and `hi_cut` are compared with: g, or the hash of g; int64 [n]."""
    device = tile.models[0].device
    index = torch.arange(tile.index, tile.index + tile.n, dtype=torch.int64, device=device)
    return index if program.tie is Tie.INDEX else tie_hash(key, index)


def in_band(magnitude: Tensor, tile: Tile, program: Program, scalars: ModelScalars) -> Tensor:
    """lo <= magnitude <= hi with the tie rule at both ends; NaN is inside."""
    # Ends are magnitudes themselves, so at float64 they are not rounded.
    lo = torch.tensor(scalars.lo, dtype=magnitude.dtype, device=magnitude.device)
    hi = torch.tensor(scalars.hi, dtype=magnitude.dtype, device=magnitude.device)
    inside = ~(magnitude < lo) & ~(magnitude > hi)
    if program.tie is Tie.GE:
        return inside
    rank = tie_ranks(tile, program, scalars.key)
    # Cuts are unsigned 64-bit; ranks stay below 2^63, so a clamped cut compares alike.
    inside &= ~(magnitude == lo) | (rank < min(scalars.lo_cut, _INT64_MAX))
    return inside & (~(magnitude == hi) | (rank >= min(scalars.hi_cut, _INT64_MAX)))


def bits_of_plane(words: Tensor, start: int, n: int) -> Tensor:
    """Bits start .. start + n - 1 of a plane of 64-bit words, lowest bit first; bool [n]."""
    position = torch.arange(start, start + n, dtype=torch.int64, device=words.device)
    return (words[position >> 6] >> (position & 63)) & 1 == 1


def plane_of_bits(bits: Tensor) -> Tensor:
    """Bool [n] as ceil(n / 64) int64 words, lowest bit first, the rest of the last word zero."""
    n_words = -(-bits.numel() // 64)
    padded = torch.zeros(64 * n_words, dtype=torch.int64, device=bits.device)
    padded[: bits.numel()] = bits.to(torch.int64)
    shifts = torch.arange(64, dtype=torch.int64, device=bits.device)
    # The terms are distinct powers of two modulo 2^64, so the sum is their bitwise or.
    return (padded.view(n_words, 64) << shifts).sum(dim=1)


def rank_of_model(tile: Tile, program: Program, tau: Tensor) -> Tensor:
    """Ranks for the keep stages that use them, otherwise zero."""
    if program.keep in (Keep.RANDOM_BY_RANK, Keep.BAND_BY_RANK):
        return ranks(tau, tile.row)
    return torch.zeros(tile.n, dtype=torch.int64, device=tau.device)


def score(tile: Tile, k: int) -> Tensor:
    """s_k: |score_k|, or what its map makes of it; [n]."""
    raw = tile.scores[k]
    if not tile.score_maps:
        return raw.abs()
    found = tile.score_maps[k]
    mapped = raw * float32_value(found.scale, raw) + float32_value(found.shift, raw)
    floor = float32_value(found.floor, raw)
    return torch.where(mapped < floor, floor, mapped).abs()


def crossed_score(tile: Tile, program: Program, scalars: TensorScalars, k: int) -> Tensor:
    """s_k, and -1 where another model's score rules the entry out; [n]."""
    own = score(tile, k)
    lost = torch.zeros_like(own, dtype=torch.bool)
    for j, other in enumerate(scalars.models):
        if j != k and program.cross is Cross.WINNER:
            lost |= score(tile, j) >= own
        elif j != k and program.cross is Cross.EXCLUDE_OTHERS:
            lost |= in_band(score(tile, j), tile, program, other)
    return torch.where(lost, -torch.ones_like(own), own)


def keep_one(
    tile: Tile, program: Program, scalars: TensorScalars, k: int, tau: Tensor, rank: Tensor, shared: Tensor
) -> Tensor:
    """keep(d_k), bool [n]; `shared` is the variance across models where the stage asks for it."""
    own = scalars.models[k]
    match program.keep:
        case Keep.ALL:
            return torch.ones_like(tau, dtype=torch.bool)
        case Keep.BAND:
            return in_band(tau.abs(), tile, program, own)
        case Keep.SCORE:
            return in_band(crossed_score(tile, program, scalars, k), tile, program, own)
        case Keep.VARIANCE:
            return in_band(shared, tile, program, own)
        case Keep.RANDOM:
            return draws(own.key, tile.index, tile.n, tau.device) < own.limit
        case Keep.RANDOM_BY_RANK:
            step = (own.limit_step + 2**63) % _UINT64 - 2**63  # the int64 of the same bits
            rise = ((rank * step) >> 32) & 0xFFFFFFFF
            return draws(own.key, tile.index, tile.n, tau.device) < own.limit + rise
        case Keep.BAND_BY_RANK:
            return (rank >= own.rank_lo) & (rank < own.rank_hi)
        case Keep.MASK:
            return bits_of_plane(tile.masks[k], tile.start, tile.n)


@dataclass(slots=True)
class Kept:
    """The keep stage of one tile."""

    taus: list[Tensor]  # d_k
    kept: list[Tensor]  # bool [n]
    entries: list[Tensor]  # d_k where kept, otherwise +0
    ranks: list[Tensor]  # int64 [n]


def keep(tile: Tile, program: Program, scalars: TensorScalars) -> Kept:
    """kept_k = keep(d_k) or isnan(d_k)."""
    taus = task_vectors(tile)
    shared = variance(taus) if program.keep is Keep.VARIANCE else taus[0]
    result = Kept(taus, [], [], [])
    for k, tau in enumerate(taus):
        rank = rank_of_model(tile, program, tau)
        kept = keep_one(tile, program, scalars, k, tau, rank, shared) | torch.isnan(tau)
        result.kept.append(kept)
        result.entries.append(torch.where(kept, tau, torch.zeros_like(tau)))
        result.ranks.append(rank)
    return result


def rescale(program: Program, scalars: TensorScalars, kept: Kept) -> list[Tensor]:
    """t_k: the kept entry times the model's gain, or divided by its own keep probability."""
    rescaled = []
    for model, entry, rank in zip(scalars.models, kept.entries, kept.ranks, strict=True):
        if program.gain is Gain.MODEL:
            rescaled.append(entry * float32_value(model.gain, entry))
        else:
            slope = rank.to(entry.dtype) * float32_value(model.prob_step, entry)
            rescaled.append(entry / (float32_value(model.prob, entry) + slope))
    return rescaled


def nearness(x: Tensor, y: Tensor, limit: Tensor, floor: Tensor) -> Tensor:
    """How much of y replaces x: min(max(1 / max(|x - y|, floor) * limit, 0), 1)."""
    apart = (x - y).abs()
    share = torch.ones_like(apart) / torch.where(apart < floor, floor, apart) * limit
    least = torch.where(share < 0, torch.zeros_like(share), share)
    return torch.where(least > 1, torch.ones_like(share), least)


def n_present(entries: Sequence[Tensor]) -> Tensor:
    """How many of the t_k are not zero; int64 [n]."""
    return torch.stack([t != 0 for t in entries]).sum(dim=0)


def weights(tile: Tile, program: Program, scalars: TensorScalars, rescaled: Sequence[Tensor]) -> list[Tensor]:
    """w_k: weight_k, weight_k * s_k, or what NEARNESS and ALONE make of the t_k; K tensors [n]."""
    like = tile.models[0]
    if program.weighting is Weighting.NEARNESS:
        limit = float32_value(scalars.models[1].weight, like)
        share = nearness(rescaled[0], rescaled[1], limit, float32_value(scalars.divisor_floor, like))
        return [1 - share, share]
    of_model = [torch.full_like(like, float(float32_value(m.weight, like))) for m in scalars.models]
    if program.weighting is Weighting.MODEL:
        return of_model
    if program.weighting is Weighting.ALONE:
        alone = n_present(rescaled) == 1
        return [torch.where(alone, weight, torch.ones_like(weight)) for weight in of_model]
    return [weight * score(tile, k) for k, weight in enumerate(of_model)]


def weigh(weights: Sequence[Tensor], rescaled: Sequence[Tensor]) -> list[Tensor]:
    """v_k = t_k * w_k."""
    return [t * weight for weight, t in zip(weights, rescaled, strict=True)]


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1 as int64; 0 for NaN."""
    return (x > 0).to(torch.int64) - (x < 0).to(torch.int64)


def vote(program: Program, ballots: Sequence[Tensor]) -> Tensor:
    """Sign of S, before the zero-sign rule; int64 [n]."""
    if program.vote is Vote.COUNT:
        count = torch.zeros_like(ballots[0], dtype=torch.int64)
        for ballot in ballots:
            count = count + sign(ballot)
        return sign(count)
    mass = torch.zeros_like(ballots[0])
    for ballot in ballots:
        mass = mass + ballot
    return sign(mass)


def elect(program: Program, scalars: TensorScalars, voted: Tensor) -> Tensor:
    """s: the sign of the vote, and `zero_sign` where that is zero; int64 [n]."""
    match program.zero_sign:
        case ZeroSign.PLUS:
            fallback = 1
        case ZeroSign.MINUS:
            fallback = -1
        case ZeroSign.NONE:
            fallback = 0
        case ZeroSign.MAJORITY:
            fallback = int(scalars.majority)
    return torch.where(voted == 0, fallback, voted)


def cast_ballots(program: Program, rescaled: Sequence[Tensor], weighted: Sequence[Tensor]) -> list[Tensor]:
    """x_k: t_k or v_k."""
    return list(rescaled if program.ballot is Ballot.RAW else weighted)


def members(
    program: Program, scalars: TensorScalars, ballots: Sequence[Tensor], weighted: Sequence[Tensor]
) -> list[Tensor]:
    """M: who takes part in the reduction; K tensors bool [n]."""
    if program.vote is Vote.NONE:
        if program.members is Members.ZERO_COUNTS:
            return [torch.ones_like(v, dtype=torch.bool) for v in weighted]
        return [v != 0 for v in weighted]
    elected = elect(program, scalars, vote(program, ballots))
    belong = []
    for ballot in ballots:
        agrees = sign(ballot) == elected
        if program.members is Members.STRICT:
            agrees &= ballot != 0
        belong.append(agrees | torch.isnan(ballot))
    return belong


def fused_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once; [n] float32. At float64, which has no exact product here, rounded twice."""
    if a.dtype is not torch.float32:
        return a * b + c
    product, addend = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = product + addend
    # The product is exact. Knuth's two-sum gives the rounding error of the sum; rounding to odd by it makes
    # the second rounding, to float32, as if from the exact sum.
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    odd = torch.isfinite(error) & (error != 0) & (bits & 1 == 0)
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(odd, bits + toward, bits).view(torch.float64).to(torch.float32)


def reduce(
    program: Program,
    weights: Sequence[Tensor],
    belong: Sequence[Tensor],
    rescaled: Sequence[Tensor],
    weighted: Sequence[Tensor],
) -> Tensor:
    """R: the members' sum from -0 in order, fused or not, or the member of largest magnitude."""
    zero = torch.zeros_like(weighted[0])
    if program.reduce is Reduce.FUSED_SUM:
        total = -zero
        for member, t, weight in zip(belong, rescaled, weights, strict=True):
            total = fused_add(torch.where(member, t, zero), weight, total)
        return total
    if program.reduce is Reduce.SUM:
        total = -zero
        for member, v in zip(belong, weighted, strict=True):
            total = total + torch.where(member, v, zero)
        return total
    largest = zero
    for member, v in zip(belong, weighted, strict=True):
        wins = torch.isnan(v) | (~torch.isnan(largest) & (v.abs() >= largest.abs()))
        largest = torch.where(member & wins, v, largest)
    return largest


def divide(
    program: Program,
    scalars: TensorScalars,
    weights: Sequence[Tensor],
    belong: Sequence[Tensor],
    reduced: Tensor,
) -> Tensor:
    """R / D, with `divisor_fill` where |D| is below `divisor_floor`."""
    if program.divisor is Divisor.NONE:
        return reduced
    divisor = torch.zeros_like(reduced)
    for member, weight in zip(belong, weights, strict=True):
        share = torch.ones_like(reduced) if program.divisor is Divisor.COUNT else weight
        divisor = divisor + torch.where(member, share, torch.zeros_like(reduced))
    floor, fill = float32_value(scalars.divisor_floor, reduced), float32_value(scalars.divisor_fill, reduced)
    return reduced / torch.where(divisor.abs() < floor, fill, divisor)


def apply(scalars: TensorScalars, base: Tensor | None, reduced: Tensor) -> Tensor:
    """b + R * scale, or R * scale without a base; not yet rounded to the output's dtype."""
    scaled = reduced * float32_value(scalars.scale, reduced)
    return scaled if base is None else base + scaled


def _odd_float32(x: Tensor) -> Tensor:
    # float64 to float32 rounded to odd: a later rounding to 16 bits is then as if from the float64 itself.
    near = x.to(torch.float32)
    bits = near.view(torch.int32)
    inexact_and_even = (near.to(torch.float64) != x) & (bits & 1 == 0) & ~torch.isnan(x)
    away = torch.where(near.abs().to(torch.float64) > x.abs(), -1, 1).to(torch.int32)
    return torch.where(inexact_and_even, bits + away, bits).view(torch.float32)


def write(out: Tensor, result: Tensor) -> None:
    """Rounds `result` [n] once, to nearest even, into `out` [n]; NaN becomes the one quiet NaN."""
    nan = torch.isnan(result)
    if result.dtype == torch.float64 and out.element_size() == 2:
        result = _odd_float32(result)
    out.copy_(result)
    out.view(_BITS[out.element_size()]).masked_fill_(nan, _CANONICAL_NAN[out.dtype])
