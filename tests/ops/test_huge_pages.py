"""The wish for huge pages stays inside the tensor, and only large ones in host memory express it."""

from __future__ import annotations

import mmap

import pytest
import torch

from tvfast.ops import _huge_pages
from tvfast.ops._huge_pages import OWN_MAPPING_BYTES, on_huge_pages

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []

    def advise(address: int, n_bytes: int, advice: int) -> int:
        found.append((address, n_bytes, advice))
        return -1  # refused, as by a kernel that has none

    monkeypatch.setattr(_huge_pages, "_advise", advise)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("further", [0, 1, 4099])
def test_large_tensors_ask_for_whole_pages(
    wishes: list[tuple[int, int, int]], dtype: torch.dtype, further: int
) -> None:
    tensor = torch.empty(OWN_MAPPING_BYTES // dtype.itemsize + further, dtype=dtype)
    assert on_huge_pages(tensor) is tensor
    ((begin, n_bytes, advice),) = wishes
    last = tensor.data_ptr() + tensor.numel() * dtype.itemsize
    assert begin % mmap.PAGESIZE == 0
    assert n_bytes % mmap.PAGESIZE == 0
    assert tensor.data_ptr() <= begin < tensor.data_ptr() + mmap.PAGESIZE
    assert last - mmap.PAGESIZE < begin + n_bytes <= last
    assert advice == mmap.MADV_HUGEPAGE


def test_others_do_not(wishes: list[tuple[int, int, int]]) -> None:
    on_huge_pages(torch.empty(OWN_MAPPING_BYTES // 4 - 1))
    on_huge_pages(torch.empty(0))
    on_huge_pages(torch.empty(OWN_MAPPING_BYTES, device="meta"))
    assert not wishes


def test_the_system_is_asked() -> None:
    tensor = on_huge_pages(torch.empty(OWN_MAPPING_BYTES // 4))
    tensor.fill_(2.0)
    assert bool((tensor == 2.0).all())
