"""Exact thresholds against `torch.kthvalue` and against counting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import DTYPES, Part, bit_values, grid_values, normal_values, placed, table_of
from tvfast.ops.raw import Backend
from tvfast.program import Keep, RankQuery, ScoreMap, Threshold

_CASES_PER_TABLE = 100


def keys_of(values: Tensor) -> Tensor:
    """Bit patterns of float32 magnitudes, every NaN as the quiet one."""
    patterns = values.abs().view(torch.int32)
    return torch.where(torch.isnan(values), 0x7FC00000, patterns)


def assert_exact(found: Mapping[str, Threshold], values: Tensor, k: int) -> None:
    """What every backend found is the threshold of the k-th largest magnitude of `values`, float32."""
    keys = keys_of(values)
    expected = float(values.abs().kthvalue(values.numel() - k + 1).values)
    key = keys_of(torch.tensor([expected]))
    counts = int((keys > key).sum()), int((keys == key).sum())
    assert counts[0] < k <= sum(counts)
    for name, one in found.items():
        assert (repr(one.value), one.n_greater, one.n_equal) == (repr(expected), *counts), name


def some_values(rng: np.random.Generator, n: int, dtype: torch.dtype) -> Tensor:
    """Mostly heavy ties; also continuous values, arbitrary bits and constants."""
    kind = rng.integers(6)
    if kind < 3:
        return grid_values(rng, n, dtype, int(rng.integers(1, 9)))
    if kind == 3:
        return normal_values(rng, n, dtype, 1e-4)
    return bit_values(rng, n, dtype) if kind == 4 else torch.full((n,), 0.125, dtype=dtype)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1))
def test_ten_thousand_cases_equal_kthvalue(backends: dict[str, Backend], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts, queries = [], []
    for group in range(_CASES_PER_TABLE):
        n = int(rng.integers(1, 120)) if rng.random() < 0.9 else int(rng.integers(1, 3000))
        dtype = DTYPES[int(rng.integers(3))]
        base = some_values(rng, n, dtype) if rng.random() < 0.7 else None
        model = placed(some_values(rng, n, dtype), int(rng.integers(4)))
        parts.append(Part([model], base, group=group))
        queries.append(RankQuery(group, 0, int(rng.choice([1, n, rng.integers(1, n + 1)]))))
    found = [backend.thresholds(table_of(parts), Keep.BAND, queries) for backend in backends.values()]
    for part, query, *thresholds in zip(parts, queries, *found, strict=True):
        base = 0.0 if part.base is None or part.task_vectors else part.base.float()
        assert_exact(dict(zip(backends, thresholds, strict=True)), part.models[0].float() - base, query.k)


def grouped(rng: np.random.Generator, n_models: int, sizes: Sequence[int], dtype: torch.dtype) -> list[Part]:
    """Two interleaved groups, the entries of each end to end; scores are read through maps."""
    parts, filled = [], [0, 0]
    for i, n in enumerate(sizes):
        group = i % 2
        tensors = [grid_values(rng, n, dtype, 4) for _ in range(2 * n_models + 1)]
        maps = tuple(ScoreMap(scale=2.0**k, shift=-1 / 32 * i, floor=1 / 64) for k in range(n_models))
        parts.append(
            Part(tensors[1 : n_models + 1], tensors[0], scores=tensors[n_models + 1 :],
                 score_maps=maps,
                 group=group, group_offset=filled[group])
        )  # fmt: skip
        filled[group] += n
    return parts


def mapped(score: Tensor, own: ScoreMap) -> Tensor:
    """Grid values, so that every step is exact."""
    return (score * own.scale + own.shift).clamp(min=own.floor)


def keys_of_group(parts: Sequence[Part], group: int, keep: Keep, model: int) -> Tensor:
    """The group's keys in the order of their positions, float32; variance by two passes in float64."""
    found = []
    for part in parts:
        if part.group == group:
            assert part.base is not None
            taus = torch.stack([one.float() - part.base.float() for one in part.models])
            if keep is Keep.BAND:
                found.append(taus[model])
            elif keep is Keep.SCORE:
                found.append(mapped(part.scores[model].float(), part.score_maps[model]))
            else:
                mean = taus.double().sum(dim=0) / len(taus)
                found.append(((taus.double() - mean).square().sum(dim=0) / len(taus)).float())
    return torch.cat(found)


