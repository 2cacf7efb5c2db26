"""8-bit codes and low-rank sums on every instruction set, against torch and chains in extended precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import NATIVE, load
from tvfast.ops import storage
from tvfast.program import DType

FORMATS = {0: torch.float8_e4m3fn, 1: torch.float8_e5m2}
LARGEST = {0: 448.0, 1: 57344.0}
FACTORS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
KINDS = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


@pytest.fixture(scope="module", params=NATIVE, autouse=True)
def forced_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVFAST_ISA", request.param.partition("-")[2])
        yield


def widened(codes: Tensor, format: int) -> Tensor:
    out = torch.empty(codes.numel(), dtype=torch.float32)
    storage.widen_fp8(codes.data_ptr(), codes.numel(), format, out.data_ptr())
    return out


def narrowed(values: Tensor, format: int, *, saturate: bool) -> Tensor:
    out = torch.empty(values.numel(), dtype=torch.uint8)
    storage.narrow_fp8(values.data_ptr(), values.numel(), format, saturate, out.data_ptr())
    return out


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, every NaN alike."""
    nan = a.isnan() & b.isnan()
    return bool((nan | (a.view(torch.int32) == b.view(torch.int32))).all())


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_is_torchs_number(format: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(FORMATS[format]).float()
    assert same_numbers(widened(codes, format), expected)
    for n in range(70):  # every tail
        assert same_numbers(widened(codes[100 : 100 + n], format), expected[100 : 100 + n])


def edges(format: int) -> Tensor:
    """Every number of a format, the middles between neighbours, and what lies next to both, in float32."""
    finite = torch.arange(256, dtype=torch.uint8).view(FORMATS[format]).float()
    finite = finite[finite.isfinite()].double().sort().values
    beyond = torch.tensor([464.0, 480.0, 496.0, 61440.0, 65536.0, 3e38, torch.inf, 2.0**-149, 2.0**-126])
    points = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, beyond.double(), -beyond.double()]).float()
    near = [torch.nextafter(points, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    return torch.cat([points, *near, torch.tensor([torch.nan, -0.0])])


def check_rounding(values: Tensor, format: int) -> None:
    """As torch, which from some version on saturates E4M3, infinity too; here that is no number."""
    expected = values.to(FORMATS[format])
    saturates = bool(torch.tensor(1e9).to(FORMATS[format]).float().isfinite())
    found = narrowed(values, format, saturate=saturates)
    compared = values.isfinite() | (values.isinf() & (not saturates))
    nan = expected.float().isnan()
    assert torch.equal(found[compared & ~nan], expected.view(torch.uint8)[compared & ~nan])
    assert bool((found[nan | ~compared] == 0x7F).all())


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_is_torchs_at_every_edge(format: int) -> None:
    check_rounding(edges(format), format)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60)
@given(data=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=80))
def test_rounding_is_torchs_for_any_bits(format: int, data: list[int]) -> None:
    check_rounding(torch.from_numpy(np.array(data, np.uint32).view(np.float32).copy()), format)


def test_e4m3_beyond_its_numbers() -> None:
    values = torch.tensor([464.0, 464.1, -464.0, -480.0, 1e30, torch.inf])
    found = narrowed(values, 0, saturate=False)
    assert found.tolist() == [0x7E, 0x7F, 0xFE, 0x7F, 0x7F, 0x7F]


@pytest.mark.parametrize("format", FORMATS)
def test_saturating_keeps_finite_numbers_finite(format: int) -> None:
    values = edges(format)
    found = narrowed(values, format, saturate=True).view(FORMATS[format]).float()
    finite = values.isfinite()
    expected = values.clamp(-LARGEST[format], LARGEST[format]).to(FORMATS[format]).float()
    assert torch.equal(found[finite], expected[finite])
    assert not bool(found[~finite].isfinite().any())


# -- blocks ---------------------------------------------------------------------------------------------


def grid(shape: tuple[int, ...], rows: int, columns: int) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))


