"""Merges of matrices by their singular vectors. D_t [o, i] are task vectors of one layer, T of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def polar(x: Tensor) -> Tensor:
    """The orthogonal factor of X [m, n]: U Vᵀ of its singular value decomposition."""
    u, _, vh = _svd(x)
    return u @ vh


def tsv_m(deltas: Sequence[Tensor]) -> Tensor:
    """U⊥ diag(s) V⊥ᵀ: the leading min(o, i) / T singular triplets of every D_t, made orthogonal together."""
    n_kept = max(1, min(deltas[0].shape) // len(deltas))
    return _recombined(*_leading(deltas, n_kept))


def iso_c(total: Tensor) -> Tensor:
    """mean(s) U Vᵀ of D = U diag(s) Vᵀ."""
    u, s, vh = _svd(total)
    return s.mean() * (u @ vh)


def iso_cts(deltas: Sequence[Tensor], common: float) -> Tensor:
    """Isotropic in a common subspace of Σ D_t and in what every D_t has outside of it.

    The common subspace are the leading singular vectors of the sum, about a share `common` of min(o, i), so
    many that the rest divides among the tasks.
    """
    size, n_tasks = min(deltas[0].shape), len(deltas)
    n_own = min(round((size - int(size * common)) / n_tasks), size // n_tasks)
    n_common = size - n_own * n_tasks
    u, s, vh = _svd(torch.stack(list(deltas)).sum(dim=0))
    u, s, vh = u[:, :n_common], s[:n_common], vh[:n_common]
    if n_own:
        outside = [delta - u @ (u.T @ delta) for delta in deltas]
        own_u, own_s, own_vh = _leading(outside, n_own)
        u, s, vh = torch.cat([own_u, u], dim=1), torch.cat([own_s, s]), torch.cat([own_vh, vh])
    return _recombined(u, s.mean().expand_as(s), vh)


def knots(deltas: Sequence[Tensor], density: float, smallest: float) -> Tensor:
    """TIES in a common basis: U · TIES(diag(s) V_t) of [D_1 ... D_T] = U diag(s) [V_1 ... V_T].

    Singular values up to `smallest` are left out. TIES trims every task to its share `density` of largest
    magnitudes, elects signs by mass, and averages those that agree.
    """
    u, s, vh = _svd(torch.cat(list(deltas), dim=1).to(torch.float64))
    kept = s > smallest
    aligned = s[kept, None] * vh[kept]
    if not aligned.numel():
        return torch.zeros_like(deltas[0])
    parts = torch.stack([_trimmed(part, density) for part in aligned.chunk(len(deltas), dim=1)])
    sign = parts.sum(dim=0).sign()
    agrees = (parts.sign() == sign) & (parts != 0)
    merged = torch.where(agrees, parts, 0.0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    return (u[:, kept] @ merged).to(deltas[0].dtype)


def wudi(deltas: Sequence[Tensor], ridge: float) -> Tensor:
    """The M of least Σ_t |(M - D_t) D_tᵀ|² / |D_t|², in closed form and float64.

    M = (Σ c_t D_t D_tᵀ D_t) (Σ c_t D_tᵀ D_t + ridge I)⁻¹, c_t = 1 / |D_t|²; a D_t of 0 takes no part.
    """
    wide = [delta.to(torch.float64) for delta in deltas if bool((delta != 0).any())]
    if not wide:
        return torch.zeros_like(deltas[0])
    grams = [delta.T @ delta / delta.square().sum() for delta in wide]
    right = torch.stack(grams).sum(dim=0)
    right.diagonal().add_(ridge)
    left = torch.stack([delta @ gram for delta, gram in zip(wide, grams, strict=True)]).sum(dim=0)
    solved: Tensor = torch.linalg.solve(right, left, left=False)
    return solved.to(deltas[0].dtype)


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u, s, vh


def _leading(deltas: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n leading singular triplets of every D_t, side by side: U [o, T n], s [T n], Vᵀ [T n, i]."""
    found = [_svd(delta) for delta in deltas]
    return (
        torch.cat([u[:, :n] for u, _, _ in found], dim=1),
        torch.cat([s[:n] for _, s, _ in found]),
        torch.cat([vh[:n] for _, _, vh in found]),
    )


def _recombined(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return (polar(u) * s) @ polar(vh)


def _trimmed(x: Tensor, density: float) -> Tensor:
    n_kept = int(density * x.numel())
    if n_kept == 0:
        return torch.zeros_like(x)
    threshold = x.abs().reshape(-1).kthvalue(x.numel() - n_kept + 1).values
    return torch.where(x.abs() >= threshold, x, 0.0)
