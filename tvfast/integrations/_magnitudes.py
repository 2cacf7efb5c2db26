"""Draws by the rank of a magnitude in a long tensor: ranks from a table of counts instead of a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from tvfast.integrations._chunks import CHUNK, flat_chunks
from tvfast.program import ALWAYS, ModelScalars

BIN_BITS = 17
_SHIFT = 31 - BIN_BITS
"""A bin is the leading bits of a magnitude: 512 bins an octave. A rank is off by half a bin at most."""

COUNTED = 1 << 20
"""Entries that are counted at a time, many enough beside the bins, all of which are added each time."""


def draw_by_magnitude(tensor: Tensor, out: Tensor, drawn: ModelScalars, key: int) -> None:
    """Write the tensor with entries dropped at random, the larger ones less often.

    Args:
        tensor: float32 or 16 bits, finite, contiguous.
        out: float32, same shape; overwritten.
        drawn: `limit` and `limit_step`, as in `Keep.RANDOM_BY_RANK`; a bin's entries share their mean rank.
        key: seeds a torch generator of the tensor's device.
    """
    flat, kept, device = tensor.detach().view(-1), out.view(-1), tensor.device
    n = flat.numel()
    counts = torch.zeros(1 << BIN_BITS, dtype=torch.int64, device=device)
    bins = torch.empty(min(COUNTED, n), dtype=torch.int32, device=device)
    for start in range(0, n, COUNTED):
        counts += torch.bincount(_bins(flat[start : start + COUNTED], bins), minlength=1 << BIN_BITS)
    ranks = counts.cumsum(0) - counts + (counts - 1).clamp_(min=0).to(torch.float64) / 2
    odds = (drawn.limit + ranks * (drawn.limit_step / 2.0**32)) * (2.0**32 / ALWAYS)
    table = odds.ceil_().sub_(2.0**31 + 1).clamp_(min=-(2.0**31)).to(torch.int32)  # last draws that keep
    generator = torch.Generator(device).manual_seed(key >> 1)
    pairs = torch.empty(min(CHUNK, n + 1) // 2, dtype=torch.int64, device=device)
    lasts = torch.empty(min(CHUNK, n), dtype=torch.int32, device=device)
    for part in flat_chunks(n):
        values = flat[part].to(torch.float32)
        last = lasts[: values.numel()]
        # Two draws in 64 bits cost little more than one in 32.
        draws = pairs.random_(-(2**63), None, generator=generator).view(torch.int32)[: values.numel()]
        torch.index_select(table, 0, _bins(values, bins), out=last)
        torch.le(draws, last, out=draws).neg_()
        torch.bitwise_and(values.view(torch.int32), draws, out=kept[part].view(torch.int32))


def _bins(values: Tensor, out: Tensor) -> Tensor:
    """Into the front of `out`: int32."""
    bits = values.to(torch.float32).view(torch.int32)
    return torch.bitwise_and(bits, 0x7FFFFFFF, out=out[: bits.numel()]).bitwise_right_shift_(_SHIFT)
