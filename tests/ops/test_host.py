"""Checksums and the search for values that are not finite, on every instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NATIVE, load
from tvfast.ops import host
from tvfast.program import DType

CHECK_VALUE = 0xE3069283  # of b"123456789": RFC 3720, appendix B.4, and every catalogue of CRCs
_WORDS = {DType.F32: np.uint32, DType.BF16: np.uint16, DType.F16: np.uint16}
_INFINITY = {DType.F32: 0x7F800000, DType.BF16: 0x7F80, DType.F16: 0x7C00}


@pytest.fixture(scope="module", params=NATIVE, autouse=True)
def forced_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVFAST_ISA", request.param.partition("-")[2])
        yield


def checksum(data: bytes | np.ndarray, seed: int = 0) -> int:
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.view(np.uint8)
    return host.crc32c(array.ctypes.data, array.size, seed)


def bit_by_bit(data: bytes) -> int:
    """The definition: division by the mirrored polynomial 0x82F63B78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", CHECK_VALUE),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_values(data: bytes, expected: int) -> None:
    assert checksum(data) == expected


@settings(max_examples=60)
@given(n=st.integers(0, 3000), lead=st.integers(0, 15), seed=st.integers(0, 2**32 - 1))
def test_any_length_and_alignment_follows_the_definition(n: int, lead: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, n + lead, dtype=np.uint8)[lead:]
    assert checksum(data) == bit_by_bit(data.tobytes())


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 120_000), cut=st.floats(0, 1))
def test_pieces_chain_and_combine(seed: int, n: int, cut: float) -> None:
    data = np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)
    at = int(cut * n)
    first, second = data[:at], data[at:]
    whole = checksum(data)
    assert checksum(second, seed=checksum(first)) == whole
    assert host.crc32c_combine(checksum(first), checksum(second), n - at) == whole


def test_combining_lengths_beyond_32_bits() -> None:
    zeros, n = checksum(bytes(4096)), 4096
    while n < 2**33:
        zeros, n = host.crc32c_combine(zeros, zeros, n), 2 * n
    # A message of zeros is found by doubling; appending to it must not depend on how it was made.
    tail = checksum(b"tail")
    at_once = host.crc32c_combine(host.crc32c_combine(checksum(b"head"), zeros, n), tail, 4)
    assert at_once == host.crc32c_combine(checksum(b"head"), host.crc32c_combine(zeros, tail, 4), n + 4)
    assert at_once != host.crc32c_combine(checksum(b"head"), tail, 4)


@pytest.mark.parametrize("dtype", list(DType))
@settings(max_examples=60)
@given(data=st.data(), n=st.integers(0, 3000), lead=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_the_first_nonfinite_element_is_found(
    dtype: DType, data: st.DataObject, n: int, lead: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    word, infinity = _WORDS[dtype], _INFINITY[dtype]
    n_bits = 8 * np.dtype(word).itemsize
    values = rng.integers(0, infinity, n, dtype=word)  # every finite magnitude, subnormals too
    values |= rng.integers(0, 2, n, dtype=word) << word(n_bits - 1)
    bad = data.draw(st.lists(st.integers(0, max(0, n - 1)), max_size=3)) if n else []
    for at in bad:
        payload = int(rng.integers(0, 2 ** (n_bits - 1) - infinity))  # 0: an infinity
        values[at] = infinity + payload | (int(rng.integers(2)) << (n_bits - 1))
    buffer = (ctypes.c_char * (values.nbytes + lead + 1))()
    address = ctypes.addressof(buffer) + lead  # odd addresses occur
    ctypes.memmove(address, values.ctypes.data, values.nbytes)
    assert host.first_nonfinite(address, n, dtype) == min(bad, default=-1)


def test_the_largest_finite_values_are_finite() -> None:
    for dtype in DType:
        values = np.full(5000, _INFINITY[dtype] - 1, dtype=_WORDS[dtype])
        assert host.first_nonfinite(values.ctypes.data, values.size, dtype) == -1


def test_importing_host_loads_no_framework() -> None:
    code = "import sys, tvfast.ops.host; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
