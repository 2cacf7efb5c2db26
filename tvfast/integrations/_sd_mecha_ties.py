"""sd-mecha's TIES: trimmed deltas, whole or after random drops, and what is made of their elected members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tvfast.integrations._chunks import row_chunks
from tvfast.integrations._magnitudes import draw_by_magnitude
from tvfast.integrations._patching import NotServed
from tvfast.integrations._tables import Merge, check_served, entry, number, random_keys, scalars
from tvfast.methods.dialects import kept_sd_mecha
from tvfast.methods.scalars import draw_limit
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.program import (
    SMALLEST_POSITIVE,
    Divisor,
    DType,
    Keep,
    Members,
    ModelScalars,
    Program,
    TensorScalars,
    Tie,
    View,
    Vote,
    ZeroSign,
)

DEFAULT_SEED = 67280421310721  # of a torch.Generator that nobody has seeded, as sd-mecha's is then

LONGEST_RANKED = 1 << 20
"""Entries drawn by exact ranks; in constant memory the cost of those grows with the square beyond."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Deltas with their thresholds, or with planes of the entries that survived drops and trim."""

    deltas: Sequence[Tensor]
    merge: Merge
    out: Tensor
    program: Program

    @staticmethod
    def of(deltas: Sequence[Tensor], k: float, by_value: bool) -> Trimmed:
        """Every entry of at least the magnitude of rank max(int((1 - k) n), 1) from below survives."""
        out, merge = _prepared(deltas, k)
        merge.trim(lambda _, n: kept_sd_mecha(k, n), Tie.GE)
        return Trimmed(deltas, merge, out, _election(Keep.BAND, by_value))

    @staticmethod
    def of_dropped(
        deltas: Sequence[Tensor], k: float, by_value: bool, kept: float, della: float, seed: int | None
    ) -> Trimmed:
        """Entries are dropped at random first, by rank of their magnitude in the whole tensor with DELLA."""
        out, merge = _prepared(deltas, k)
        merge.check_finite()
        n = out.numel()
        drawn = _drops(n, kept, della)
        keys = random_keys("sd_mecha", len(deltas), seed if seed is not None and seed >= 0 else DEFAULT_SEED)
        planes = []
        for delta, key in zip(deltas, keys, strict=True):
            planes.append(_survivors(delta, out, drawn, key, kept_sd_mecha(k, n)))
        merge.entries[0].masks = tuple(planes)
        return Trimmed(deltas, merge, out, _election(Keep.MASK, by_value))


def _prepared(deltas: Sequence[Tensor], k: float) -> tuple[Tensor, Merge]:
    check_served(deltas)
    if number(k, "k") < 0.0:
        raise NotServed("a negative share")
    out = on_huge_pages(torch.empty(deltas[0].shape, dtype=torch.float32, device=deltas[0].device))
    merge = Merge([entry(deltas, out)], [scalars((1.0,) * len(deltas))])
    return out, merge


def _election(keep: Keep, by_value: bool) -> Program:
    return Program(
        keep=keep,
        vote=Vote.MASS if by_value else Vote.COUNT,
        zero_sign=ZeroSign.NONE,
        members=Members.ZERO_COUNTS,
        divisor=Divisor.COUNT,
    )


def _drops(n: int, kept: float, della: float) -> ModelScalars:
    """Keep probabilities: 1 - dropped, and with DELLA from della / 2 below to della / 2 above it."""
    if della == 0.0 or n == 1:
        return ModelScalars(limit=draw_limit(kept))
    smallest = kept + (1.0 / n - (n + 1) / (2.0 * n)) * della
    largest = kept + (1.0 - (n + 1) / (2.0 * n)) * della
    if della < 0.0 or not (smallest >= 0.0 and largest <= 1.0):
        raise NotServed("probabilities outside [0, 1]")
    return ModelScalars(limit=draw_limit(smallest), limit_step=round(della / n * 2.0**64))


