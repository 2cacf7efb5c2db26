"""Trimmed merges without a word from the host: by answers, and by guesses that the merge itself proves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tvfast
from tests.cuda.test_selection import RANKED, on_device
from tests.ops.test_thresholds import grouped
from tests.strategies import DTYPES, Case, Part, assert_same_bits, combined, placed, table_of
from tvfast.errors import ArgumentError
from tvfast.methods.statistics import TableStatistics
from tvfast.ops import cpp
from tvfast.ops.cuda_selection import Outcome
from tvfast.program import (
    Ballot,
    Divisor,
    Keep,
    Members,
    ModelScalars,
    Program,
    RankQuery,
    TensorScalars,
    Tie,
    Vote,
    ZeroSign,
)

TIES = Program(
    keep=Keep.BAND, tie=Tie.GE, vote=Vote.MASS, ballot=Ballot.WEIGHTED, members=Members.STRICT,
    divisor=Divisor.WEIGHT,
)  # fmt: skip
TIES_OF_PEFT = replace(TIES, ballot=Ballot.RAW, divisor=Divisor.COUNT)


def banded(case: Case, queries: Sequence[RankQuery]) -> list[torch.Tensor]:
    """`combine` with the bands that the host makes of the C++ backend's thresholds."""
    table = table_of(case.parts)
    program = case.program
    ks = {(query.group, query.model): query.k for query in queries}
    bands = TableStatistics(cpp.backend(), table, None).bands(
        lambda group, model, n: (0, ks.get((group, model), n)), program.tie, program.keep
    )
    scalars = []
    for one, of_entry in zip(case.scalars, bands, strict=True):
        models = [replace(model) for model in one.models]
        for model, band in zip(models, of_entry, strict=True):
            band.write_to(model)
        scalars.append(replace(one, models=models))
    return combined(cpp.backend(), replace(case, scalars=scalars))


