"""Selection by the CUDA kernels: exact whatever the sample says, in any order of blocks and threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops import test_thresholds
from tests.ops.test_thresholds import assert_exact, grouped
from tests.strategies import DTYPES, Part, bit_values, placed, table_of
from tvfast.errors import ArgumentError
from tvfast.ops import cpp
from tvfast.program import (
    Keep,
    RankQuery,
    WorkTable,
)

_SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
RANKED = (Keep.BAND, Keep.SCORE, Keep.VARIANCE)
LIMITS = {
    "usual": None,
    "sampled": (0, 1 << 20, 100),
    "batches": (0, 2000, 3),
    "no room": (0, 0, 100),
}
"""Groups that are taken as a whole, keys that may be collected, queries of a batch."""


@pytest.fixture(params=LIMITS)
def limited(request: pytest.FixtureRequest, emulated: Any) -> Any:
    if LIMITS[request.param] is not None:
        emulated.limits = LIMITS[request.param]
    return emulated


def check_all(backend: Any, parts: Sequence[Part], keep: Keep, queries: Sequence[RankQuery]) -> None:
    """Thresholds, counts and positions equal the C++ backend's."""
    table, other = on_device(parts), cpp.backend()
    expected = other.thresholds(table_of(parts), keep, queries)
    assert repr(backend.thresholds(table, keep, queries)) == repr(expected)
    rng = np.random.default_rng(0)
    picks = [
        (query.group, query.model, answer.value, int(r))
        for query, answer in zip(queries, expected, strict=True)
        for r in {0, answer.n_equal - 1, rng.integers(answer.n_equal)}
    ]
    assert backend.nth_equal(table, keep, picks) == other.nth_equal(table_of(parts), keep, picks)
    values = [pick[:3] for pick in picks]
    assert backend.count_equal(table, keep, values) == other.count_equal(table_of(parts), keep, values)
    if keep is Keep.BAND:
        found = backend.verify(
            table, [(q.group, q.model, a.value) for q, a in zip(queries, expected, strict=True)]
        )
        assert repr(found) == repr(expected)


def on_device(parts: Sequence[Part], outs: Sequence[torch.Tensor] | None = None) -> WorkTable:
    """The parts' table, with copies of the parts on the device of the backend."""
    if not torch.cuda.is_available():
        return table_of(parts, outs)

    def moved(part: Part) -> Part:
        return replace(
            part,
            models=[model.cuda() for model in part.models],
            base=None if part.base is None else part.base.cuda(),
            scores=[score.cuda() for score in part.scores],
        )

    return table_of([moved(part) for part in parts], outs)


def some_queries(rng: np.random.Generator, parts: Sequence[Part], keep: Keep, n: int) -> list[RankQuery]:
    found = []
    for group in sorted({part.group for part in parts}):
        size = sum(part.n for part in parts if part.group == group)
        for model in range(1 if keep is Keep.VARIANCE else len(parts[0].models)):
            ks = [1, size, *rng.integers(1, size + 1, n)][:n]
            found += [RankQuery(group, model, int(k)) for k in ks]
    rng.shuffle(found)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("keep", RANKED)
def test_groups_shards_and_several_tiles(limited: Any, keep: Keep) -> None:
    rng = np.random.default_rng(int(keep))
    dtype = DTYPES[int(keep) % 3]
    parts = grouped(rng, 2, [90, 1, 0, 70, 2**14 + 300, 64], dtype)
    parts[0].models[0][-20:] = bit_values(rng, 20, dtype)
    parts = [*parts[1:], parts[0].shard(40, 90), parts[0].shard(0, 40)]
    check_all(limited, parts, keep, some_queries(rng, parts, keep, 2))