def _survivors(delta: Tensor, scratch: Tensor, drawn: ModelScalars, key: int, n_kept: int) -> View:
    """The plane of the entries that are neither dropped nor trimmed; the dropped ones count as zeros."""
    if drawn.limit_step and delta.numel() > LONGEST_RANKED:
        draw_by_magnitude(delta, scratch, drawn, key)
    else:
        drop = Merge([entry([delta], scratch)], [scalars((1.0,))])
        drop.numbers[0].models[0] = replace(drawn, key=key)
        drop.combine(Program(keep=Keep.RANDOM_BY_RANK if drawn.limit_step else Keep.RANDOM))
    trim = Merge([entry([scratch], scratch)], [scalars((1.0,))])
    trim.trim(lambda _, n: n_kept, Tie.GE)
    band = trim.numbers[0].models[0]
    band.lo = max(band.lo, SMALLEST_POSITIVE)  # what is dropped is zero here, and not in `delta`
    plane = trim.new_plane(scratch.numel())
    # a table of its own: backends keep the form in which they have seen a table
    mask = Merge([replace(trim.entries[0], masks=(plane,))], trim.numbers)
    me = mask.statistics
    me.backend.row_masks(me.table, Program(keep=Keep.BAND), mask.numbers, me.n_threads)
    return plane


def summed(trimmed: Trimmed) -> Tensor:
    """Σ of the members / their number; 0 where there are none."""
    trimmed.merge.combine(trimmed.program, finite=trimmed.program.keep is Keep.BAND)
    return trimmed.out.add_(0.0)  # a sum of nothing but -0 is +0 in torch


def stocked(trimmed: Trimmed, cos_eps: float) -> Tensor:
    """`summed`, multiplied by the factor of Model Stock on the members of each row."""
    if len(trimmed.deltas) < 2:
        raise NotServed("one model has no angle")
    if trimmed.program.keep is Keep.BAND:
        trimmed.merge.check_finite()
    out = trimmed.out
    by_value = trimmed.program.vote is Vote.MASS
    n_models = len(trimmed.deltas)
    lines = as_rows(out)
    with torch.no_grad():
        for rows in row_chunks(out):
            part = lines[rows]
            kept = torch.empty((n_models, *part.shape), dtype=torch.float32, device=out.device)
            for k in range(n_models):
                _write_kept(trimmed, k, rows, kept[k])
            agree = torch.sign(kept)
            sign = (kept if by_value else agree).sum(dim=0).sign_()
            torch.eq(agree, sign, out=agree)
            kept.mul_(agree)
            share = stock_share(list(kept), cos_eps)
            total = kept.sum(dim=0).mul_(share).div_(agree.sum(dim=0))
            torch.nan_to_num(total, nan=0, posinf=0, neginf=0, out=part)
    return out


def _write_kept(trimmed: Trimmed, k: int, rows: slice, out: Tensor) -> None:
    """Rows of one trimmed delta."""
    part = as_rows(trimmed.deltas[k])[rows]
    masks: tuple[View, ...] = ()
    if trimmed.program.keep is Keep.MASK:
        whole = trimmed.merge.entries[0].masks[k]
        offset = rows.start * part.shape[-1]
        masks = (View(whole.address + offset // 8, part.numel(), DType.F32, whole.owner),)
    one = replace(entry([part], out), masks=masks)
    numbers = TensorScalars(models=[trimmed.merge.numbers[0].models[k]])
    Merge([one], [numbers]).combine(Program(keep=trimmed.program.keep))


def stock_share(deltas: Sequence[Tensor], cos_eps: float) -> Tensor:
    """t = K cos / (1 + (K - 1) cos) of each row, cos the mean cosine of neighbours: [rows, 1]."""
    n = len(deltas)
    cosine = torch.nn.functional.cosine_similarity
    pairs = [cosine(deltas[i], deltas[i + 1], dim=-1, eps=cos_eps) for i in range(n - 1)]
    mean = torch.stack(pairs).mean(dim=0)
    return (n * mean / (1 + (n - 1) * mean)).unsqueeze(-1)


def as_rows(tensor: Tensor) -> Tensor:
    """[rows, last dimension]; a vector is one row."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.dim() else tensor.view(1, 1)
