"""Ranks within rows for the keep stages that read them, a bounded number of elements at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor
from tvfast.kernels.ranks import LONGEST_ROW, ranks_kernel
from tvfast.kernels.table import Launch, launches

from tvfast.program import DType, Entry, View

_DTYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}

MOST_RANKS = 1 << 25
"""Ranks in memory at a time, 256 MiB, or those of one tensor if that has more."""


def ranked_launches(entries: Sequence[Entry], n_models: int, device: torch.device) -> Iterator[list[Launch]]:
    """Batches of entries with their ranks; a batch's ranks live until the next is asked for."""
    # `_alive` keeps the tensors while the caller uses their addresses.
    batch: list[int] = []
    n_ranks = 0
    for number, entry in enumerate(entries):
        if batch and n_ranks + n_models * entry.n_elements > MOST_RANKS:
            found, _alive = _with_ranks(entries, batch, n_models, device)
            yield found
            batch, n_ranks = [], 0
        batch.append(number)
        n_ranks += n_models * entry.n_elements
    if batch:
        found, _alive = _with_ranks(entries, batch, n_models, device)
        yield found


def _with_ranks(
    entries: Sequence[Entry], numbers: Sequence[int], n_models: int, device: torch.device
) -> tuple[list[Launch], list[Tensor]]:
    own = [entries[number] for number in numbers]
    ranks = [torch.empty(n_models, entry.n_elements, dtype=torch.int64, device=device) for entry in own]
    found = launches(own, numbers, n_models, device, ranks)
    for launch in found:
        for place, number in enumerate(launch.numbers):
            entry = entries[number]
            width = min(entry.row or entry.n_elements, entry.n_elements)
            if width > LONGEST_ROW:
                _rank_by_torch(entry, width, launch.kind.subtracts, ranks[numbers.index(number)])
                continue
            for k in range(n_models):
                ranks_kernel[(-(-entry.n_elements // width),)](
                    launch.fields[place],
                    width,
                    k,
                    DTYPE=launch.kind.dtype,
                    HAS_BASE=launch.kind.subtracts,
                    ALIGNED=launch.kind.aligned,
                    BLOCK=triton.next_power_of_2(width),
                    enable_fp_fusion=False,
                    num_warps=4,
                )
    return found, ranks


def _rank_by_torch(entry: Entry, width: int, subtracts: bool, ranks: Tensor) -> None:
    # Rows beyond one program instance: a stable sort by torch, row by row to bound its scratch memory.
    models = [_elements(model) for model in entry.models]
    base = _elements(entry.base) if subtracts and entry.base is not None else None
    for start in range(0, entry.n_elements, width):
        part = slice(start, start + width)
        for k, model in enumerate(models):
            tau = model[part].to(torch.float32)
            if base is not None:
                tau = tau - base[part].to(torch.float32)
            bits = torch.where(torch.isnan(tau), 0x7FC00000, tau.abs().view(torch.int32))
            order = torch.sort(bits, stable=True).indices
            ranks[k, part].scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _elements(view: View) -> Tensor:
    """The elements of a view whose address may lie anywhere in its owner; [n], shares memory."""
    dtype = _DTYPES[view.dtype]
    memory = view.owner.detach().view(-1).view(torch.uint8)
    start = view.address - memory.data_ptr()
    found: Tensor = memory[start : start + view.n_elements * dtype.itemsize].view(dtype)
    return found
