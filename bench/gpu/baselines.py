"""What torch needs for the same on a device, beside the formulas of `bench.baselines`.

TIES trims at density, elects by mass (zero votes plus) and takes the mean over those who agree, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.baselines import n_kept


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """By torch.compile; without a GPU traced only, as the rows are then run for their logic."""
    return torch.compile(function, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")


def task_arithmetic(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """θ₀ + Σ_k w_k (θ_k - θ₀) in float32, in a form that a compiler can fuse into one pass."""
    origin = base.float()
    total = torch.zeros_like(origin)
    for model, weight in zip(models, weights, strict=True):
        total = total + weight * (model.float() - origin)
    return (origin + total).to(base.dtype)


def ties_trimmed(base: Tensor, models: Sequence[Tensor], thresholds: Sequence[Tensor]) -> Tensor:
    """TIES with given thresholds, entries equal to one kept, in a form that a compiler can fuse."""
    origin = base.float()
    taus = []
    for model, threshold in zip(models, thresholds, strict=True):
        tau = model.float() - origin
        taus.append(torch.where(tau.abs() >= threshold, tau, 0.0))
    vote = sum(taus[1:], taus[0])
    sign = torch.where(vote >= 0, 1.0, -1.0)
    agreeing = [tau * sign > 0 for tau in taus]
    total = sum(
        (torch.where(agrees, tau, 0.0) for tau, agrees in zip(taus, agreeing, strict=True)),
        torch.zeros_like(origin),
    )
    n = sum((agrees.float() for agrees in agreeing), torch.zeros_like(origin))
    return (total / n.clamp(min=1) + origin).to(base.dtype)


def topk_thresholds(base: Tensor, models: Sequence[Tensor], density: float) -> list[Tensor]:
    """[K] scalars on the device: the smallest of the k largest magnitudes, by torch.topk unsorted."""
    k = n_kept(density, base.numel())
    return [
        torch.topk((model.float() - base.float()).abs().view(-1), k, sorted=False).values.amin()
        for model in models
    ]


def ties_topk(base: Tensor, models: Sequence[Tensor], density: float) -> Tensor:
    """TIES by torch.topk."""
    return ties_trimmed(base, models, topk_thresholds(base, models, density))


def ties_peft(base: Tensor, models: Sequence[Tensor], density: float) -> Tensor:
    """The formulas of peft 0.17's `ties` on whole task vectors, in the storage type.

    The mask is scattered from torch.topk, the sign is that of the sum, and the mean is over those of that
    sign; the vote's zero elects nothing.
    """
    taus = torch.stack([model - base for model in models])
    n = base.numel()
    for tau in taus:
        _, order = torch.topk(tau.abs().view(-1), n_kept(density, n), largest=True)
        mask = torch.zeros(n, dtype=tau.dtype, device=tau.device)
        mask[order] = 1
        tau.mul_(mask.view_as(tau))
    agree = taus.sign() == taus.sum(0).sign()
    return base + (taus * agree).sum(0) / agree.sum(0).clamp(min=1)


def stacked_task_arithmetic(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The formulas of mergekit 0.1.5's generalised task arithmetic, in the storage type."""
    taus = torch.stack([model - base for model in models])
    scale = torch.tensor(weights, dtype=taus.dtype, device=taus.device).view(-1, *[1] * base.dim())
    return base + (taus * scale).sum(0)


def dare(base: Tensor, models: Sequence[Tensor], density: float) -> Tensor:
    """Task arithmetic of Bernoulli-masked task vectors over their density, in float32."""
    merged = base.float()
    for model in models:
        tau = model.float() - base.float()
        merged += tau * torch.empty_like(tau).bernoulli_(density) / density
    return merged.to(base.dtype)


def della(base: Tensor, models: Sequence[Tensor], density: float, epsilon: float) -> Tensor:
    """Keep probabilities by rank within a row, from density - epsilon to density + epsilon; TIES' mean."""
    taus = []
    for model in models:
        tau = model.float() - base.float()
        ranks = tau.abs().argsort(1).argsort(1)
        probability = density - epsilon + ranks * (2 * epsilon / (base.shape[1] - 1))
        taus.append(tau * torch.bernoulli(probability) / probability)
    sign = torch.where(torch.stack(taus).sum(0) >= 0, 1.0, -1.0)
    agree = torch.stack([tau * sign > 0 for tau in taus])
    total = (torch.stack(taus) * agree).sum(0) / agree.sum(0).clamp(min=1)
    return (base.float() + total).to(base.dtype)


def slerp(base: Tensor, model: Tensor, t: float) -> Tensor:
    """Along the arc between two tensors as vectors, in float32."""
    a, b = base.float(), model.float()
    angle = torch.acos((a * b).sum().div(a.norm() * b.norm()).clamp(-1, 1))
    return ((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)).to(base.dtype)


def gram(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """[K, K] inner products of task vectors, in float32."""
    taus = torch.stack([(model.float() - base.float()).view(-1) for model in models])
    return taus @ taus.T


def masked_by_scores(
    base: Tensor, models: Sequence[Tensor], scores: Sequence[Tensor], thresholds: Sequence[Tensor]
) -> Tensor:
    """Task vectors where their importance reaches a given threshold, summed, in a form that fuses."""
    origin = base.float()
    total = torch.zeros_like(origin)
    for model, score, threshold in zip(models, scores, thresholds, strict=True):
        total = total + torch.where(score >= threshold, model.float() - origin, 0.0)
    return (origin + total).to(base.dtype)


def importance(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """total += |g θ|."""
    total += (gradient.float() * weight.float()).abs()
