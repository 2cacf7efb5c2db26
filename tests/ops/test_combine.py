"""`combine` of every backend: bit for bit the reference, and the float64 oracle where inputs are exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import bounds
from tests.conftest import load
from tests.strategies import (
    BY_RANK,
    DTYPES,
    Case,
    Part,
    assert_same_bits,
    bit_values,
    bits,
    cases,
    combined,
    grid_values,
    near_cases,
    normal_values,
    programs,
    scoring_cases,
    undivided_programs,
    unpack_plane,
)
from tvfast.ops import reference
from tvfast.ops._reference_stages import Tile
from tvfast.ops.raw import Backend, Wants
from tvfast.program import (
    ALWAYS,
    Ballot,
    Divisor,
    Gain,
    Keep,
    Members,
    ModelScalars,
    Program,
    Reduce,
    TensorScalars,
    Tie,
    Vote,
    WorkTable,
    ZeroSign,
)

REFERENCE = reference.backend()
ORACLE = reference.backend(torch.float64)
_WITH_TIES = (Keep.BAND, Keep.SCORE, Keep.VARIANCE)
_STAGES = (Keep, Tie, Gain, Vote, Ballot, ZeroSign, Members, Reduce, Divisor)


def every_program() -> Iterator[Program]:
    names = ("keep", "tie", "gain", "vote", "ballot", "zero_sign", "members", "reduce", "divisor")
    for choice in itertools.product(*_STAGES):
        yield Program(**dict(zip(names, choice, strict=True)))


def canonical(program: Program) -> Program:
    """The program with the stages that it does not read at their defaults."""
    if program.keep not in _WITH_TIES:
        program = replace(program, tie=Tie.GE)
    if program.vote is Vote.NONE:
        program = replace(program, ballot=Ballot.RAW, zero_sign=ZeroSign.PLUS)
    return program


def product_case() -> Case:
    """257 and 64 elements, K = 3: grid values with ties next to arbitrary bits, all dtypes, rows, offsets."""
    rng = np.random.default_rng(5)
    found = []
    for n, order in ((257, (0, 1, 2, 0)), (64, (1, 1, 1, 1))):
        tensors = [grid_values(rng, n, DTYPES[which], 3) for which in order]
        for tensor in tensors:
            tensor[-40:] = bit_values(rng, 40, tensor.dtype)
        scores = [grid_values(rng, n, torch.float32, 3) for _ in range(3)]
        masks = [rng.random(n) < 0.5 for _ in range(3)]
        found.append(Part(tensors[1:], tensors[0], torch.float32, 1, scores, masks, row=50, offset=2**33 + 1))
    found[1].base, found[1].out_dtype, found[1].row, found[1].offset = None, torch.bfloat16, 0, 3
    of_all = ModelScalars(
        gain=1.25,
        hi_cut=2**30,
        limit=2**31,
        limit_step=2**25,
        prob=0.5,
        prob_step=1e-3,
        rank_lo=10,
        rank_hi=45,
    )
    variance = 2 / 9 / 64**2  # of 0, 0 and 1 / 64
    models = [
        replace(of_all, weight=0.5, lo=1 / 64, hi=2 / 64, lo_cut=2**31, key=11),
        replace(of_all, weight=-0.3, lo=variance, hi=3 / 64, lo_cut=2**33 + 90, key=2**40 + 3),
        replace(of_all, weight=1.1, lo=0.0, hi=variance, lo_cut=5, key=7),
    ]
    own = TensorScalars(models=models, scale=0.7, majority=-1.0, divisor_floor=0.25, divisor_fill=3.0)
    return Case(Program(), found, [own, own])


@pytest.mark.parametrize("keep", Keep)
def test_every_combination_of_stages(natives: dict[str, Backend], keep: Keep) -> None:
    case = product_case()
    outs = [torch.empty(part.n, dtype=part.out_dtype) for part in case.parts]
    table = case.table(outs)
    known: dict[Program, list[Tensor]] = {}
    n_programs = 0
    for program in every_program():
        if program.keep is keep:
            read = canonical(program)
            if read not in known:
                known[read] = combined(REFERENCE, replace(case, program=read))
            for name, native in natives.items():
                for out in outs:
                    out.fill_(float("nan"))
                native.combine(table, program, case.scalars)
                assert_same_bits(outs, known[read], (name, program))
            n_programs += 1
    assert n_programs == math.prod(len(stage) for stage in _STAGES) // len(Keep)


@settings(max_examples=100)
@given(case=cases())
def test_random_tables_equal_the_reference(natives: dict[str, Backend], case: Case) -> None:
    expected = combined(REFERENCE, case)
    for name, native in natives.items():
        assert_same_bits(combined(native, case), expected, (name, case.program))


@settings(max_examples=40)
@given(case=scoring_cases())
def test_stages_on_scores_equal_the_reference(natives: dict[str, Backend], case: Case) -> None:
    wants = Wants.COUNTS | Wants.VOTES
    expected = combined(REFERENCE, case)
    measured = REFERENCE.measure(case.table(), case.program, case.scalars, wants)
    for name, native in natives.items():
        assert_same_bits(combined(native, case), expected, (name, case.program))
        assert native.measure(case.table(), case.program, case.scalars, wants) == measured, name


@settings(max_examples=40)
@given(case=near_cases)
def test_weights_by_nearness_equal_the_reference(natives: dict[str, Backend], case: Case) -> None:
    expected = combined(REFERENCE, case)
    for name, native in natives.items():
        assert_same_bits(combined(native, case), expected, (name, case.program))


@settings(max_examples=60)
@given(case=cases(kinds=("grid",), choose=undivided_programs, exact=True))
def test_undivided_results_on_grid_inputs_equal_the_oracle(backends: dict[str, Backend], case: Case) -> None:
    expected = combined(ORACLE, case)
    for name, backend in backends.items():
        assert_same_bits(combined(backend, case), expected, (name, case.program))


@settings(max_examples=50)
@given(case=cases(kinds=("grid",), exact=True, widest=300))
def test_decisions_on_grid_inputs_equal_the_oracle(backends: dict[str, Backend], case: Case) -> None:
    def decisions(backend: Backend) -> object:
        measured = backend.measure(case.table(), case.program, case.scalars, Wants.COUNTS | Wants.VOTES)
        table = case.table()
        if case.program.keep is Keep.MASK:
            return measured
        backend.row_masks(table, case.program, case.scalars)
        return measured, [mask.owner.tolist() for entry in table.entries for mask in entry.masks]

    expected = decisions(ORACLE)
    for name, backend in backends.items():
        assert decisions(backend) == expected, name


@settings(max_examples=40)
@given(case=cases())
def test_masks_keep_what_their_stage_keeps(backends: dict[str, Backend], case: Case) -> None:
    if case.program.keep is Keep.MASK:
        case = replace(case, program=replace(case.program, keep=Keep.BAND))
    # Without ranks in the second step there is no rank for a probability to depend on.
    case = replace(case, program=replace(case.program, gain=Gain.MODEL))
    for name, backend in backends.items():
        table = case.table()
        backend.row_masks(table, case.program, case.scalars)
        masked = [
            replace(part, masks=[unpack_plane(mask.owner, part.n) for mask in entry.masks])
            for part, entry in zip(case.parts, table.entries, strict=True)
        ]
        second = replace(case, program=replace(case.program, keep=Keep.MASK), parts=masked)
        assert_same_bits(combined(backend, second), combined(backend, case), (name, case.program))


def bounded_case(program: Program, n_models: int, seed: int) -> Case:
    """Continuous values: a base with fine-tuning noise, positive weights, a band inside the noise."""
    rng = np.random.default_rng(seed)
    dtype, out_dtype = DTYPES[seed % 3], DTYPES[seed // 3 % 3]
    n = 2001
    base = normal_values(rng, n, dtype, 0.02)
    models = [(base.float() + normal_values(rng, n, torch.float32, 2e-3)).to(dtype) for _ in range(n_models)]
    scores = [normal_values(rng, n, torch.float32, 2e-3) for _ in models]
    masks = [rng.random(n) < 0.5 for _ in models]
    variance = program.keep is Keep.VARIANCE
    own = [
        ModelScalars(
            weight=float(rng.uniform(0.1, 1.5)),
            gain=float(rng.uniform(0.5, 2.0)),
            lo=1.1e-6 if variance else 1.1e-3,
            hi=8.3e-6 if variance else 3.3e-3,
            limit=ALWAYS // 2,
            limit_step=2**63 // n,
            prob=0.5,
            prob_step=0.5 / n,
            rank_lo=400,
            rank_hi=1700,
            key=int(rng.integers(0, 2**63)),
        )
        for _ in models
    ]
    part = Part(models, base, out_dtype, 0, scores, masks)
    return Case(program, [part], [TensorScalars(models=own, scale=0.9)])


def test_continuous_values_stay_within_the_bound(backends: dict[str, Backend]) -> None:
    n_left_out, n_all = 0, 0

    @settings(max_examples=120)
    @given(programs, st.integers(1, 9) | st.just(17), st.integers(0, 2**32 - 1))
    def check(program: Program, n_models: int, seed: int) -> None:
        nonlocal n_left_out, n_all
        case = bounded_case(program, n_models, seed)
        part, own = case.parts[0], case.scalars[0]
        truth = combined(ORACLE, case, torch.float64)[0]
        tile = Tile(
            start=0,
            index=part.offset,
            base=None if part.base is None else part.base.double(),
            models=[model.double() for model in part.models],
            scores=[score.double() for score in part.scores],
            score_maps=part.score_maps,
            masks=[mask.owner for mask in case.table().entries[0].masks],
            row=part.row,
            task_vectors=part.task_vectors,
        )
        decided = ~bounds.undecided(tile, program, own)
        bound = bounds.combine_error(tile, program, own, part.out_dtype)
        for name, backend in backends.items():
            excess = ((combined(backend, case)[0].double() - truth).abs() - bound)[decided]
            assert not bool((excess > 0).any()), f"{name}, {program}: exceeded by {float(excess.max())}"
        n_left_out += int((~decided).sum())
        n_all += part.n

    check()
    share = n_left_out / n_all
    assert share < bounds.MOST_UNDECIDED, f"{share:.2%} of the elements were left out as undecided"


@settings(max_examples=40)
@given(case=cases(most_parts=4))
def test_threads_and_tiles_do_not_change_bytes(natives: dict[str, Backend], case: Case) -> None:
    for name, native in natives.items():
        expected = combined(native, case, n_threads=1)
        for n_threads in (2, 3):
            found = combined(native, case, n_threads=n_threads)
            assert_same_bits(found, expected, (name, case.program))
        for tile, n_threads in ((64, 1), (192, 2), (1024, 3)):
            found = combined(load(name, tile=tile), case, n_threads=n_threads)
            assert_same_bits(found, expected, (name, case.program))


@settings(max_examples=60)
@given(case=cases(most_parts=1), places=st.lists(st.integers(0, 1000), max_size=4))
def test_shards_have_the_bytes_of_the_whole(
    backends: dict[str, Backend], case: Case, places: list[int]
) -> None:
    part = case.parts[0]
    if case.program.keep in BY_RANK:
        part.row = part.row or 7
        places = [place - place % part.row for place in places]
    cuts = sorted({0, part.n, *(place for place in places if place < part.n)})
    shards = [part.shard(start, stop) for start, stop in itertools.pairwise(cuts)] or [part]
    split = Case(case.program, shards, case.scalars * len(shards))
    for name, backend in backends.items():
        whole = combined(backend, case)[0]
        assert_same_bits([torch.cat(combined(backend, split))], [whole], (name, case.program))


@settings(max_examples=60)
@given(case=cases(most_parts=2), where=st.integers(0, 17))
def test_in_place_has_the_bytes_of_out_of_place(backends: dict[str, Backend], case: Case, where: int) -> None:
    def target(part: Part) -> Tensor:
        places = [*part.models] if part.base is None else [part.base, *part.models]
        return places[where % len(places)]

    for part in case.parts:
        part.out_dtype = target(part).dtype
    outs = [target(part) for part in case.parts]
    inputs = [out.clone() for out in outs]
    for name, backend in backends.items():
        expected = combined(backend, case)
        backend.combine(case.table(outs), case.program, case.scalars)
        assert_same_bits(outs, expected, (name, case.program))
        for out, own in zip(outs, inputs, strict=True):
            out.copy_(own)


@pytest.mark.parametrize("n_models", [1, 2, 5])
@pytest.mark.parametrize("keep", Keep)
def test_tables_with_empty_and_single_element_tensors(backend: Backend, keep: Keep, n_models: int) -> None:
    parts = []
    for i, n in enumerate([0, 1, 0, 1, 3]):
        tensors = [torch.full((n,), 1.0 + i + k) for k in range(2 * n_models)]
        parts.append(
            Part(
                tensors[:n_models], None, scores=tensors[n_models:], masks=[np.ones(n, dtype=bool)] * n_models
            )
        )
    scalars = [TensorScalars(models=[ModelScalars(weight=1 / n_models) for _ in range(n_models)])] * 5
    outs = combined(backend, Case(Program(keep=keep), parts, scalars))
    mean = (n_models - 1) / 2
    for i, (part, out) in enumerate(zip(parts, outs, strict=True)):
        torch.testing.assert_close(out, torch.full((part.n,), 1.0 + i + mean))


@pytest.mark.parametrize("tie", Tie)
def test_some_of_the_infinities_survive(backend: Backend, tie: Tie) -> None:
    """A lower end of infinity, where ties alone decide: no number is above it."""
    models = [torch.full((300,), math.inf, dtype=torch.bfloat16) for _ in range(3)]
    base = torch.ones(300, dtype=torch.bfloat16)
    for cut in (0, 2**31 if tie is Tie.HASH else 100):
        own = [ModelScalars(lo=math.inf, lo_cut=cut, key=k) for k in range(3)]
        program = Program(
            keep=Keep.BAND, tie=tie, vote=Vote.MASS, members=Members.STRICT, divisor=Divisor.COUNT
        )
        case = Case(program, [Part(models, base, torch.bfloat16)], [TensorScalars(models=own)])
        assert_same_bits(combined(backend, case), combined(REFERENCE, case), program)


def test_a_table_without_tensors(backend: Backend) -> None:
    table = WorkTable([], 2)
    backend.combine(table, Program(), [])
    assert backend.measure(table, Program(), [], Wants.L1) == []


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fused_sums_round_once(backend: Backend, sign: float) -> None:
    # (1 + i/2^12) (1 + j/2^12) with i j odd is half way between two float32; 2^-60 more or less decides.
    tiny = sign * 2.0**-60
    i = torch.arange(1, 400, 2, dtype=torch.float64)
    for j in (1, 3, 77):
        other = 1 + j * 2.0**-12
        exact = (1 + i * 2.0**-12) * other
        expected = torch.floor(exact * 2.0**23) * 2.0**-23 + (2.0**-23 if sign > 0 else 0.0)
        part = Part([torch.full((i.numel(),), tiny), (1 + i * 2.0**-12).float()])
        own = TensorScalars(models=[ModelScalars(), ModelScalars(weight=other)])
        found = combined(backend, Case(Program(reduce=Reduce.FUSED_SUM), [part], [own]))
        assert_same_bits(found, [expected.float()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_output_as_the_quiet_nan(backend: Backend, dtype: torch.dtype) -> None:
    base, model = torch.zeros(6), torch.zeros(6)
    base[1] = model[2] = float("nan")
    model[3] = float("inf")
    patterns = torch.tensor([-(2**22) + 5, 0x7F800001], dtype=torch.int32)  # a negative and a signalling NaN
    model[4:] = patterns.view(torch.float32)
    own = TensorScalars(models=[ModelScalars(lo=1.0, limit=0, rank_hi=0)])
    quiet = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    for keep in (Keep.BAND, Keep.RANDOM, Keep.BAND_BY_RANK, Keep.MASK):
        for members in Members:
            program = Program(keep=keep, vote=Vote.MASS, members=members, divisor=Divisor.COUNT)
            part = Part([model], base, dtype, masks=[np.zeros(6, dtype=bool)])
            found = bits(combined(backend, Case(program, [part], [own]))[0])[[1, 2, 4, 5]]
            assert found.tolist() == [quiet] * 4
