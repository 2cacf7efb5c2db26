"""Counts of magnitudes and draws by them, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.conftest import NATIVE, load
from tvfast.ops import host
from tvfast.ops._philox_torch import draws
from tvfast.ops._views import view

SIZES = [1, 15, 16, 17, 1023, 1024, 1025, 200_001]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module", params=NATIVE, autouse=True)
def forced_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVFAST_ISA", request.param.partition("-")[2])
        yield


def values_of(n: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    values[:: max(1, n // 5)] = -0.0
    return values


def bins_of(values: Tensor) -> Tensor:
    return (values.float().view(torch.int32) & 0x7FFFFFFF).long() >> 14


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude_is_counted_in_its_bin(n: int, dtype: torch.dtype) -> None:
    values = values_of(n, dtype)
    counts = torch.empty(host.MAGNITUDE_BINS, dtype=torch.int64)
    for n_threads in (1, 3):
        host.magnitude_counts(view(values, "", "values"), counts.data_ptr(), n_threads)
        assert torch.equal(counts, bins_of(values).bincount(minlength=host.MAGNITUDE_BINS))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_survives_if_its_draw_is_below_the_limit_of_its_bin(n: int, dtype: torch.dtype) -> None:
    values = values_of(n, dtype)
    limits = torch.randint(0, 2**31 + 1, (host.MAGNITUDE_BINS,), generator=torch.Generator().manual_seed(1))
    limits[bins_of(values)[0]] = 2**31
    lower = limits.view(torch.int32)[::2].contiguous()
    upper_bits = draws(KEY, 0, n, values.device).long() >> 1
    expected = torch.where(upper_bits < limits[bins_of(values)], values.float(), 0.0)
    for n_threads in (1, 3):
        out = torch.full((n + 64,), 7.0)
        host.drop_binned(view(values, "", "values"), lower.data_ptr(), KEY, out.data_ptr(), n_threads)
        assert torch.equal(out[:n].view(torch.int32), expected.view(torch.int32))
        assert (out[n:] == 7.0).all()


@pytest.mark.parametrize(("limit", "survive"), [(0, False), (2**31, True)])
def test_no_draw_is_below_nothing_and_every_one_below_certainty(limit: int, survive: bool) -> None:
    values = torch.rand(100_000) + 1
    limits = torch.full((host.MAGNITUDE_BINS,), limit, dtype=torch.int64).view(torch.int32)[::2].contiguous()
    out = torch.empty_like(values)
    host.drop_binned(view(values, "", "values"), limits.data_ptr(), 5, out.data_ptr())
    assert torch.equal(out, values if survive else torch.zeros_like(values))
