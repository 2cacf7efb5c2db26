"""Masks of the entries that tasks need, from task vectors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def consensus(
    base: Tensor, models: Sequence[Tensor], thresholds: Sequence[float], agree: int, scale: float
) -> Tensor:
    """b + scale · Σ_t τ_t where |τ_t| > threshold_t · |Σ τ - τ_t| for at least `agree` tasks; b elsewhere.

    Returns:
        A tensor of the base's shape, float32, or float64 where an input is.
    """
    wide = torch.float32
    for x in (base, *models):
        wide = torch.promote_types(wide, x.dtype)
    start = base.to(wide)
    taus = [model.to(wide) - start for model in models]
    total = torch.zeros_like(start)
    for tau in taus:
        total += tau
    votes = torch.zeros(start.shape, dtype=torch.int16, device=start.device)
    for tau, threshold in zip(taus, thresholds, strict=True):
        votes += tau.abs() > threshold * (total - tau).abs()
    kept = (votes >= agree) | total.isnan()
    return start + torch.where(kept, total, 0.0) * scale
