"""Entries whose global index jumps: a block of columns has the bits of those columns of the matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tvfast.ops._views import view
from tvfast.ops.raw import Backend, Wants
from tvfast.ops.reference import Reference
from tvfast.program import (
    Entry,
    Gain,
    Keep,
    ModelScalars,
    Program,
    TensorScalars,
    Tie,
    Vote,
    WorkTable,
)
from tvfast.sharded.backend import _runs_of

ROWS, COLUMNS = 37, 300
BLOCKS = [(0, 1), (1, 72), (73, 128), (201, 99)]

HALF = 2**31
MODELS = [
    ModelScalars(key=7, limit=HALF, prob=0.5, lo=0.25, lo_cut=HALF),
    ModelScalars(key=2**63 + 9, limit=HALF // 2, prob=0.25, hi=1.0, hi_cut=HALF // 3, weight=0.5),
]
AT_INDEX = [replace(MODELS[0], lo_cut=5000), replace(MODELS[1], hi_cut=7000)]
PROGRAMS = [
    (Program(keep=Keep.RANDOM), MODELS),
    (Program(keep=Keep.RANDOM, gain=Gain.INVERSE_PROBABILITY), MODELS),
    (Program(keep=Keep.BAND, tie=Tie.HASH), MODELS),
    (Program(keep=Keep.BAND, tie=Tie.HASH, vote=Vote.MASS), MODELS),
    (Program(keep=Keep.BAND, tie=Tie.INDEX, vote=Vote.MASS), AT_INDEX),
    (Program(keep=Keep.VARIANCE, tie=Tie.INDEX), AT_INDEX),
    (Program(), MODELS),
]
FAR = 2**32 - 4000
"""Of a tensor's first element, so that indices cross 32 bits."""


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """A base and two models with many ties at 1/4 and 1."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(-64, 65, (ROWS, COLUMNS), generator=generator) / 64
    near = [torch.randint(-6, 7, (ROWS, COLUMNS), generator=generator) / 4 for _ in range(2)]
    return [base.to(dtype), *((base + tau).to(dtype) for tau in near)]


def entry_of(base: torch.Tensor, models: list[torch.Tensor], out: torch.Tensor, **place: int) -> Entry:
    views = tuple(view(model, "a", "models") for model in models)
    return Entry(name="a", models=views, base=view(base, "a", "base"), out=view(out, "a", "out"), **place)


def check(backend: Backend, dtype: torch.dtype, *, one_run_each: bool = False) -> None:
    whole = tensors(dtype)
    for program, models in PROGRAMS:
        scalars = [TensorScalars(models=models)]
        want = torch.empty_like(whole[0])
        all_of_it = WorkTable([entry_of(whole[0], whole[1:], want, offset=FAR)], 2)
        backend.combine(all_of_it, program, scalars)
        total = backend.measure(all_of_it, program, scalars, Wants.COUNTS)[0]
        found, n_kept = torch.empty_like(want), [0, 0]
        for start, n in BLOCKS:
            block = [tensor[:, start : start + n].contiguous() for tensor in whole]
            out = torch.empty_like(block[0])
            entry = entry_of(block[0], block[1:], out, offset=FAR + start, run=n, run_step=COLUMNS)
            parts = list(_runs_of(entry)) if one_run_each else [entry]
            assert not one_run_each or not any(part.run for part in parts)
            table = WorkTable(parts, 2)
            backend.combine(table, program, scalars * len(parts))
            for moments in backend.measure(table, program, scalars * len(parts), Wants.COUNTS):
                n_kept = [a + b for a, b in zip(n_kept, moments.n_kept, strict=True)]
            found[:, start : start + n] = out
        assert torch.equal(found, want), program
        assert n_kept == total.n_kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [0, 64])
def test_native_kernels(native_with: Callable[..., Backend], dtype: torch.dtype, tile: int) -> None:
    check(native_with(tile=tile), dtype)


@pytest.mark.parametrize("one_run_each", [False, True])
def test_the_reference(one_run_each: bool) -> None:
    check(Reference(torch.float32), torch.float32, one_run_each=one_run_each)
