"""Divergences of rows and what is taken over, on every instruction set, against extended precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import NATIVE, load
from tvfast.ops import host
from tvfast.ops._views import view

FLOOR = 1e-8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=NATIVE, autouse=True)
def forced_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVFAST_ISA", request.param.partition("-")[2])
        yield


def divergences(of: Tensor, start: Tensor, n_threads: int = 1) -> tuple[Tensor, Tensor]:
    out = torch.empty(of.shape[0], dtype=torch.float64)
    importances = torch.empty(of.shape)
    host.divergences(
        *(view(one, "", "rows") for one in (of, start)),
        of.shape[1],
        FLOOR,
        out.data_ptr(),
        importances.data_ptr(),
        n_threads,
    )
    return out, importances


def exact(of: Tensor, start: Tensor) -> np.ndarray:
    """Σ q ((1 + u) log(1 + u) - u), p = (1 + u) q, in the widest type, of 64 bits of mantissa or more.

    That is the definition where p and q have one sum, and its terms cancel less.
    """

    def distribution(rows: Tensor) -> np.ndarray:
        x = rows.double().numpy().astype(np.longdouble)
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return np.asarray(e / e.sum(axis=1, keepdims=True) + np.longdouble(FLOOR))

    p, q = distribution(of), distribution(start)
    u = (p - q) / q
    return np.asarray((q * ((1 + u) * np.log1p(u) - u)).sum(axis=1))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 64, 511, 513, 4096, 2**14, 2**14 + 5, 3 * 2**14 + 8])
@pytest.mark.parametrize(
    ("width", "spread"),
    [(0.02, 2e-4), (0.02, 1e-7), (0.2, 7e-3), (0.5, 1e-3), (1.0, 0.1), (5.0, 3.0), (200.0, 50.0), (0.0, 0.0)],
)
def test_divergences_keep_their_digits(length: int, width: float, spread: float) -> None:
    start = width * normal(length, 3, length)
    of = start + spread * normal(length + 1, 3, length)
    found, importances = divergences(of, start)
    wanted = exact(of, start)
    change = (of - start).abs().amax(1)
    near = ((change <= 1 / 32) & (start.amax(1) - start.amin(1) <= 4)).numpy()
    # In float32, where no term cancels another; then by the definition: logarithms of ratios near 1 have an
    # error of 1e-16, and so have the totals of both rows.
    bound = np.where(near, 3e-7 * wanted + (1e-7 * change.numpy()) ** 2, 1e-14 * np.abs(wanted) + 2e-15)
    assert np.all(np.abs(found.numpy() - wanted) <= bound)
    factor = found.clamp(min=0.0).float()[:, None]
    assert torch.equal(importances, (of - start).abs() * factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_types_and_threads_and_instruction_sets_give_the_same_bits(
    dtype: torch.dtype, other: torch.dtype
) -> None:
    start = normal(0, 300, 777).to(other)
    of = (start.float() + 0.01 * normal(1, 300, 777)).to(dtype)
    found = divergences(of, start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVFAST_ISA", "scalar")
        wanted = divergences(of.float(), start.float())
    for one in (found, divergences(of, start, 3)):
        assert all(map(torch.equal, one, wanted))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("at", [0, 5, 32, 99])
def test_a_row_that_is_no_distribution_has_nan(value: float, side: int, at: int) -> None:
    both = [normal(0, 3, 100), normal(1, 3, 100)]
    clean, _ = divergences(*both)
    both[side][1, at] = value
    found, importances = divergences(*both)
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[::2], clean[::2])
    assert bool(importances[1].isnan().all())


def test_minus_infinity_has_no_probability() -> None:
    of, start = normal(0, 1, 50), normal(1, 1, 50)
    of[0, 3] = -float("inf")
    p, q = of.double().softmax(-1) + FLOOR, start.double().softmax(-1) + FLOOR
    found, _ = divergences(of, start)
    assert found.tolist() == pytest.approx((p * (p / q).log()).sum(-1).tolist(), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 2**15 + 3])
def test_what_is_important_is_taken_over(dtype: torch.dtype, n: int) -> None:
    start, of = normal(0, n).to(dtype), normal(1, n).to(dtype)
    importances = normal(2, n).abs()
    least, scale = float(importances.median()), 0.7
    importances[0] = least
    if n > 2:
        importances[2] = float("nan")  # of a row with NaN: nothing of it is
    out = importances.clone()
    host.fuse(view(of, "", "rows"), view(start, "", "rows"), least, scale, out.data_ptr(), 2)
    tau = of.float() - start.float()
    assert torch.equal(out, start.float() + tau * (importances >= least) * scale)
