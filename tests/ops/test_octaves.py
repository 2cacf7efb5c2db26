"""`count_octaves`: the histogram of float32 magnitudes, from storage, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tvfast.ops.raw import OCTAVES, HostBackend
from tvfast.program import DType, Entry, View, WorkTable

_TYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


def view(tensor: Tensor) -> View:
    return View(tensor.data_ptr(), tensor.numel(), _TYPES[tensor.dtype], tensor)


def expected(base: Tensor | None, model: Tensor) -> list[int]:
    tau = model.float() if base is None else model.float() - base.float()
    bits = tau.numpy().view(np.uint32) & 0x7FFFFFFF
    return np.bincount(bits >> 23, minlength=OCTAVES).tolist()


@pytest.mark.parametrize("dtype", _TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("n", [1, 7, 4097, 40000])
def test_counts_are_those_of_the_bits(native: HostBackend, dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    tensors = [torch.randn(n, generator=generator).mul(0.02).to(dtype) for _ in range(4)]
    tensors[2][::3] = tensors[0][::3]  # zeros of the task vector
    base, *models = tensors
    table = WorkTable(
        [
            Entry(name="a", models=tuple(map(view, models)), base=view(base)),
            Entry(name="b", models=tuple(map(view, models))),
        ],
        3,
    )
    assert native.count_octaves(table) == [
        [expected(base, model) for model in models],
        [expected(None, model) for model in models],
    ]


def test_what_is_no_normal_number(native: HostBackend) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 2.0**-126, 1.0, -1.999, 2.0, 3e38, torch.inf, torch.nan])
    counts = native.count_octaves(WorkTable([Entry(name="a", models=(view(values),))], 1))[0][0]
    assert {octave: n for octave, n in enumerate(counts) if n} == {0: 4, 1: 1, 127: 2, 128: 1, 254: 1, 255: 2}


def test_threads_and_tiles_do_not_matter(native_with: Callable[..., HostBackend]) -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(3))
    table = [Entry(name="a", models=(view(values),))]
    found = [
        native_with(tile=tile).count_octaves(WorkTable(table, 1), threads)
        for tile, threads in ((0, 1), (0, 3), (1000, 2))
    ]
    assert found[0] == found[1] == found[2] == [[expected(None, values)]]
