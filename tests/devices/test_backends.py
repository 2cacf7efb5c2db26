"""The kernels for GPUs: bit for bit the reference at float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops import test_combine, test_measure, test_thresholds
from tests.ops.test_combine import REFERENCE, canonical, every_program, product_case
from tests.ops.test_measure import EVERYTHING, asked
from tests.ops.test_thresholds import grouped
from tests.strategies import (
    DTYPES,
    Case,
    Part,
    assert_same_bits,
    bit_values,
    cases,
    combined,
    grid_values,
    near_programs,
    placed,
    scoring_cases,
    table_of,
)
from tvfast import merge, methods
from tvfast.errors import ArgumentError
from tvfast.ops.raw import Backend, Wants
from tvfast.program import (
    Ballot,
    Cross,
    Divisor,
    Gain,
    Keep,
    Members,
    ModelScalars,
    Program,
    RankQuery,
    Reduce,
    ScoreMap,
    TensorScalars,
    Tie,
    Vote,
    Weighting,
    ZeroSign,
)

_SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
_STAGES = {
    "keep": Keep,
    "tie": Tie,
    "cross": Cross,
    "gain": Gain,
    "weighting": (Weighting.MODEL, Weighting.SCORE, Weighting.ALONE),  # of NEARNESS are only two models
    "vote": Vote,
    "ballot": Ballot,
    "zero_sign": ZeroSign,
    "members": Members,
    "reduce": Reduce,
    "divisor": Divisor,
}


def pairs_of(program: Program) -> set[object]:
    return set(itertools.combinations([(name, getattr(program, name)) for name in _STAGES], 2))


def few_rows_case() -> Case:
    """The case of the product with rows of 150: the interpreter takes long for each row that it sorts.

    The scores of its first entry are read through maps, those of the second as they are.
    """
    case = product_case()
    maps = tuple(ScoreMap(scale=2.0**k, shift=-1 / 64, floor=1 / 128) for k in range(3))
    return replace(case, parts=[replace(case.parts[0], row=150, score_maps=maps), case.parts[1]])


def programs_on_scores(program: Program) -> Iterator[Program]:
    """A program, and those that differ from it in what they read of scores."""
    for cross in Cross if program.keep is Keep.SCORE else [Cross.NONE]:
        for weighting in Weighting:
            yield replace(program, cross=cross, weighting=weighting)


def of_two_models(case: Case) -> Case:
    """Its first two models, as many as NEARNESS compares."""
    parts = [
        replace(
            part,
            models=part.models[:2],
            scores=part.scores[:2],
            masks=part.masks[:2],
            score_maps=part.score_maps[:2],
        )
        for part in case.parts
    ]
    return replace(case, parts=parts, scalars=[replace(one, models=one.models[:2]) for one in case.scalars])


def combine_of(backend: Backend) -> Callable[[Program], None]:
    every = few_rows_case()
    two = of_two_models(every)
    outs = [torch.empty(part.n, dtype=part.out_dtype) for part in every.parts]
    tables = {id(case): case.table(outs) for case in (every, two)}

    def check(program: Program) -> None:
        case = two if program.weighting is Weighting.NEARNESS else every
        table = tables[id(case)]
        for out in outs:
            out.fill_(float("nan"))
        backend.combine(table, program, case.scalars)
        assert_same_bits(outs, combined(REFERENCE, replace(case, program=program)), program)

    return check


def test_every_pair_of_stages(gpu: Backend) -> None:
    from tvfast.kernels.compile_ahead import covering_programs

    check = combine_of(gpu)
    programs = covering_programs()
    met: set[object] = set().union(*map(pairs_of, programs))
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(_STAGES, 2)
        for x in _STAGES[a]
        for y in _STAGES[b]
    }
    assert met == wanted
    for program in programs:
        check(program)


@pytest.mark.slow
@pytest.mark.parametrize("keep", Keep)
def test_every_combination_of_stages(gpu: Backend, keep: Keep) -> None:
    check = combine_of(gpu)
    programs = {canonical(program) for program in every_program() if program.keep is keep}
    for program in sorted(programs, key=str):
        for one in programs_on_scores(program):
            check(one)


@settings(max_examples=30, suppress_health_check=_SHARED)
@given(case=cases(most_parts=2, widest=130) | scoring_cases(most_parts=2, widest=130))
def test_random_tables(gpu: Backend, case: Case) -> None:
    assert_same_bits(combined(gpu, case), combined(REFERENCE, case), case.program)


@settings(max_examples=20, suppress_health_check=_SHARED)
@given(case=cases(choose=near_programs, counts=st.just(2), most_parts=2, widest=130))
def test_weights_by_nearness(gpu: Backend, case: Case) -> None:
    assert_same_bits(combined(gpu, case), combined(REFERENCE, case), case.program)
    found, expected = (
        one.measure(case.table(), case.program, case.scalars, Wants.VOTES) for one in (gpu, REFERENCE)
    )
    assert [one.elected for one in found] == [one.elected for one in expected]


@pytest.mark.parametrize("n_models", [1, 4, 8, 9])
def test_scores_of_any_number_of_models(gpu: Backend, n_models: int) -> None:
    rng = np.random.default_rng(n_models)
    n = 70
    models = [grid_values(rng, n, torch.bfloat16) for _ in range(n_models)]
    scores = [bit_values(rng, n, DTYPES[k % 3]) if k == 1 else grid_values(rng, n, torch.float32)
              for k in range(n_models)]  # fmt: skip
    maps = tuple(ScoreMap(scale=0.3 * (k + 1), shift=1e-3, floor=0.05) for k in range(n_models))
    part = Part(models, grid_values(rng, n, torch.bfloat16), scores=scores, score_maps=maps)
    own = [ModelScalars(weight=0.3 - 0.1 * k, lo=0.1, lo_cut=2**31, key=k) for k in range(n_models)]
    scalars = [TensorScalars(models=own, scale=0.7)]
    for cross, weighting, vote, tie in (
        (Cross.NONE, Weighting.SCORE, Vote.MASS, Tie.GE),
        (Cross.WINNER, Weighting.SCORE, Vote.NONE, Tie.HASH),
        (Cross.EXCLUDE_OTHERS, Weighting.MODEL, Vote.MASS, Tie.INDEX),
    ):
        program = Program(
            keep=Keep.SCORE, tie=tie, cross=cross, weighting=weighting, vote=vote, divisor=Divisor.WEIGHT
        )
        case = Case(program, [part], scalars)
        assert_same_bits(combined(gpu, case), combined(REFERENCE, case), program)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merges_by_score_in_packets_and_quads(gpu: Backend, dtype: torch.dtype) -> None:
    """Fisher merging, and masks that the lower end of a band decides; over several tiles."""
    rng = np.random.default_rng(9)
    n = 2**14 + 203
    tensors = [grid_values(rng, n, dtype) for _ in range(4)]
    tensors[1][-40:] = bit_values(rng, 40, dtype)
    scores = [placed(grid_values(rng, n, torch.float32), lead) for lead in (0, 1, 2)]
    maps = tuple(ScoreMap(scale=4.0, shift=0.125 * k, floor=1e-6) for k in range(3))
    own = [ModelScalars(weight=0.5 + k, lo=0.25, lo_cut=2**30, key=k) for k in range(3)]
    part = Part(tensors[1:], tensors[0], dtype, scores=scores, score_maps=maps, offset=2**32 - 5)
    for program in (
        Program(weighting=Weighting.SCORE, divisor=Divisor.WEIGHT),
        Program(keep=Keep.SCORE),
        Program(keep=Keep.SCORE, tie=Tie.HASH),
    ):
        case = Case(program, [part], [TensorScalars(models=own, scale=0.7, divisor_floor=0.0)])
        assert_same_bits(combined(gpu, case), combined(REFERENCE, case), program)


@pytest.mark.parametrize("n_models", [8, 9, 17])
def test_many_models(gpu: Backend, n_models: int) -> None:
    rng = np.random.default_rng(n_models)
    models = [grid_values(rng, 70, torch.bfloat16) for _ in range(n_models)]
    own = [ModelScalars(weight=0.1 * k - 0.3, gain=1.5, lo=0.05, key=k) for k in range(n_models)]
    scalars = [TensorScalars(models=own, scale=0.7)]
    for vote, reduce in itertools.product(Vote, Reduce):
        weighting = Weighting.ALONE if vote is Vote.MASS else Weighting.MODEL
        program = Program(
            keep=Keep.BAND,
            weighting=weighting,
            vote=vote,
            ballot=Ballot.WEIGHTED,
            reduce=reduce,
            members=Members.STRICT,
        )
        case = Case(program, [Part(models, grid_values(rng, 70, torch.bfloat16))], scalars)
        assert_same_bits(combined(gpu, case), combined(REFERENCE, case), program)


@pytest.mark.parametrize("key", [0, 6, 7, 2**63 + 2, 2**64 - 1])
def test_ties_by_the_hash_of_even_and_odd_keys(gpu: Backend, key: int) -> None:
    own = ModelScalars(lo=1.0, lo_cut=2**31, key=key)
    part = Part([torch.ones(300)], offset=2**32 - 150)
    case = Case(Program(keep=Keep.BAND, tie=Tie.HASH), [part], [TensorScalars(models=[own])])
    (found,) = combined(gpu, case)
    assert_same_bits([found], combined(REFERENCE, case), case.program)
    assert 100 < int(found.sum()) < 200


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [0, 1])
def test_whole_blocks_and_several_tiles(gpu: Backend, dtype: torch.dtype, lead: int) -> None:
    rng = np.random.default_rng(lead)
    n = 2**14 + 1500
    buffers = [torch.cat([torch.zeros(lead, dtype=dtype), bit_values(rng, n, dtype)]) for _ in range(3)]
    views = [buffer[lead:] for buffer in buffers]
    own = [ModelScalars(weight=0.7, limit=2**31, key=5), ModelScalars(weight=-0.2, limit=2**31, key=6)]
    small = Part([grid_values(rng, 5, dtype)] * 2, grid_values(rng, 5, dtype), dtype, offset=2**33)
    for keep in (Keep.RANDOM, Keep.BAND):
        program = Program(keep=keep, vote=Vote.MASS, members=Members.STRICT, divisor=Divisor.COUNT)
        parts = [small, Part(views[1:], views[0], dtype, offset=4 - lead), small]
        case = Case(program, parts, [TensorScalars(models=own)] * 3)
        assert_same_bits(combined(gpu, case), combined(REFERENCE, case), program)


@pytest.mark.parametrize("row", [0, 2500])
def test_rows_too_long_for_the_kernel(gpu: Backend, row: int) -> None:
    from tvfast.kernels.ranks import LONGEST_ROW

    rng = np.random.default_rng(1)
    part = Part([bit_values(rng, 3000, torch.float16)], grid_values(rng, 3000, torch.float16), row=row)
    assert LONGEST_ROW < 2500
    own = TensorScalars(models=[ModelScalars(rank_lo=100, rank_hi=1900)])
    case = Case(Program(keep=Keep.BAND_BY_RANK), [part], [own])
    assert_same_bits(combined(gpu, case), combined(REFERENCE, case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_of_one_model_is_a_cast(gpu: Backend, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(9)
    parts = [
        Part([placed(bit_values(rng, 1000, dtype), lead)], out_dtype=out_dtype, out_lead=out_lead)
        for out_dtype, lead, out_lead in itertools.product(DTYPES, (0, 3), (0, 1))
    ]
    case = Case(Program(), parts, [TensorScalars(models=[ModelScalars()])] * len(parts))
    expected = [part.models[0].to(part.out_dtype) for part in parts]
    for one in expected:
        one[one.isnan()] = float("nan")
    assert_same_bits(combined(gpu, case), expected)


def test_shards_and_places(gpu: Backend) -> None:
    rng = np.random.default_rng(2)
    case = product_case()
    for keep in Keep:
        part = replace(case.parts[0], row=128, models=[bit_values(rng, 257, torch.bfloat16)] * 3)
        shards = [part.shard(start, stop) for start, stop in ((0, 128), (128, 256), (256, 257))]
        program = Program(keep=keep, tie=Tie.HASH, vote=Vote.COUNT)
        whole = combined(gpu, Case(program, [part], case.scalars[:1]))
        split = combined(gpu, Case(program, shards, case.scalars[:1] * 3))
        assert_same_bits([torch.cat(split)], whole, program)


def test_in_place(gpu: Backend) -> None:
    case = product_case()
    for number in (0, 3):
        case = replace(case, program=Program(keep=Keep.VARIANCE, vote=Vote.MASS))
        part = replace(case.parts[0], models=[model.clone() for model in case.parts[0].models])
        target = [part.base, *part.models][number]
        assert target is not None
        part.out_dtype = target.dtype
        one = Case(case.program, [part], case.scalars[:1])
        expected = combined(REFERENCE, one)
        gpu.combine(one.table([target]), one.program, one.scalars)
        assert_same_bits([target], expected)


@pytest.mark.parametrize("keep", Keep)
def test_measures_and_planes_of_every_keep_stage(gpu: Backend, keep: Keep) -> None:
    case = few_rows_case()
    for number, tie in enumerate(Tie if keep in (Keep.BAND, Keep.SCORE, Keep.VARIANCE) else [Tie.HASH]):
        vote, gain = list(Vote)[(number + keep) % 3], list(Gain)[number % 2]
        weighting = (Weighting.MODEL, Weighting.SCORE, Weighting.ALONE)[number]
        program = Program(
            keep=keep, tie=tie, cross=list(Cross)[number], weighting=weighting,
            vote=vote, gain=gain, ballot=Ballot.WEIGHTED if number else Ballot.RAW,
        )  # fmt: skip
        found = gpu.measure(case.table(), program, case.scalars, EVERYTHING)
        expected = REFERENCE.measure(case.table(), program, case.scalars, EVERYTHING)
        assert [asked(one, EVERYTHING) for one in found] == [asked(one, EVERYTHING) for one in expected]
        if keep is not Keep.MASK:
            planes = []
            for backend in (gpu, REFERENCE):
                table = case.table()
                backend.row_masks(table, program, case.scalars)
                planes.append([mask.owner.tolist() for entry in table.entries for mask in entry.masks])
            assert planes[0] == planes[1]


@settings(max_examples=15, suppress_health_check=_SHARED)
@given(seed=st.integers(0, 2**32 - 1), wants=st.integers(0, 63).map(Wants))
def test_sums_of_arbitrary_numbers(gpu: Backend, seed: int, wants: Wants) -> None:
    rng = np.random.default_rng(seed)
    n_models, n = int(rng.integers(1, 4)), int(rng.integers(0, 300))
    models = [bit_values(rng, n, torch.float32) for _ in range(n_models)]
    models = [torch.where(torch.isfinite(model), model, 1.0) for model in models]
    if n > 2 and seed % 2:
        models[0][1] = -models[0][0]  # a sum whose largest addends cancel
    own = TensorScalars(models=[ModelScalars() for _ in models])
    case = Case(Program(vote=Vote.MASS), [Part(models)], [own])
    found = gpu.measure(case.table(), case.program, case.scalars, wants)
    expected = REFERENCE.measure(case.table(), case.program, case.scalars, wants)
    assert [asked(one, wants) for one in found] == [asked(one, wants) for one in expected]


def test_the_largest_addends_may_cancel(gpu: Backend) -> None:
    model = torch.tensor([2.0**60, 2.0**-60, 1.5])
    other = torch.tensor([1.0, 1.0, -(2.0**60) / 1.5])
    case = Case(Program(), [Part([model, other])], [TensorScalars(models=[ModelScalars(), ModelScalars()])])
    (found,) = gpu.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    (expected,) = REFERENCE.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    assert found.gram == expected.gram


def test_measures_of_many_models_and_several_tiles(gpu: Backend) -> None:
    rng = np.random.default_rng(4)
    for n_models, n in ((9, 40), (2, 2**14 + 700)):
        models = [bit_values(rng, n, torch.bfloat16) for _ in range(n_models)]
        own = TensorScalars(models=[ModelScalars() for _ in models])
        case = Case(Program(vote=Vote.COUNT), [Part(models)], [own])
        wants = Wants.L1 | Wants.SQUARES | Wants.COUNTS | Wants.VOTES
        found = gpu.measure(case.table(), case.program, case.scalars, wants)
        expected = REFERENCE.measure(case.table(), case.program, case.scalars, wants)
        assert [asked(one, wants) for one in found] == [asked(one, wants) for one in expected]


@pytest.mark.parametrize("keep", [Keep.BAND, Keep.SCORE, Keep.VARIANCE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_and_places(gpu: Backend, keep: Keep, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(7)
    parts = grouped(rng, 2, [90, 1, 0, 70, 2**14 + 300, 64], dtype)
    parts[0].models[0][-20:] = bit_values(rng, 20, dtype)
    parts = [*parts[1:], parts[0].shard(40, 90), parts[0].shard(0, 40)]
    sizes = [sum(part.n for part in parts if part.group == group) for group in (0, 1)]
    queries = [
        RankQuery(group, model, int(k))
        for group in (1, 0)
        for model in range(1 if keep is Keep.VARIANCE else 2)
        for k in (1, sizes[group], rng.integers(1, sizes[group] + 1), rng.integers(1, sizes[group] + 1))
    ]
    found = gpu.thresholds(table_of(parts), keep, queries)
    assert repr(found) == repr(REFERENCE.thresholds(table_of(parts), keep, queries))
    picks = [
        (query.group, query.model, answer.value, int(r))
        for query, answer in zip(queries, found, strict=True)
        for r in {0, answer.n_equal - 1, rng.integers(answer.n_equal)}
    ]
    positions = gpu.nth_equal(table_of(parts), keep, picks)
    assert positions == REFERENCE.nth_equal(table_of(parts), keep, picks)


def test_questions_without_an_answer(gpu: Backend) -> None:
    table = table_of([Part([torch.ones(3)])])
    for k in (0, 4):
        with pytest.raises(ArgumentError, match=r"k must be in \[1, 3\]"):
            gpu.thresholds(table, Keep.BAND, [RankQuery(0, 0, k)])
    for value, r, n in ((1.0, 3, 3), (2.0, 0, 0), (1.0, -1, 3)):
        with pytest.raises(ArgumentError, match=f"{n} entries equal"):
            gpu.nth_equal(table, Keep.BAND, [(0, 0, value, r)])
    with pytest.raises(ArgumentError, match="BAND, SCORE or VARIANCE"):
        gpu.thresholds(table, Keep.MASK, [RankQuery(0, 0, 1)])


def test_the_checks_of_every_backend(gpu: Backend) -> None:
    for keep in (Keep.BAND, Keep.BAND_BY_RANK):
        test_combine.test_tables_with_empty_and_single_element_tensors(gpu, keep, 2)
    for sign in (1.0, -1.0):
        test_combine.test_fused_sums_round_once(gpu, sign)
    for dtype in DTYPES:
        test_combine.test_nan_reaches_the_output_as_the_quiet_nan(gpu, dtype)
        test_measure.test_counts(gpu, dtype)
    test_measure.test_nonfinite_sums(gpu)
    test_measure.test_squares_are_the_diagonal_of_the_gram_matrix(gpu)
    test_measure.test_the_kept_entries_are_summed_before_gain_and_weight(gpu)
    test_thresholds.test_nan_is_above_infinity(gpu)
    test_thresholds.test_no_queries(gpu)
    test_thresholds.test_shards_of_a_group_report_positions_in_the_whole_group(gpu)


@pytest.mark.parametrize("name", methods.staged_methods())
def test_every_method(gpu: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(17, 15, generator=generator).bfloat16()
    most = methods.METHODS[name].n_models[1]
    n_models = 3 if most is None else min(3, most)
    models = [(base + 0.1 * torch.randn(17, 15, generator=generator)).bfloat16() for _ in range(n_models)]
    scores = None
    if methods.METHODS[name].needs_scores:
        scores = [torch.randn(17, 15, generator=generator).square() for _ in models]
    own: dict[str, Any] = {"scores": scores}
    if methods.METHODS[name].needs_instruct:
        own = {"instruct": models.pop(), "outside": "ranked"}
    found = merge(base, models, name, **own)
    monkeypatch.setenv("TVFAST_BACKEND", "reference")
    assert_same_bits([found], [merge(base, models, name, **own)], name)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sta", {"scope": "model", "normalization": "minmax", "cross": "winner"}),
        (
            "sta",
            {"normalization": "l1", "cross": "exclude_others", "tie": "index", "density": [0.3, 0.1, 0.5]},
        ),
        ("sta", {"threshold": 0.4, "normalization": "rank"}),
        ("sta_forget", {"source": "model", "scale": 0.5}),
        ("fisher", {"dialect": "mergelm"}),
    ],
    ids=str,
)
def test_methods_on_scores(
    gpu: Backend, method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"a": (9, 20), "b": (7,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    n_models = 1 if method == "sta_forget" else 3
    models = [
        {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for _ in range(n_models)
    ]
    scores = [
        {name: torch.randn(t.shape, generator=generator).square() for name, t in base.items()} for _ in models
    ]
    found = merge(base, models, method, scores=scores, **parameters)
    monkeypatch.setenv("TVFAST_BACKEND", "reference")
    expected = merge(base, models, method, scores=scores, **parameters)
    assert_same_bits(list(found.values()), list(expected.values()), method)


def test_wants_have_the_bits_of_the_kernels(gpu: Backend) -> None:
    from tvfast.kernels import measure

    for want in Wants:
        assert getattr(measure, str(want.name)).value == want.value
