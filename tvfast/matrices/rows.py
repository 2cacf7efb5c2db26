"""Merges of every row by itself, with coefficients from the row's Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 2**20
"""Elements of all models that are widened to float64 at a time; no result depends on it."""

Coefficients = Callable[[Tensor], Tensor]
"""[rows, K, K] float64 Gram matrices -> [rows, K] float64 coefficients."""


def combine_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    coefficients: Coefficients,
    *,
    along_first: bool,
    scale: float,
) -> Tensor:
    """b + scale · Σ_k c_k d_k with c_k of each row, d_k = m_k - b; without a base, scale · Σ_k c_k m_k.

    A row runs along the last dimension, or along the first. Gram matrices are float64, coefficients are
    rounded once to the type of the sum: float32, or float64 where an input is.

    Returns:
        A tensor of the models' shape and at least float32.
    """
    wide = torch.float32
    for x in (models[0] if base is None else base, *models):
        wide = torch.promote_types(wide, x.dtype)
    shape = models[0].shape
    flat = [_as_rows(x, along_first) for x in models]
    start = None if base is None else _as_rows(base, along_first)
    out = torch.empty(flat[0].shape, dtype=wide, device=models[0].device)
    n_rows, length = out.shape
    step = max(1, CHUNK // max(1, length * len(models)))
    for begin in range(0, n_rows, step):
        rows = slice(begin, min(begin + step, n_rows))
        b = None if start is None else start[rows].to(wide)
        taus = torch.stack([x[rows].to(wide) if b is None else x[rows].to(wide) - b for x in flat], dim=1)
        exact = taus.to(torch.float64)
        c = coefficients(exact @ exact.transpose(1, 2)).to(wide)
        total = torch.zeros_like(out[rows])
        for k in range(len(models)):
            total += taus[:, k] * c[:, k : k + 1]
        total *= scale
        out[rows] = total if b is None else b + total
    return _from_rows(out, shape, along_first)


def slerp(gram: Tensor, t: float, smallest_norm: float, smallest_sine: float) -> Tensor:
    """Coefficients of two vectors, `t` of the way from one to the other; a line where they are parallel."""
    lengths = torch.diagonal(gram, dim1=1, dim2=2).sqrt().clamp(min=smallest_norm)
    cosine = (gram[:, 0, 1] / lengths[:, 0] / lengths[:, 1]).clamp(-1.0, 1.0)
    straight = 1.0 - cosine.square() <= smallest_sine**2
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    sine = torch.sin(angle)
    curved = torch.stack([torch.sin((1.0 - t) * angle) / sine, torch.sin(t * angle) / sine], dim=1)
    line = torch.tensor([1.0 - t, t], dtype=gram.dtype, device=gram.device)
    return torch.where(straight[:, None], line, curved)


def stock(gram: Tensor, smallest_product: float, smallest_denominator: float) -> Tensor:
    """Model Stock: the share of the average that is taken, divided among the models."""
    n = gram.shape[1]
    lengths = torch.diagonal(gram, dim1=1, dim2=2).sqrt()
    products = (lengths[:, :, None] * lengths[:, None, :]).clamp(min=smallest_product)
    j, k = torch.triu_indices(n, n, 1, device=gram.device)
    cosine = (gram / products).clamp(-1.0, 1.0)[:, j, k].mean(dim=1)
    denominator = 1.0 + (n - 1) * cosine
    singular = denominator.abs() < smallest_denominator
    share = torch.where(singular, 0.0, n * cosine / torch.where(singular, 1.0, denominator))
    return (share / n)[:, None].expand(-1, n)


def _as_rows(x: Tensor, along_first: bool) -> Tensor:
    """[rows, length]."""
    if x.dim() == 0:
        return x.reshape(1, 1)
    if along_first:
        return x.reshape(x.shape[0], -1).T
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)


def _from_rows(rows: Tensor, shape: torch.Size, along_first: bool) -> Tensor:
    return (rows.T if along_first and len(shape) > 0 else rows).reshape(shape)
