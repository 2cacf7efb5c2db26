"""Draws by the rank of a magnitude in a long tensor: ranks from a table of counts instead of a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from tvfast.integrations._chunks import CHUNK, flat_chunks
from tvfast.program import ALWAYS, ModelScalars

BIN_BITS = 17
_SHIFT = 31 - BIN_BITS
"""A bin is the leading bits of a magnitude: 512 bins an octave. A rank is off by half a bin at most."""


def draw_by_magnitude(tensor: Tensor, out: Tensor, drawn: ModelScalars, key: int) -> None:
    """Write the tensor with entries dropped at random, the larger ones less often.

    Args:
        tensor: float32 or 16 bits, finite, contiguous.
        out: float32, same shape; overwritten.
        drawn: `limit` and `limit_step`, as in `Keep.RANDOM_BY_RANK`; a bin's entries share their mean rank.
        key: seeds a torch generator of the tensor's device.
    """
    flat, kept = tensor.detach().view(-1), out.view(-1)
    counts = torch.zeros(1 << BIN_BITS, dtype=torch.int64, device=tensor.device)
    for part in flat_chunks(flat.numel()):
        counts += torch.bincount(_bins(flat[part]), minlength=1 << BIN_BITS)
    ranks = counts.cumsum(0) - counts + (counts - 1).clamp_(min=0) / 2
    odds = (drawn.limit + ranks * (drawn.limit_step / 2.0**32)) / ALWAYS
    table = odds.to(torch.float32)
    generator = torch.Generator(tensor.device).manual_seed(key >> 1)
    longest = min(CHUNK, flat.numel())
    draws, limits = (torch.empty(longest, device=tensor.device) for _ in range(2))
    for part in flat_chunks(flat.numel()):
        values = flat[part]
        uniform, limit = draws[: values.numel()], limits[: values.numel()]
        torch.rand(values.shape, generator=generator, out=uniform)
        torch.index_select(table, 0, _bins(values), out=limit)
        torch.mul(values, torch.lt(uniform, limit, out=uniform), out=kept[part])


def _bins(values: Tensor) -> Tensor:
    return values.to(torch.float32).view(torch.int32).bitwise_and(0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
