"""Draws by the rank of a magnitude in a long tensor: ranks from a table of counts instead of a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from tvfast.integrations._chunks import CHUNK, flat_chunks
from tvfast.integrations._tables import view, written
from tvfast.ops.host import MAGNITUDE_BINS, drop_binned, magnitude_counts
from tvfast.program import ALWAYS, ModelScalars

_SHIFT = 31 - (MAGNITUDE_BINS.bit_length() - 1)
"""A bin is the leading bits of a magnitude: 512 bins an octave. A rank is off by half a bin at most."""

COUNTED = 1 << 20
"""Entries that a device counts at a time, many enough beside the bins, all of which are added each time."""

_CERTAIN = 2.0**31


def draw_by_magnitude(tensor: Tensor, out: Tensor, drawn: ModelScalars, key: int) -> None:
    """Write the tensor with entries dropped at random, the larger ones less often.

    Args:
        tensor: float32 or 16 bits, finite, contiguous.
        out: float32, same shape; overwritten.
        drawn: `limit` and `limit_step`, as in `Keep.RANDOM_BY_RANK`; a bin's entries share their mean rank.
        key: of Philox 4x32-10; elsewhere than on the CPU the seed of a torch generator.
    """
    if tensor.device.type != "cpu":
        _draw_on_device(tensor, out, drawn, key)
        return
    values, n_threads = view(tensor), torch.get_num_threads()
    counts = torch.empty(MAGNITUDE_BINS, dtype=torch.int64)
    magnitude_counts(values, counts.data_ptr(), n_threads)
    limits = _survival(counts, drawn).view(torch.int32)[::2].contiguous()  # the lower halves
    drop_binned(values, limits.data_ptr(), key, out.data_ptr(), n_threads)
    written(out)


def _survival(counts: Tensor, drawn: ModelScalars) -> Tensor:
    """2^31 times the probability of each bin: int64."""
    ranks = counts.cumsum(0) - counts + (counts - 1).clamp_(min=0).to(torch.float64) / 2
    odds = (drawn.limit + ranks * (drawn.limit_step / 2.0**32)) * (_CERTAIN / ALWAYS)
    return odds.ceil_().clamp_(min=0.0, max=_CERTAIN).to(torch.int64)


def _draw_on_device(tensor: Tensor, out: Tensor, drawn: ModelScalars, key: int) -> None:
    flat, kept, device = tensor.detach().view(-1), out.view(-1), tensor.device
    n = flat.numel()
    counts = torch.zeros(MAGNITUDE_BINS, dtype=torch.int64, device=device)
    for start in range(0, n, COUNTED):
        counts += torch.bincount(_bins(flat[start : start + COUNTED]), minlength=MAGNITUDE_BINS)
    limits = _survival(counts, drawn)
    generator = torch.Generator(device).manual_seed(key >> 1)
    draws = torch.empty(min(CHUNK, n), dtype=torch.int64, device=device)
    for part in flat_chunks(n):
        values = flat[part].to(torch.float32)
        draw = draws[: values.numel()].random_(0, 2**31, generator=generator)
        kept[part] = torch.where(draw < limits[_bins(values)], values, 0.0)


def _bins(values: Tensor) -> Tensor:
    return values.to(torch.float32).view(torch.int32).bitwise_and(0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