def spread(factors: Tensor, shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """The factor of every element."""
    wide = factors.float().repeat_interleave(rows, -2)[..., : shape[-2], :]
    return wide.repeat_interleave(columns, -1)[..., : shape[-1]]


SHAPES = [
    ((300, 200), 128, 128),
    ((256, 128), 128, 128),
    ((5, 37), 128, 128),
    ((9, 33), 1, 33),
    ((40, 30), 40, 30),
    ((3, 130, 40), 128, 16),
]


@pytest.mark.parametrize(("shape", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("kind", range(4))
def test_blocks_are_code_times_factor(shape: tuple[int, ...], rows: int, columns: int, kind: int) -> None:
    """In any cut, and at addresses that no type is aligned to."""
    codes = torch.randint(0, 126, shape, dtype=torch.uint8)
    factors = (torch.rand(grid(shape, rows, columns)) + 0.5).to(FACTORS[kind])
    expected = (codes.view(torch.float8_e4m3fn).float() * spread(factors, shape, rows, columns)).flatten()
    form = storage.ScaledBlocks(0, shape[-2], shape[-1], rows, columns, kind)
    bytes_of_factors = np.concatenate([[0], factors.view(torch.uint8).flatten().numpy()]).astype(np.uint8)
    n = codes.numel()
    for begin, end in [(0, n), (n // 3, n), (n // 3, n // 3 + 1), (1, n // 2), (n, n)]:
        first = 0 if begin == n else first_block_row(begin, shape, rows)
        across = -(-shape[-1] // columns)
        out = torch.full((end - begin,), 7.0)
        at = bytes_of_factors.ctypes.data + 1 + first * across * factors.element_size()
        storage.widen_scaled(form, codes.data_ptr() + begin, at, first, begin, end, out.data_ptr(), 2)
        assert torch.equal(out, expected[begin:end]), (begin, end)


def first_block_row(element: int, shape: tuple[int, ...], rows: int) -> int:
    matrix, row = divmod(element // shape[-1], shape[-2])
    return matrix * -(-shape[-2] // rows) + row // rows


@pytest.mark.parametrize(("shape", "rows", "columns"), SHAPES)
@pytest.mark.parametrize(("kind", "power_of_two"), [(0, False), (0, True), (1, False), (2, False), (3, True)])
def test_codes_of_blocks_use_the_whole_range(
    shape: tuple[int, ...], rows: int, columns: int, kind: int, power_of_two: bool
) -> None:
    values = torch.randn(shape) * 0.02
    values[..., 0, 0] = 0.5
    codes = torch.empty(shape, dtype=torch.uint8)
    factors = torch.empty(grid(shape, rows, columns), dtype=FACTORS[kind])
    form = storage.ScaledBlocks(0, shape[-2], shape[-1], rows, columns, kind)
    n = values.numel()
    storage.narrow_scaled(
        form, values.data_ptr(), 0, n, power_of_two, codes.data_ptr(), factors.data_ptr(), 2
    )
    largest = torch.zeros_like(factors, dtype=torch.float32)
    for index in np.ndindex(*factors.shape):
        *matrix, i, j = index
        part = values[tuple(matrix)][i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        largest[index] = part.abs().max()
    exact = largest / 448
    expected = torch.exp2(torch.ceil(torch.log2(exact.double()))).float() if power_of_two else exact
    assert torch.equal(factors.float(), expected.to(FACTORS[kind]).float())
    wide = spread(factors, shape, rows, columns)
    nearest = (values / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes, nearest.view(torch.uint8))
    error = (codes.view(torch.float8_e4m3fn).float() * wide - values).abs()
    # half a step: 2^-4 of a normal number, 2^-10 of the factor below; a factor of 16 bits may cut the top
    bound = torch.maximum(values.abs() * 2.0**-4, wide * 2.0**-10) * (1 + 2.0**-6)
    assert bool((error <= bound).all())


def test_blocks_without_a_finite_magnitude() -> None:
    """Zeros have the factor 1; NaN stays NaN, infinity becomes NaN, and neither decides the factor."""
    values = torch.zeros(4, 8)
    values[1, 2] = torch.nan
    values[2, 3] = torch.inf
    values[3, 0] = -44.8
    form = storage.ScaledBlocks(0, 4, 8, 1, 8, 0)
    codes = torch.empty(4, 8, dtype=torch.uint8)
    factors = torch.empty(4, 1)
    storage.narrow_scaled(form, values.data_ptr(), 0, 32, False, codes.data_ptr(), factors.data_ptr())
    assert factors.flatten().tolist() == [1.0, 1.0, 1.0, pytest.approx(0.1)]
    found = codes.view(torch.float8_e4m3fn).float() * factors
    assert found[1, 2].isnan()
    assert found[2, 3].isnan()
    assert found[3, 0] == -44.8
    assert int(found.isnan().sum()) == 2


# -- low rank -------------------------------------------------------------------------------------------


def chain(left: Tensor, right: Tensor) -> Tensor:
    """L R with one rounding to float32 a step."""
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        product = left[:, k : k + 1].double().numpy().astype(np.longdouble) * right[k].double().numpy()
        total = (total + product).astype(np.float32)
    return torch.from_numpy(total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(130, 70, 8), (1, 5, 1), (40, 600, 33), (7, 64, 16)])
def test_low_rank_sums_are_chains_rounded_once(
    kind: torch.dtype, transposed: bool, rows: int, columns: int, rank: int
) -> None:
    """W + s B A in any cut, in place and not, whichever factor is turned."""
    w = (torch.randn(rows, columns) * 0.02).to(kind)
    b = (torch.randn(rank, rows) if transposed else torch.randn(rows, rank)).bfloat16()
    a = torch.randn(columns, rank) if transposed else torch.randn(rank, columns)
    left, right = (b.T, a.T) if transposed else (b, a)
    s = 0.37
    exact = w.float() + chain(left.float(), right) * torch.tensor(s, dtype=torch.float32)
    of_left = storage.ThinFactor(b.data_ptr(), DType.BF16, 1, rows)
    of_right = storage.ThinFactor(a.data_ptr(), DType.F32, rank, 1)
    if not transposed:
        of_left = storage.ThinFactor(b.data_ptr(), DType.BF16, rank, 1)
        of_right = storage.ThinFactor(a.data_ptr(), DType.F32, 1, columns)
    n = w.numel()
    for begin, end in [(0, n), (n // 3, n - n // 5), (n - 1, n), (0, min(n, 3))]:
        for out_kind in {kind, torch.float32}:
            out = w.flatten().clone() if out_kind is kind else torch.zeros(n)
            matrix = out if out_kind is kind else w.flatten()
            storage.add_low_rank(
                (matrix.data_ptr() + begin * w.element_size(), KINDS[kind]),
                (out.data_ptr() + begin * out.element_size(), KINDS[out_kind]),
                begin,
                end,
                columns,
                rank,
                s,
                of_left,
                0,
                of_right,
                2,
            )
            expected = exact.flatten()[begin:end].to(out_kind)
            assert torch.equal(out[begin:end], expected), (begin, end, out_kind)
            untouched = w.flatten() if out_kind is kind else torch.zeros(n)
            assert torch.equal(out[:begin], untouched[:begin].to(out_kind))
            assert torch.equal(out[end:], untouched[end:].to(out_kind))


def test_rows_of_the_left_factor_may_begin_anywhere() -> None:
    w, b, a = torch.zeros(10, 6), torch.randn(10, 4), torch.randn(4, 6)
    out = torch.zeros(12)
    storage.add_low_rank(
        (w.data_ptr(), DType.F32),
        (out.data_ptr(), DType.F32),
        42,
        54,
        6,
        4,
        1.0,
        storage.ThinFactor(b[7:].data_ptr(), DType.F32, 4, 1),
        7,
        storage.ThinFactor(a.data_ptr(), DType.F32, 1, 6),
    )
    assert torch.equal(out, chain(b, a).flatten()[42:54])
