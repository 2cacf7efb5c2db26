"""Rows of files in another order: every instruction set against an independent statement."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NATIVE, load
from tvfast.ops import host
from tvfast.ops.host import CONSTANT_ROW, MEAN_ROW, ZERO_ROW, RowSource
from tvfast.program import DType

_WORDS = {DType.F32: np.uint32, DType.BF16: np.uint16, DType.F16: np.uint16}
_OFFSET = 24  # of every matrix in its file


@pytest.fixture(scope="module", params=NATIVE, autouse=True)
def forced_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVFAST_ISA", request.param.partition("-")[2])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def widened(bits: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype is DType.F32:
        return bits.view(np.float32)
    if dtype is DType.F16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def finite(rng: np.random.Generator, shape: tuple[int, int], dtype: DType) -> np.ndarray:
    """Bits of numbers of which sums are finite."""
    values = rng.standard_normal(shape).astype(np.float32)
    if dtype is DType.F16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return bits if dtype is DType.F32 else (bits >> 16).astype(np.uint16)


@settings(max_examples=60)
@given(data=st.data())
def test_windows_of_gathered_rows(folder: Path, data: st.DataObject) -> None:
    """Against whole matrices made with numpy: any window, types and ways to fill, from files and memory."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stored = draw(st.lists(st.sampled_from(list(DType)), min_size=1, max_size=4))
    wide = len(set(stored)) > 1 or draw(st.booleans())
    dtype = DType.F32 if wide else stored[0]
    row, n_rows = draw(st.sampled_from([1, 3, 8, 40])), draw(st.integers(1, 30))
    files = [finite(rng, (int(rng.integers(1, 20)), row), kind) for kind in stored]
    present = rng.random((len(stored), n_rows)) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    rows = np.stack([rng.integers(0, len(f), n_rows) for f in files]).astype(np.int32)
    rows[~present] = -1
    choices = [ZERO_ROW, CONSTANT_ROW, CONSTANT_ROW - 1, *([MEAN_ROW] if wide else [])]
    fill = rng.choice(choices, n_rows).astype(np.int32)
    for r in range(n_rows):
        have = np.flatnonzero(present[:, r])
        if len(have) and rng.random() < 0.4:
            fill[r] = rng.choice(have)
        elif not len(have) and fill[r] == MEAN_ROW:
            fill[r] = ZERO_ROW
    word = _WORDS[dtype]
    constants = [finite(rng, (2, row), dtype) for _ in stored]
    expected = []
    for k in range(len(files)):
        matrix = np.zeros((n_rows, row), word)
        for r in range(n_rows):
            have = np.flatnonzero(present[:, r])

            def own(j: int, r: int = r) -> np.ndarray:
                bits = files[j][rows[j, r]]
                return widened(bits, stored[j]).view(np.uint32) if wide else bits

            if present[k, r]:
                matrix[r] = own(k)
            elif fill[r] >= 0:
                matrix[r] = own(fill[r])
            elif fill[r] <= CONSTANT_ROW:
                matrix[r] = constants[k][CONSTANT_ROW - fill[r]]
            elif fill[r] == MEAN_ROW:
                total = np.zeros(row, np.float32)
                for j in have:
                    total = total + own(j).view(np.float32)
                matrix[r] = (total / np.float32(len(have))).view(np.uint32)
        expected.append(matrix.reshape(-1))
    start = draw(st.integers(0, n_rows * row - 1))
    n = draw(st.integers(1, n_rows * row - start))
    outs = [np.full(n + 2, 0x5A, word) for _ in stored]
    descriptors = []
    for k, file in enumerate(files):
        path = folder / f"{k}"
        path.write_bytes(bytes(_OFFSET) + file.tobytes())
        descriptors.append(os.open(path, os.O_RDONLY))
    # Those that stand in memory are not asked for a file.
    shown = [np.frombuffer(bytes(1) + f.tobytes(), np.uint8) if rng.random() < 0.4 else None for f in files]
    sources = [
        RowSource(
            fd if standing is None else -1,
            _OFFSET,
            kind,
            rows[k].ctypes.data,
            constants[k].ctypes.data,
            outs[k][1:].ctypes.data,
            0 if standing is None else standing[1:].ctypes.data,
        )
        for k, (fd, kind, standing) in enumerate(zip(descriptors, stored, shown, strict=True))
    ]
    try:
        host.gather_rows(sources, fill.ctypes.data, dtype, row, start, n)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    for matrix, out in zip(expected, outs, strict=True):
        assert np.array_equal(out[1:-1], matrix[start : start + n])
        assert out[0] == out[-1] == 0x5A, "something beyond the window was written"


def test_a_file_that_ends_early_says_where(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(40))
    rows, fill = np.array([0, 2], np.int32), np.zeros(2, np.int32)
    out = np.zeros(8, np.float32)
    descriptor = os.open(path, os.O_RDONLY)
    source = RowSource(descriptor, 0, DType.F32, rows.ctypes.data, 0, out.ctypes.data)
    try:
        with pytest.raises(EOFError) as caught:
            host.gather_rows([source], fill.ctypes.data, DType.F32, 4, 0, 8)
    finally:
        os.close(descriptor)
    assert caught.value.args == (0, 40)


def test_a_file_that_cannot_be_read_has_its_error(tmp_path: Path) -> None:
    rows, out = np.zeros(1, np.int32), np.zeros(4, np.float32)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    source = RowSource(descriptor, 0, DType.F32, rows.ctypes.data, 0, out.ctypes.data)
    try:
        with pytest.raises(IsADirectoryError) as caught:
            host.gather_rows([source], rows.ctypes.data, DType.F32, 4, 0, 4)
    finally:
        os.close(descriptor)
    assert caught.value.filename == 0


def test_rows_are_added_in_their_order() -> None:
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((37, 13)).astype(np.float32)
    sums = rng.standard_normal(13)
    expected = sums.copy()
    for one in matrix:
        expected += one
    host.add_rows(matrix.ctypes.data, 37, 13, sums.ctypes.data)
    assert np.array_equal(sums, expected)


@pytest.mark.parametrize("order", ["ascending", "mixed", "far"])
@pytest.mark.parametrize("step", [1, 2, 9])
def test_neighbours_in_a_file_become_one_request(tmp_path: Path, order: str, step: int) -> None:
    """More rows than one call takes, with gaps of any size between them, some asked for twice."""
    n_rows, row = 1500, 257
    rng = np.random.default_rng(step)
    stored = rng.standard_normal((n_rows * step, row)).astype(np.float32)
    path = tmp_path / "matrix"
    path.write_bytes(bytes(_OFFSET) + stored.tobytes())
    rows = np.arange(0, n_rows * step, step, dtype=np.int32)
    if order == "mixed":
        rows = np.concatenate([rng.permutation(part) for part in np.split(rows, 15)])
        rows[::7] = rows[3]
    elif order == "far":
        rows = rng.permutation(rows)
    rows[::11] = -1
    expected = np.where(rows[:, None] < 0, np.float32(0), stored[rows]).reshape(-1)
    fill = np.full(n_rows, ZERO_ROW, np.int32)
    start, n = 100, (n_rows - 2) * row
    out = np.zeros(n, np.float32)
    descriptor = os.open(path, os.O_RDONLY)
    source = RowSource(descriptor, _OFFSET, DType.F32, rows.ctypes.data, 0, out.ctypes.data)
    try:
        host.gather_rows([source], fill.ctypes.data, DType.F32, row, start, n)
    finally:
        os.close(descriptor)
    assert np.array_equal(out, expected[start : start + n])