@settings(max_examples=15, suppress_health_check=_SHARED)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_models=st.sampled_from([1, 2, 4, 5]),
    sizes=st.lists(st.integers(0, 300), min_size=2, max_size=5),
    keep=st.sampled_from(RANKED),
    limits=st.sampled_from([limits for limits in LIMITS.values() if limits is not None]),
)
def test_any_group(
    emulated: Any, seed: int, n_models: int, sizes: list[int], keep: Keep, limits: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(seed)
    dtypes = [DTYPES[i] for i in rng.integers(0, 3, n_models + 1)]
    parts, filled = [], [0, 0]
    for number, n in enumerate([sizes[0] + 1, sizes[1] + 1, *sizes[2:]]):
        make = [test_thresholds.some_values, bit_values][int(rng.integers(2))]
        one = [placed(make(rng, n, dtype), int(rng.integers(4))) for dtype in dtypes]
        scores = [placed(make(rng, n, dtype), int(rng.integers(4))) for dtype in dtypes[1:]]
        base = one[0] if rng.random() < 0.7 else None
        group = number % 2
        parts.append(Part(one[1:], base, scores=scores, group=group, group_offset=filled[group]))
        filled[group] += n
    emulated.limits = limits
    check_all(emulated, parts, keep, some_queries(rng, parts, keep, 2))


@pytest.mark.parametrize("order", ["ascending", "blocks", "constant", "spread"])
def test_samples_that_mislead(emulated: Any, order: str) -> None:
    rng = np.random.default_rng(3)
    n = 20_000
    values = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    if order == "ascending":
        values = values.abs().sort().values
    elif order == "blocks":  # lines of a sample hold one value each
        values = values[: n // 250].repeat_interleave(250)
    elif order == "constant":
        values = torch.where(torch.arange(n) % 977 == 5, values, 0.25)
    else:  # a bracket holds more keys than a block
        values = torch.cat([torch.linspace(0.5, 0.6, n // 2), values[n // 2 :]])
    emulated.limits = (0, 1 << 20, 100)
    queries = [RankQuery(0, 0, k) for k in (1, 2, 19, 500, n // 3, n // 2, n - 3, n)]
    found = emulated.thresholds(on_device([Part([values])]), Keep.BAND, queries)
    for query, one in zip(queries, found, strict=True):
        assert_exact({"cuda": one}, values, query.k)


@pytest.mark.parametrize("seed", ["2", "3"])
def test_the_order_of_blocks_and_threads(emulated: Any, seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVFAST_SIMT_SEED", seed)
    rng = np.random.default_rng(5)
    parts = grouped(rng, 2, [900, 40, 17_000], torch.bfloat16)
    emulated.limits = (0, 300, 100)
    check_all(emulated, parts, Keep.BAND, some_queries(rng, parts, Keep.BAND, 3))


def test_more_queries_than_a_chunk(emulated: Any) -> None:
    values = torch.arange(1, 3001).float().flip(0)
    emulated.limits = (0, 1 << 20, 7)
    queries = [RankQuery(0, model, k) for k in (1, 40, 1500, 2999, 3000) for model in (1, 0)]
    found = emulated.thresholds(on_device([Part([values, 2 * values])]), Keep.BAND, queries)
    for query, one in zip(queries, found, strict=True):
        assert_exact({"cuda": one}, (query.model + 1) * values, query.k)


def test_the_checks_of_every_backend(limited: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("its tables are of CPU tensors")
    test_thresholds.test_nan_is_above_infinity(limited)
    test_thresholds.test_no_queries(limited)
    test_thresholds.test_shards_of_a_group_report_positions_in_the_whole_group(limited)


def test_infinities_and_nan_at_the_end_of_a_bracket(limited: Any) -> None:
    inf, nan = math.inf, math.nan
    values = torch.tensor([inf, -nan, 1.0, nan, -inf, 2.0]).repeat(40)
    part = Part([values])
    check_all(limited, [part], Keep.BAND, [RankQuery(0, 0, k) for k in (1, 80, 81, 160, 161, 240)])


def test_questions_without_an_answer(emulated: Any) -> None:
    table = on_device([Part([torch.ones(3)])])
    for k in (0, 4):
        with pytest.raises(ArgumentError, match=r"k must be in \[1, 3\]"):
            emulated.thresholds(table, Keep.BAND, [RankQuery(0, 0, k)])
    for value, r, n in ((1.0, 3, 3), (2.0, 0, 0), (1.0, -1, 3)):
        with pytest.raises(ArgumentError, match=f"{n} entries equal"):
            emulated.nth_equal(table, Keep.BAND, [(0, 0, value, r)])
    with pytest.raises(ArgumentError, match="BAND, SCORE or VARIANCE"):
        emulated.thresholds(table, Keep.MASK, [RankQuery(0, 0, 1)])


def test_workspace_is_bounded(emulated: Any) -> None:
    """Bytes for 3 models of 2^32 entries: one batch of at most `limits` keys, whatever the table."""
    module = emulated._module
    native = module.Table(3)
    for group in range(40):
        native.add((0, 0), [(0, 1)] * 3, (0, 0), [], [], [], 1 << 32, 0, 0, 0, 0, group, 0, False)
    asked = [(group, model, 1 << 31) for group in range(40) for model in range(3)]
    queries = module.ResidentQueries(native, 1, asked, module.LIMITS)
    assert queries.n_batches == 120
    assert queries.n_workspace < 4 * module.LIMITS[1] + (8 << 20)
    small = module.Table(1)
    small.add((0, 0), [(0, 1)], (0, 0), [], [], [], 1000, 0, 0, 0, 0, 0, 0, False)
    assert module.ResidentQueries(small, 1, [(0, 0, 1)], module.LIMITS).n_workspace < 32 << 10


def test_workspace_of_places_grows_with_the_entries(emulated: Any) -> None:
    """Not with their square, for thousands of small tensors of which each has its own queries."""
    module = emulated._module
    native = module.Table(1)
    n = 2000
    for group in range(n):
        native.add((0, 0), [(0, 1)], (0, 0), [], [], [], 1000, 0, 0, 0, 0, group, 0, False)
    asked = module.ResidentQueries(native, 1, [(group, 0, 1) for group in range(n)], module.LIMITS)
    assert module.equals_of(native, asked).n_workspace < 64 * n
    assert module.ResidentEquals(native, 1, [(0, 0, 1.0, 0)] * n, True).n_workspace > 8 * n * n
