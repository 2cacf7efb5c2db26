"""Huge pages for large tensors that are about to be written for the first time."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from torch import Tensor

OWN_MAPPING_BYTES = 1 << 25
"""From here on the C library maps every allocation by itself and unmaps it when it is freed (its threshold
grows to this at most), so that a wish for these pages ends with the tensor."""


def on_huge_pages(fresh: Tensor) -> Tensor:
    """The tensor, after a wish for huge pages if it is large and in host memory.

    On an EPYC with Linux 6.18, writing 64 MiB for the first time takes 4 ms on huge pages and 22 ms without,
    and freeing them .4 ms and 4.6.
    """
    n_bytes = fresh.numel() * fresh.element_size()
    if fresh.device.type == "cpu" and n_bytes >= OWN_MAPPING_BYTES and _advise is not None:
        begin = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (fresh.data_ptr() + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(begin, end - begin, mmap.MADV_HUGEPAGE)  # where the system has none, nothing changes
    return fresh


def _libc_madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_int
    return call


_advise = _libc_madvise()
