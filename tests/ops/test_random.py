"""Draws and tie hashes: known answers, rates, and nothing but (key, global index) decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import Part, bit_values, normal_values, table_of, unpack_plane
from tvfast.ops import _philox_torch, reference
from tvfast.ops.raw import Backend
from tvfast.program import ALWAYS, Keep, ModelScalars, Program, RankQuery, TensorScalars, Tie

KNOWN_ANSWERS = [  # Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
REFERENCE = reference.backend()
indices = st.one_of(
    st.integers(0, 20),
    st.integers(0, 2**45),
    st.sampled_from([2**31 - 1, 2**32 - 1, 2**32, 2**34 - 1, 2**34]),
)
keys = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32 - 1, 2**32, 2**64 - 1]))


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = q >> 32 ^ c1 ^ k0, q % 2**32, p >> 32 ^ c3 ^ k1, p % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def tie_hash(key: int, g: int) -> int:
    folded_key = key % 2**32 ^ (key >> 32) * 0x85EBCA6B % 2**32
    x = (g % 2**32 + (g >> 32) * 0x9E3779B9) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return (x ^ x >> 16) * (folded_key | 1) % 2**32


def kept(backend: Backend, program: Program, own: ModelScalars, n: int, offset: int = 0) -> np.ndarray:
    """What the keep stage keeps of n ones; bools [n]."""
    part = Part([torch.ones(n)], masks=[np.zeros(n, dtype=bool)], offset=offset)
    table = table_of([part])
    backend.row_masks(table, program, [TensorScalars(models=[own])])
    return unpack_plane(table.entries[0].masks[0].owner, n)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers_of_philox(
    counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]
) -> None:
    assert philox(counter, key) == result
    words = [torch.tensor([word]) for word in counter]
    found = _philox_torch.philox((words[0], words[1], words[2], words[3]), key[0] | key[1] << 32)
    assert tuple(int(word) for word in found) == result


@settings(max_examples=60)
@given(key=keys, first=indices)
def test_draws_are_philox_of_key_and_index(backends: dict[str, Backend], key: int, first: int) -> None:
    program = Program(keep=Keep.RANDOM)
    for i in range(9):
        g = first + i
        draw = philox((g >> 2 & 0xFFFFFFFF, g >> 34, 0, 0), (key & 0xFFFFFFFF, key >> 32))[g & 3]
        n = 10 - i  # other lengths and starts: only the global index may matter
        for name, backend in backends.items():
            assert not kept(backend, program, ModelScalars(limit=draw, key=key), n, g)[0], name
            assert kept(backend, program, ModelScalars(limit=draw + 1, key=key), n, g)[0], name


@settings(max_examples=60)
@given(key=keys, first=indices, n=st.integers(1, 40))
def test_ties_are_cut_by_the_hash_of_key_and_index(
    backends: dict[str, Backend], key: int, first: int, n: int
) -> None:
    hashes = np.array([tie_hash(key, first + i) for i in range(n)])
    cut = int(np.sort(hashes)[n // 2])
    program = Program(keep=Keep.BAND, tie=Tie.HASH)
    for name, backend in backends.items():
        low = kept(backend, program, ModelScalars(lo=1.0, lo_cut=cut, key=key), n, first)
        assert low.tolist() == (hashes < cut).tolist(), name
        high = kept(backend, program, ModelScalars(hi=1.0, hi_cut=cut, key=key), n, first)
        assert high.tolist() == (hashes >= cut).tolist(), name


@settings(max_examples=40)
@given(first=indices, n=st.integers(1, 40), cut=st.integers(0, 40))
def test_ties_are_cut_by_index(backends: dict[str, Backend], first: int, n: int, cut: int) -> None:
    program = Program(keep=Keep.BAND, tie=Tie.INDEX)
    for name, backend in backends.items():
        low = kept(backend, program, ModelScalars(lo=1.0, lo_cut=first + cut), n, first)
        assert low.tolist() == [i < cut for i in range(n)], name
        high = kept(backend, program, ModelScalars(hi=1.0, hi_cut=first + cut), n, first)
        assert high.tolist() == [i >= cut for i in range(n)], name


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.3, 0.5, 0.9, 1.0])
def test_the_keep_rate_is_the_probability_in_every_quarter(backend: Backend, probability: float) -> None:
    n = 1 << 18
    own = ModelScalars(limit=round(probability * ALWAYS), key=0x123456789ABCDEF)
    quarters = kept(backend, Program(keep=Keep.RANDOM), own, n).reshape(4, -1).mean(axis=1)
    five_sigma = 5 * math.sqrt(probability * (1 - probability) / (n // 4))
    assert np.abs(quarters - probability).max() <= five_sigma


@pytest.mark.parametrize(("low", "share"), [(0.0, 1.0), (0.25, 0.5), (0.9, 0.4), (1.0, 0.0), (0.3, 0.0)])
@pytest.mark.parametrize("values", ["normal", "few", "equal", "bits"])
@pytest.mark.parametrize(("row", "n"), [(1, 5), (37, 100), (5000, 14_000), (70_001, 70_001)])
def test_draws_by_rank_are_compared_with_the_limit_of_the_rank(
    native: Backend, row: int, n: int, values: str, low: float, share: float
) -> None:
    """Most by the limits of the key's bin; all by ranks where bins hold many keys."""
    rng = np.random.default_rng(n)
    make = {
        "normal": lambda: normal_values(rng, n, torch.float32),
        "few": lambda: torch.from_numpy(rng.choice([0.0, -1.0, 1.5, 3.0], n).astype(np.float32)),
        "equal": lambda: torch.ones(n),
        "bits": lambda: bit_values(rng, n, torch.float32),
    }[values]
    models = [make(), make()]
    step = int(share * 2**63) * 2 // (row + 1)
    own = ModelScalars(limit=round(low * ALWAYS), limit_step=step, key=2**40 + 1)
    planes = []
    for backend in (native, REFERENCE):
        masks = [np.zeros(n, dtype=bool) for _ in models]
        table = table_of([Part(models, masks=masks, row=row, offset=2**32 - 7)])
        backend.row_masks(table, Program(keep=Keep.RANDOM_BY_RANK), [TensorScalars(models=[own, own])])
        planes.append([mask.owner.tolist() for mask in table.entries[0].masks])
    assert planes[0] == planes[1]


