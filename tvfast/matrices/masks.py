"""Masks of the entries that tasks need, from task vectors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**17
"""Elements of each model that are widened at a time; no result depends on it."""


def consensus(
    base: Tensor, models: Sequence[Tensor], thresholds: Sequence[float], agree: int, scale: float
) -> Tensor:
    """b + scale · Σ_t τ_t where |τ_t| > threshold_t · |Σ τ - τ_t| for at least `agree` tasks; b elsewhere.

    Returns:
        A tensor of the base's shape, float32, or float64 where an input is.
    """
    out = torch.empty(base.shape, dtype=_wide(base, models), device=base.device)
    flat = [x.reshape(-1) for x in (base, *models)]
    result = out.view(-1)
    for begin in range(0, out.numel(), CHUNK):
        span = slice(begin, begin + CHUNK)
        start, *taus = (x[span].to(out.dtype, copy=True) for x in flat)
        for tau in taus:
            tau -= start
        total = torch.zeros_like(start)
        for tau in taus:
            total += tau
        votes = torch.zeros(start.shape, dtype=torch.int16, device=start.device)
        for tau, threshold in zip(taus, thresholds, strict=True):
            votes += tau.abs() > torch.sub(total, tau).abs_().mul_(threshold)
        kept = (votes >= agree) | total.isnan()
        torch.add(start, torch.where(kept, total, 0.0).mul_(scale), out=result[span])
    return out


def _wide(base: Tensor, models: Sequence[Tensor]) -> torch.dtype:
    wide = torch.float32
    for x in (base, *models):
        wide = torch.promote_types(wide, x.dtype)
    return wide


def competition_balanced(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    ratio: float,
    outliers: float,
    scale: float,
) -> Tensor:
    """b + scale · Σ_t w_t τ̂_t S_t / Σ_t S_t, S_t the share of task t's scores that are among its largest.

    τ̂_t is τ_t with magnitudes clamped to all but a share `outliers` at each end. The scores are
    exp(T · N(|τ̂_t|)²) · tanh(τ̂_t · Σ τ̂), N scaling a task's values to [0, 1]; S_t is N of the scores after
    those below the largest share `ratio` are raised to its least.

    Returns:
        A tensor of the base's shape, float32, or float64 where an input is.
    """
    wide = _wide(base, models)
    start = base.to(wide)
    n = start.numel()
    if n == 0:
        return start
    cut = int(n * outliers)
    clamped = []
    for model in models:
        tau = (model.to(wide) - start).reshape(-1)
        size = tau.abs()
        least, most = _smallest(size, cut), _smallest(size, n - 1 - cut)
        clamped.append(tau.sign().mul_(size.clamp_(least, most)))
    together = torch.zeros_like(clamped[0])
    for tau in clamped:
        together += tau
    total, divisor = torch.zeros_like(together), torch.zeros_like(together)
    for tau, weight in zip(clamped, weights, strict=True):
        scores = torch.exp(len(models) * _unit_range(tau.abs()).square()) * torch.tanh(tau * together)
        least = _smallest(scores, min(n - 1, int(n * (1.0 - ratio))))
        share = _unit_range(scores.clamp_(min=least))
        total += weight * tau * share
        divisor += share
    return start + (total / divisor.clamp(min=1e-12)).view(start.shape) * scale


def _smallest(x: Tensor, rank: int) -> float:
    """The value of an ascending rank, from 0; NaN is last."""
    return float(x.kthvalue(rank + 1).values)


def _unit_range(x: Tensor) -> Tensor:
    """Scaled to [0, 1]; 0 where all values are equal."""
    least, most = x.aminmax()
    return (x - least) / (most - least) if bool(most > least) else torch.zeros_like(x)
