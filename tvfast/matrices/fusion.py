"""Arcee Fusion: the most important changes of one model, by divergence of its rows from the base's."""

from __future__ import annotations

import torch
from torch import Tensor

from tvfast.matrices.importances import FLOOR, fuse_rows, quartile_ranks, quartiles
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.ops._views import DTYPES, view
from tvfast.ops.raw import backend_for
from tvfast.program import Entry, WorkTable

CHUNK = 2**17
"""Elements that are widened at a time; no result depends on it."""


def fuse(base: Tensor, model: Tensor, scale: float, *, exact: bool = True) -> Tensor:
    """b + scale · d where the importance |d| · KL reaches median + 1.5 (q75 - q25), d = m - b; otherwise b.

    Quantiles are exact: the values of rank floor(q (n - 1)) of all n. `exact`: divergences keep the digits of
    float32, by the CPU's kernels (`importances`) or summed in float64; otherwise in the type of the
    result, with torch's own sums, and where those are below 0 by rounding so is the importance.

    Returns:
        A tensor of the shape of `base`, float32, or float64 where an input is.
    """
    wide = torch.promote_types(torch.promote_types(base.dtype, model.dtype), torch.float32)
    if base.numel() == 0:
        return base.to(wide)
    length = base.shape[-1] if base.dim() else 1
    start, end = (x.reshape(-1, length).contiguous() for x in (base, model))
    out = on_huge_pages(torch.empty(start.shape, dtype=wide, device=base.device))
    if exact and base.is_cpu and base.dtype in DTYPES and model.dtype in DTYPES:
        first, second = view(start, "base", "rows"), view(end, "model", "rows")
        result = view(out, "out", "rows")
        fuse_rows(first, second, result, result, length, scale, torch.get_num_threads())
        return out.view(base.shape)
    step = max(1, CHUNK // max(1, length))
    spans = [slice(begin, begin + step) for begin in range(0, start.shape[0], step)]
    for rows in spans:
        b, m = start[rows].to(wide), end[rows].to(wide)
        if exact:
            summed = divergence(start[rows], end[rows], torch.float64).clamp_(min=0.0)
        else:
            summed = divergence(b, m, wide)
        torch.mul(torch.sub(m, b).abs_(), summed.to(wide), out=out[rows])
    least = _least(out.view(-1), signed=not exact)
    for rows in spans:  # importances become results
        b = start[rows].to(wide)
        tau = torch.sub(end[rows].to(wide), b)
        torch.add(b, tau.mul_(out[rows] >= least).mul_(scale), out=out[rows])
    return out.view(base.shape)


def _least(importances: Tensor, *, signed: bool) -> Tensor:
    """The importance from which on an entry is taken; `signed`: some may be below 0."""
    q25, median, q75 = _quartiles(importances, signed).unbind()
    return median + 1.5 * (q75 - q25)


def divergence(base: Tensor, model: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ p log(p / q) of every row, p and q its softmax in model and base, plus `FLOOR`; [rows, 1] of `dtype`.

    Of rows that hardly differ float32 keeps less than one digit: for fine-tunes that change weights of 0.02
    by 5e-4 the divergence is 1.2e-7, and its rounding error in float32 is 4e-8 and more.
    """
    p = torch.softmax(model.to(dtype), dim=-1).add_(FLOOR)
    q = torch.softmax(base.to(dtype), dim=-1).add_(FLOOR)
    return torch.log(torch.div(p, q, out=q), out=q).mul_(p).sum(dim=-1, keepdim=True)


def _quartiles(x: Tensor, signed: bool) -> Tensor:
    """The values of `quartile_ranks`; x [n]."""
    if x.dtype is torch.float64 or (signed and bool(x.min() < 0)):  # the selection ranks float32 magnitudes
        return x.sort().values[quartile_ranks(x.numel())]
    table = WorkTable([Entry(name="importance", models=(view(x, "importance", "scores"),))], 1)
    found = quartiles(table, backend_for(table), torch.get_num_threads())
    return torch.tensor(found, dtype=x.dtype, device=x.device)