@pytest.mark.parametrize(("limit", "n"), [(0, 7), (0, 5), (ALWAYS // 3, 100)])
def test_limits_that_fall_with_ranks(native: Backend, limit: int, n: int) -> None:
    """The product with the rank is taken modulo 2^64."""
    own = ModelScalars(limit=limit, limit_step=2**63, key=5)
    program = Program(keep=Keep.RANDOM_BY_RANK)
    assert kept(native, program, own, n).tolist() == kept(REFERENCE, program, own, n).tolist()


def test_models_draw_independently(backend: Backend) -> None:
    n = 1 << 18
    first, second = (
        kept(backend, Program(keep=Keep.RANDOM), ModelScalars(limit=ALWAYS // 2, key=key), n)
        for key in (2**40 + 1, 2**40 + 2)
    )
    assert abs((first & second).mean() - 0.25) <= 5 * math.sqrt(0.25 * 0.75 / n)
    assert abs((first[1:] & first[:-1]).mean() - 0.25) <= 5 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("offset", [0, 2**31 - 77, 2**33 + 1])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_hash_ties_are_balanced_in_every_quarter(backend: Backend, density: float, offset: int) -> None:
    n = 1 << 18
    own = ModelScalars(lo=1.0, lo_cut=int(density * 2**32), key=99)
    quarters = (
        kept(backend, Program(keep=Keep.BAND, tie=Tie.HASH), own, n, offset).reshape(4, -1).mean(axis=1)
    )
    assert np.abs(quarters - density).max() <= 5 * math.sqrt(density * (1 - density) / (n // 4))


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_hash_ties_keep_the_density_of_16_mi_deltas(native: Backend, density: float) -> None:
    n = 1 << 24
    generator = torch.Generator().manual_seed(3)
    base = torch.empty(n).normal_(0, 0.02, generator=generator).bfloat16()
    model = (base.float() + torch.empty(n).normal_(0, 1e-4, generator=generator)).bfloat16()
    part = Part([model], base, masks=[np.zeros(n, dtype=bool)])
    table = table_of([part])
    k = int(density * n)
    (at,) = native.thresholds(table, Keep.BAND, [RankQuery(0, 0, k)])
    own = ModelScalars(lo=at.value, lo_cut=(k - at.n_greater << 32) // at.n_equal, key=5)
    native.row_masks(table, Program(keep=Keep.BAND, tie=Tie.HASH), [TensorScalars(models=[own])])
    quarters = unpack_plane(table.entries[0].masks[0].owner, n).reshape(4, -1).mean(axis=1)
    assert np.abs(quarters - density).max() <= 0.001


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_tie_hashes_are_uncorrelated(share: float) -> None:
    """Between models, between neighbours and at the distances of rows; five standard deviations at most."""
    n = 2**20
    rng = np.random.default_rng(5)
    for first in (0, 2**33 + 12345):
        index = torch.arange(first, first + n, dtype=torch.int64)
        models = [
            (_philox_torch.tie_hash(int(rng.integers(2**63)), index).numpy() < share * 2**32) - share
            for _ in range(4)
        ]
        unit = share * (1 - share)
        for k, model in enumerate(models):
            assert abs(model.mean()) < 5 * math.sqrt(unit / n)
            for other in models[:k]:
                assert abs((model * other).mean()) < 5 * unit / math.sqrt(n)
            for lag in (1, 2, 3, 4, 16, 64, 768, 1024, 4096):
                assert abs((model[lag:] * model[:-lag]).mean()) < 5 * unit / math.sqrt(n - lag)