def check(backend: Any, case: Case, queries: Sequence[RankQuery], guesses: bool) -> None:
    """Two runs of the prepared merge, with new data before each, have the bits of `banded`."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    outs = [torch.empty(part.n, dtype=part.out_dtype, device=where) for part in case.parts]
    merge = backend.trimmed(on_device(case.parts, outs), case.program, case.scalars, queries)
    assert merge.guesses is guesses
    expected = banded(case, queries)
    for _ in range(2):
        for out in outs:
            out.fill_(-7.0)
        merge.run()
        assert_same_bits([out.cpu() for out in outs], expected, case.program)


@pytest.mark.parametrize("tie", Tie)
@pytest.mark.parametrize("keep", RANKED)
def test_trimming_without_the_host(emulated: Any, keep: Keep, tie: Tie) -> None:
    rng = np.random.default_rng(int(tie))
    dtype = DTYPES[int(keep) % 3]
    parts = grouped(rng, 3, [90, 300, 500, 70], dtype)
    parts = [*parts[1:], parts[0].shard(40, 90), parts[0].shard(0, 40)]
    parts[1].models[2][:7] = math.nan
    parts[1].models[2][7:9] = math.inf
    program = replace(TIES, keep=keep, tie=tie)
    own = [ModelScalars(weight=0.5 + k, key=3 + k) for k in range(3)]
    case = Case(program, parts, [TensorScalars(models=own, scale=0.7)] * len(parts))
    emulated.limits = (0, 1 << 20, 100)
    for ks in ((40, 200, 1), (500, 3, 6)):  # fewer than there are NaN, too
        models = [0] if keep is Keep.VARIANCE else [0, 1, 2]
        sizes = {g: sum(part.n for part in parts if part.group == g) for g in (0, 1)}
        queries = [RankQuery(g, m, min(ks[m], sizes[g] - 1)) for g in (1, 0) for m in models]
        check(emulated, case, queries, keep is Keep.BAND and tie is Tie.GE)


@pytest.mark.parametrize("tie", Tie)
@pytest.mark.parametrize("small_group", [0, 16384])
def test_some_of_the_infinities_survive(emulated: Any, tie: Tie, small_group: int) -> None:
    """A threshold of infinity among more infinities than are kept: no number is above it, so ties decide."""
    part = tuned(np.random.default_rng(int(tie)), 2000, 3, torch.bfloat16)
    for number, model in enumerate(part.models):
        model[100 : 400 + number] = math.inf
    emulated.limits = (small_group, 1 << 20, 100)
    case = case_of([part], replace(TIES, tie=tie))
    check(emulated, case, queries_of([part], 0.1), tie is Tie.GE)


def test_trimming_asks_once_for_each_model(emulated: Any) -> None:
    part = Part([torch.ones(3)])
    table = on_device([part], [torch.empty(3)])
    scalars = [TensorScalars(models=[ModelScalars()])]
    twice = [RankQuery(0, 0, 1), RankQuery(0, 0, 2)]
    with pytest.raises(ArgumentError, match="two queries are for one group and model"):
        emulated.combine_trimmed(table, Program(keep=Keep.BAND), scalars, twice)
    with pytest.raises(ArgumentError, match="BAND, SCORE or VARIANCE"):
        emulated.combine_trimmed(table, Program(), scalars, twice[:1])
    with pytest.raises(ArgumentError, match="needs an output"):
        emulated.combine_trimmed(on_device([part]), Program(keep=Keep.BAND), scalars, twice[:1])


def tuned(rng: np.random.Generator, n: int, n_models: int, dtype: torch.dtype) -> Part:
    """A base and models at most three 64ths away: two sevenths of the differences have each size but zero."""
    base = rng.integers(-8, 9, n) / 64
    models = [base + rng.integers(-3, 4, n) / 64 for _ in range(n_models)]
    lead = int(rng.integers(4))
    views = [placed(torch.from_numpy(one.astype(np.float32)).to(dtype), lead) for one in (base, *models)]
    return Part(views[1:], views[0], dtype)


def spread(rng: np.random.Generator, n: int, n_models: int) -> Part:
    """Models without equal differences."""
    values = [torch.from_numpy(rng.standard_normal(n).astype(np.float32)) for _ in range(n_models + 1)]
    return Part(values[1:], values[0])


def case_of(parts: Sequence[Part], program: Program = TIES) -> Case:
    own = [ModelScalars(weight=0.5 + 0.25 * k) for k in range(len(parts[0].models))]
    return Case(program, list(parts), [TensorScalars(models=own, scale=0.7)] * len(parts))


def queries_of(parts: Sequence[Part], density: float) -> list[RankQuery]:
    return [
        RankQuery(part.group, model, max(1, int(density * part.n)))
        for part in parts
        for model in range(len(part.models))
    ]


def prepared(backend: Any, case: Case, queries: Sequence[RankQuery]) -> tuple[Any, list[torch.Tensor]]:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    outs = [torch.full((part.n,), -7.0, dtype=part.out_dtype, device=where) for part in case.parts]
    return backend.trimmed(on_device(case.parts, outs), case.program, case.scalars, queries), outs


@pytest.mark.parametrize("n_models", [2, 3, 4])
@pytest.mark.parametrize("program", [TIES, TIES_OF_PEFT], ids=["weights", "counts"])
def test_guesses_have_the_bits_of_answers(emulated: Any, n_models: int, program: Program) -> None:
    """Tensors with heavy ties are read once; small ones are exact at once; others have no guess."""
    rng = np.random.default_rng(n_models)
    emulated.limits = (1000, 1 << 20, 5)
    parts = [
        tuned(rng, 2**14 + 1501, n_models, torch.bfloat16),
        tuned(rng, 300, n_models, torch.bfloat16),
        spread(rng, 3000, n_models),
        tuned(rng, 6000, n_models, torch.float16),
        tuned(rng, 4001, n_models, torch.float32),
    ]
    for group, part in enumerate(parts):
        part.group = group
        part.models[0][5] = math.nan
        part.models[1][7] = math.inf
    case = case_of(parts, program)
    queries = queries_of(parts, 0.15)
    queries[0] = replace(queries[0], k=int(0.43 * parts[0].n))
    merge, outs = prepared(emulated, case, queries)
    for _ in range(2):
        merge.run()
        assert_same_bits([out.cpu() for out in outs], banded(case, queries), program)
        assert merge.outcomes() == [
            Outcome.PROVED if part is not parts[2] else Outcome.UNGUESSED for part in parts
        ]


def lumpy(rng: np.random.Generator, n: int) -> torch.Tensor:
    """Ones and as many twos in runs longer than a line of a sample, which then errs often."""
    runs = rng.permutation(n // 20) % 2
    return (1.0 + torch.from_numpy(np.repeat(runs, 20).astype(np.float32))).bfloat16()


def test_wrong_guesses_are_found_and_mended(emulated: Any) -> None:
    rng = np.random.default_rng(4)
    emulated.limits = (100, 1 << 20, 7)
    n = 3000
    parts = [Part([lumpy(rng, n), lumpy(rng, n)], group=group) for group in range(24)]
    case = case_of(parts)
    queries = [
        RankQuery(part.group, model, n // 2 + (30 if part.group % 2 else -30))
        for part in parts
        for model in (0, 1)
    ]
    merge, outs = prepared(emulated, case, queries)
    merge.run()
    assert_same_bits([out.cpu() for out in outs], banded(case, queries))
    found = merge.outcomes()
    assert set(found) == set(Outcome)
    for parity in (0, 1):  # thresholds above the guess, and below it
        assert Outcome.WRONG in found[parity::2]


def test_a_group_is_guessed_as_a_whole(emulated: Any) -> None:
    rng = np.random.default_rng(6)
    emulated.limits = (1000, 1 << 20, 100)
    whole = tuned(rng, 4000, 2, torch.bfloat16)
    other = spread(rng, 2000, 2)
    other.group = 1
    shards = [whole.shard(0, 1501), whole.shard(1501, 1501), whole.shard(1501, 4000)]
    case = case_of([shards[2], other, *shards[:2]])
    queries = [RankQuery(g, m, 600) for g in (0, 1) for m in (0, 1)]
    merge, outs = prepared(emulated, case, queries)
    merge.run()
    assert_same_bits([out.cpu() for out in outs], banded(case, queries))
    assert [merge.outcomes()[e] for e in (0, 2)] == [Outcome.PROVED] * 2
    assert merge.outcomes()[1] is Outcome.UNGUESSED


def test_what_cannot_be_guessed(emulated: Any) -> None:
    """Other ties, stages or bands, and outputs that the second merge would have to read."""
    if torch.cuda.is_available():
        pytest.skip("its tables are of CPU tensors")
    rng = np.random.default_rng(5)
    part = tuned(rng, 300, 3, torch.bfloat16)
    queries = queries_of([part], 0.15)

    def guesses(program: Program = TIES, out: torch.Tensor | None = None, **scalars: Any) -> bool:
        own = [ModelScalars(**scalars) for _ in part.models]
        outs = [torch.empty(part.n, dtype=part.out_dtype) if out is None else out]
        table = table_of([part], outs)
        asked = queries[:2] if scalars else queries
        return bool(emulated.trimmed(table, program, [TensorScalars(models=own)], asked).guesses)

    assert guesses()
    for other in ({"tie": Tie.HASH}, {"tie": Tie.INDEX}, {"vote": Vote.COUNT}, {"zero_sign": ZeroSign.MINUS}):
        assert not guesses(replace(TIES, **other))
    assert guesses(lo=0.5)
    assert not guesses(hi=0.5)
    assert part.base is not None
    for taken in (part.base, part.models[2]):
        assert not guesses(out=taken)
    buffer = part.models[0].new_zeros(2 * part.n)
    buffer[: part.n] = part.models[0]
    part.models[0] = buffer[: part.n]
    assert guesses(out=buffer[part.n :])
    assert not guesses(out=buffer[part.n - 1 : 2 * part.n - 1])


def test_outputs_within_outputs_are_seen(emulated: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("its tables are of CPU tensors")
    rng = np.random.default_rng(5)
    large, small = tuned(rng, 900, 2, torch.bfloat16), tuned(rng, 100, 2, torch.bfloat16)
    small.group = 1
    buffer = torch.zeros(1000, dtype=torch.bfloat16)
    queries, outs = queries_of([large, small], 0.15), [buffer[:900], buffer[:100]]
    for place, guesses in ((500, False), (900, True)):
        small.models[1] = buffer[place : place + 100]
        case = case_of([large, small])
        table = table_of(case.parts, outs)
        assert emulated.trimmed(table, TIES, case.scalars, queries).guesses is guesses


def test_outputs_may_be_inputs_without_guesses(emulated: Any) -> None:
    rng = np.random.default_rng(8)
    part = tuned(rng, 700, 3, torch.bfloat16)
    assert part.base is not None
    expected = banded(case_of([part]), queries_of([part], 0.15))
    table = on_device([part])
    table.entries[0] = replace(table.entries[0], out=table.entries[0].base)
    emulated.combine_trimmed(table, TIES, case_of([part]).scalars, queries_of([part], 0.15))
    assert_same_bits([table.entries[0].base.owner.cpu()], expected)


@pytest.mark.parametrize(
    ("method", "parameters", "trims"),
    [
        ("ties", {"tie": "ge", "density": 0.15}, True),
        ("ties", {"tie": "hash", "density": [0.0, 0.15, 1.0]}, True),
        ("ties", {"tie": "index", "density": 0.15}, False),
        ("ties", {"tie": "ge", "density": 1.0}, False),
        ("ties", {"rescale": True, "density": 0.15}, False),
        ("ties", {"dialect": "paper", "density": 0.15}, False),
        ("magnitude_prune", {"density": 0.15}, True),
    ],
    ids=str,
)
def test_public_merges_that_only_trim_wait_for_nothing(
    emulated: Any, method: str, parameters: dict[str, Any], trims: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    usual = type(emulated).trimmed

    def trimmed(*arguments: Any) -> Any:
        made.append(usual(*arguments))
        return made[-1]

    monkeypatch.setattr(type(emulated), "trimmed", trimmed)
    rng = np.random.default_rng(3)
    parts = [tuned(rng, n, 3, torch.bfloat16) for n in (20_000, 300)]
    states = [[one.base for one in parts], *([one.models[k] for one in parts] for k in range(3))]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    base, *models = ([tensor.to(where) for tensor in state if tensor is not None] for state in states)
    waits = emulated._module.runtime_calls()[2]
    found = tvfast.merge(base, models, method, **parameters)
    assert [one.guesses for one in made] == ([parameters.get("tie") == "ge"] if trims else [])
    if trims:
        assert emulated._module.runtime_calls()[2] == waits
    if parameters.get("tie") == "ge" and trims:
        assert made[0].outcomes() == [Outcome.PROVED] * 2
    kept = [tensor.clone() for tensor in base]
    tvfast.merge_(kept, models, method, **parameters)
    assert [one.guesses for one in made[1:]] == ([False] if trims else [])
    monkeypatch.setenv("TVFAST_BACKEND", "cpp")
    cpu = [[tensor.cpu() for tensor in state] for state in (base, *models)]
    expected = tvfast.merge(cpu[0], cpu[1:], method, **parameters)
    for merged in (found, kept):
        assert_same_bits([tensor.cpu() for tensor in merged], expected)
