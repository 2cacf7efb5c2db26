"""Every tolerance of the test suite, derived; `docs/numerics.md` gives the arithmetic that they bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tvfast.ops import _reference_stages as stages
from tvfast.ops._reference_stages import Tile
from tvfast.program import Divisor, Gain, Keep, Program, Reduce, TensorScalars, Vote

UNIT = 2.0**-24  # unit roundoff of float32
MOST_UNDECIDED = 0.01  # share of elements that a bounded test may leave out
_SUM_BITS = 40


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at |x|, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


def n_roundings(program: Program, n_models: int) -> int:
    """Roundings between the inputs and the last addition, which has |θ₀| + |θ| in the bound to itself.

    Subtraction, gain, weight, K - 1 additions, division, scale make K + 4. A weight divisor has K - 1
    additions of its own, a probability that depends on rank 2 operations.
    """
    return (
        n_models
        + 4
        + (n_models if program.divisor is Divisor.WEIGHT else 0)
        + (2 if program.gain is Gain.INVERSE_PROBABILITY else 0)
    )


def combine_error(tile: Tile, program: Program, scalars: TensorScalars, dtype: torch.dtype) -> Tensor:
    """Forward-error bound of `combine` at float32 with output `dtype`, float64 [n].

    n_roundings · 2^-24 · (|λ| · Σ|v_k| / |D| + |θ₀| + |θ|) + ½ ulp(θ); the tile is at float64.
    """
    kept = stages.keep(tile, program, scalars)
    rescaled = stages.rescale(program, scalars, kept)
    weights = stages.weights(tile, program, scalars, rescaled)
    weighted = stages.weigh(weights, rescaled)
    ballots = stages.cast_ballots(program, rescaled, weighted)
    belong = stages.members(program, scalars, ballots, weighted)
    magnitudes = [torch.where(member, v.abs(), 0.0) for member, v in zip(belong, weighted, strict=True)]
    mass = stages.divide(program, scalars, weights, belong, sum(magnitudes[1:], magnitudes[0])).abs()
    reduced = stages.divide(
        program,
        scalars,
        weights,
        belong,
        stages.reduce(program, weights, belong, rescaled, weighted),
    )
    result = stages.apply(scalars, tile.base, reduced)
    base = torch.zeros_like(result) if tile.base is None else tile.base
    terms = abs(scalars.scale) * mass + base.abs() + result.abs()
    return n_roundings(program, len(weighted)) * UNIT * terms + ulp(result, dtype) / 2


def undecided(tile: Tile, program: Program, scalars: TensorScalars) -> Tensor:
    """Elements where a float32 rounding may turn a decision, bool [n]; the tile is at float64."""
    kept = stages.keep(tile, program, scalars)
    rescaled = stages.rescale(program, scalars, kept)
    weights = stages.weights(tile, program, scalars, rescaled)
    weighted = stages.weigh(weights, rescaled)
    ballots = stages.cast_ballots(program, rescaled, weighted)
    n_models = len(weighted)
    unclear = torch.zeros(tile.n, dtype=torch.bool)
    unclear |= _near_ends(tile, program, scalars, kept.taus)
    if program.keep in (Keep.RANDOM_BY_RANK, Keep.BAND_BY_RANK):
        for tau in kept.taus:
            unclear |= _near_neighbour(tau.abs())
    if program.vote is Vote.MASS:
        mass = sum(ballots[1:], ballots[0])
        magnitude = sum((x.abs() for x in ballots[1:]), ballots[0].abs())
        unclear |= (mass.abs() <= (n_models + 4) * UNIT * magnitude) & (magnitude > 0)
    if program.reduce is Reduce.MAX_ABS and n_models > 1:
        belong = stages.members(program, scalars, ballots, weighted)
        sizes = torch.stack([torch.where(m, v.abs(), 0.0) for m, v in zip(belong, weighted, strict=True)])
        top = sizes.topk(2, dim=0).values
        unclear |= (top[0] - top[1] <= 8 * UNIT * top[0]) & (top[0] > 0)
    return unclear


def _near_ends(tile: Tile, program: Program, scalars: TensorScalars, taus: Sequence[Tensor]) -> Tensor:
    unclear = torch.zeros(tile.n, dtype=torch.bool)
    if program.keep not in (Keep.BAND, Keep.VARIANCE):
        return unclear
    for tau, model in zip(taus, scalars.models, strict=True):
        key, reach = tau.abs(), 2 * UNIT * tau.abs()
        if program.keep is Keep.VARIANCE:
            squares = sum((other * other for other in taus), torch.zeros_like(tau)) / len(taus)
            key, reach = stages.variance(taus), 8 * UNIT * squares
        for end in (model.lo, model.hi):
            if math.isfinite(end):
                unclear |= (key - float(stages.float32_value(end, key))).abs() <= reach
    return unclear


def _near_neighbour(magnitude: Tensor) -> Tensor:
    ordered, order = magnitude.sort()
    gap = torch.diff(ordered)
    close = (gap > 0) & (
        gap <= 4 * UNIT * ordered[1:]
    )  # equal ones are equal at float32 too: decided by index
    unclear = torch.zeros(magnitude.numel(), dtype=torch.bool)
    unclear[order[1:][close]] = True
    unclear[order[:-1][close]] = True
    return unclear


def sum_error(addends: Sequence[float]) -> float:
    """Bound of an order-independent sum: half a grid unit per addend, and one rounding of the total."""
    largest = max((abs(x) for x in addends), default=0.0)
    if largest == 0.0:
        return 0.0
    window = math.frexp(largest)[1] // _SUM_BITS
    return len(addends) * 2.0 ** (_SUM_BITS * (window - 1) - 1) + abs(math.fsum(addends)) * 2.0**-52


def product_error(n_steps: int, magnitudes: Tensor) -> Tensor:
    """Of a float32 sum of `n_steps` products in any order; `magnitudes` is the sum of their magnitudes."""
    return n_steps * UNIT / (1 - n_steps * UNIT) * magnitudes


def factored_error(
    samples: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Of scores of a linear layer, float64 [o, i]; e [R, o] and a [R, i] per sample, all at float64.

    Σ_j |w_j| (γ_R Σ_r |e_r| |a_r| |f_j| + (N + 4) 2^-24 |G_j f_j|), f_j the factor of G_j: θ, θ - θ₀, or G_j
    itself, whose own error counts twice.
    """
    total = torch.zeros(samples[0][0].shape[1], samples[0][1].shape[1], dtype=torch.float64)
    for (e, a), factor, weight in zip(samples, factors, weights, strict=True):
        wrong = product_error(len(e), e.abs().T @ a.abs())
        rounded = (len(samples) + 4) * UNIT * ((e.T @ a) * factor).abs()
        total += abs(weight) * (2 * wrong * (factor.abs() + wrong) + rounded)
    return total


def kron_error(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of B X A in float32, float64 [o, i]; dense operands at float64, and no zero of a block is a step."""
    steps_a = int((a != 0).sum(0).max())
    steps_b = int((b != 0).sum(1).max())
    return product_error(steps_a + steps_b + 2, b.abs() @ x.abs() @ a.abs())