@pytest.mark.parametrize("keep", [Keep.BAND, Keep.SCORE, Keep.VARIANCE])
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_models=st.sampled_from([1, 2, 4]),  # powers of two: the variance of grid values is exact
    sizes=st.lists(st.integers(0, 200), min_size=2, max_size=7),
    dtype=st.sampled_from(DTYPES),
    n_threads=st.integers(0, 3),
)
def test_groups_of_several_tensors(
    backends: dict[str, Backend],
    keep: Keep,
    seed: int,
    n_models: int,
    sizes: list[int],
    dtype: torch.dtype,
    n_threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    parts = grouped(rng, n_models, [sizes[0] + 1, sizes[1] + 1, *sizes[2:]], dtype)
    asked = [(g, m) for g in (1, 0) for m in range(1 if keep is Keep.VARIANCE else n_models)]
    values = {at: keys_of_group(parts, at[0], keep, at[1]) for at in asked}
    queries = [
        RankQuery(*at, int(k))
        for at in asked
        for k in {1, values[at].numel(), rng.integers(1, values[at].numel() + 1)}
    ]
    found = [backend.thresholds(table_of(parts), keep, queries, n_threads) for backend in backends.values()]
    picks, expected = [], []
    for query, *thresholds in zip(queries, *found, strict=True):
        own = values[query.group, query.model]
        assert_exact(dict(zip(backends, thresholds, strict=True)), own, query.k)
        value, r = thresholds[0].value, int(rng.integers(thresholds[0].n_equal))
        picks.append((query.group, query.model, value, r))
        expected.append(int(torch.nonzero(keys_of(own) == keys_of(torch.tensor([value]))).view(-1)[r]))
    for name, backend in backends.items():
        assert backend.nth_equal(table_of(parts), keep, picks, n_threads) == expected, name


def test_shards_of_a_group_report_positions_in_the_whole_group(backend: Backend) -> None:
    ones = torch.ones(10)
    whole = Part([ones], group_offset=100)
    parts = [whole.shard(6, 10), whole.shard(0, 6), Part([torch.ones(5)], group_offset=0)]
    picks = [(0, 0, 1.0, r) for r in (0, 4, 5, 10, 11, 14)]
    assert backend.nth_equal(table_of(parts), Keep.BAND, picks) == [0, 4, 100, 105, 106, 109]


def test_nan_is_above_infinity(backend: Backend) -> None:
    inf = math.inf
    table = table_of([Part([torch.tensor([1.0, -inf, float("nan"), -0.0, 0.0, inf, -float("nan"), 3.0])])])
    found = backend.thresholds(table, Keep.BAND, [RankQuery(0, 0, k) for k in range(1, 9)])
    assert math.isnan(found[0].value)
    assert math.isnan(found[1].value)
    assert [one.value for one in found[2:]] == [inf, inf, 3.0, 1.0, 0.0, 0.0]
    assert [one.n_greater for one in found] == [0, 0, 2, 2, 4, 5, 6, 6]
    assert [one.n_equal for one in found] == [2, 2, 2, 2, 1, 1, 2, 2]
    assert backend.nth_equal(table, Keep.BAND, [(0, 0, float("nan"), 1), (0, 0, inf, 0), (0, 0, 0.0, 1)]) == [
        6,
        1,
        4,
    ]


def test_no_queries(backend: Backend) -> None:
    table = table_of([Part([torch.ones(3)])])
    assert backend.thresholds(table, Keep.BAND, []) == []
    assert backend.nth_equal(table, Keep.BAND, []) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_base", [False, True])
def test_64_mi_elements(native: Backend, dtype: torch.dtype, with_base: bool) -> None:
    n = 1 << 26
    generator = torch.Generator().manual_seed(7)
    base = torch.empty(n).normal_(0, 0.02, generator=generator).to(dtype)
    model = (base.float() + torch.empty(n).normal_(0, 2e-4, generator=generator)).to(dtype)
    part = Part([model], base if with_base else None)
    values = model.float() - base.float() if with_base else model.float()
    ks = [1, n // 5, int(0.9 * n), n]
    found = native.thresholds(table_of([part]), Keep.BAND, [RankQuery(0, 0, k) for k in ks])
    for k, threshold in zip(ks, found, strict=True):
        assert_exact({"": threshold}, values, k)
