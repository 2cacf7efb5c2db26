"""Merges on spheres as their authors state them: loops over whole tensors, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slerp(t: float, a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """Row by row along `dim`, lengths at least 1e-7; a line where the directions are parallel."""
    one = a / a.norm(dim=dim, keepdim=True).clamp(min=1e-7)
    two = b / b.norm(dim=dim, keepdim=True).clamp(min=1e-7)
    cosine = (one * two).sum(dim=dim, keepdim=True).clamp(-1, 1)
    straight = 1 - cosine**2 <= 1e-16
    angle = torch.where(straight, torch.ones_like(cosine), cosine.acos())
    curved = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.where(straight, (1 - t) * a + t * b, curved)


def multislerp(vectors: Sequence[Tensor], weights: Sequence[float], eps: float = 1e-8) -> Tensor:
    """Logarithm at the mean direction, weighted mean there, exponential map back, mean length."""
    x = torch.stack([v.double().reshape(-1) for v in vectors])
    w = torch.tensor(weights, dtype=torch.float64)
    lengths = x.norm(dim=1)
    units = x / (lengths + eps)[:, None]
    mean = (w[:, None] * units).sum(dim=0)
    mean = mean / mean.norm()
    tangents = units - (units @ mean)[:, None] * mean
    tangent = (w[:, None] * tangents).sum(dim=0)
    angle = tangent.norm() + eps
    found = mean * angle.cos() + tangent * angle.sin() / angle
    return (found * (w * lengths).sum()).reshape(vectors[0].shape)


def karcher(
    vectors: Sequence[Tensor], weights: Sequence[float], max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    """The iteration on whole tensors."""
    x = [v.double().reshape(-1) for v in vectors]
    w = [weight / sum(weights) for weight in weights]
    lengths = [float(v.norm()) for v in x]
    valid = [k for k, length in enumerate(lengths) if length > tol]
    if not valid:
        return torch.zeros(vectors[0].shape, dtype=torch.float64)
    share = {k: w[k] / sum(w[j] for j in valid) for k in valid}
    units = {k: x[k] / lengths[k] for k in valid}
    mean = sum((share[k] * units[k] for k in valid), torch.zeros_like(x[0]))
    mean = units[valid[0]] if float(mean.norm()) < tol else mean / mean.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(mean)
        for k in valid:
            cosine = (mean @ units[k]).clamp(-1, 1)
            angle = cosine.acos()
            if float(angle) >= tol:
                step = step + share[k] * angle / angle.sin() * (units[k] - cosine * mean)
        distance = step.norm()
        if float(distance) < tol:
            break
        mean = distance.cos() * mean + distance.sin() * step / distance
        mean = mean / mean.norm()
    scale = sum(weight * length for weight, length in zip(w, lengths, strict=True))
    return (scale * mean).reshape(vectors[0].shape)


def stock(base: Tensor, models: Sequence[Tensor], rows: bool = False) -> Tensor:
    """t · mean + (1 - t) · base, t from the mean cosine of the pairs; of every row where `rows`."""
    b = base.double()
    w = [m.double() for m in models]
    shape = b.shape
    if not rows or b.dim() <= 1:
        b, w = b.reshape(1, -1), [m.reshape(1, -1) for m in w]
    taus = [m - b for m in w]
    cosines = []
    for j, one in enumerate(taus):
        for two in taus[j + 1 :]:
            product = (one.norm(dim=-1) * two.norm(dim=-1)).clamp(min=1e-6)
            cosines.append(((one * two).sum(dim=-1) / product).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(dim=0).unsqueeze(-1)
    n = len(w)
    below = 1 + (n - 1) * cosine
    t = torch.where(below.abs() < 1e-6, torch.zeros_like(below), n * cosine / below)
    return (t * sum(w) / n + (1 - t) * b).reshape(shape)


def geometric_median(points: Sequence[Tensor], weights: Sequence[float], eps: float, max_iter: int) -> Tensor:
    """Weiszfeld's iteration on whole tensors."""
    x = torch.stack([p.double().reshape(-1) for p in points])
    w = torch.tensor(weights, dtype=torch.float64)
    median = (w[:, None] * x).sum(dim=0) / w.sum()
    for _ in range(max_iter):
        pulls = w / (x - median).norm(dim=1).clamp(min=eps)
        median = (pulls[:, None] * x).sum(dim=0) / pulls.sum()
    return median.reshape(points[0].shape)
