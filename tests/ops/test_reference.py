"""The reference at float32 against a restatement of docs/numerics.md, element by element in numpy scalars."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    near_programs,
    normal_values,
    scored,
    scoring_programs,
    table_of,
    unpack_plane,
)
from tvfast.errors import ArgumentError
from tvfast.ops import _reference_stages, reference
from tvfast.ops.raw import Wants
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
    TensorScalars,
    Tie,
    View,
    Vote,
    Weighting,
    ZeroSign,
)

F = np.float32
MASK32 = 0xFFFFFFFF
ORACLE = reference.backend(torch.float64)
REFERENCE = reference.backend()


def pattern(x: np.float32) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0]) if not np.isnan(x) else 0x7FC00000


def magnitude(x: np.float32) -> int:
    return pattern(x) & 0x7FFFFFFF


def philox(key: int, g: int) -> int:
    block = g >> 2
    c = [block & MASK32, block >> 32, 0, 0]
    k = [key & MASK32, key >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & MASK32, (p >> 32) ^ c[3] ^ k[1], p & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c[g & 3]


def tie_hash(key: int, g: int) -> int:
    folded_key = (key & MASK32) ^ ((key >> 32) * 0x85EBCA6B & MASK32)
    x = ((g & MASK32) + (g >> 32) * 0x9E3779B9) * 0x7FEB352D & MASK32
    x = (x ^ x >> 15) * 0x846CA68B & MASK32
    return (x ^ x >> 16) * (folded_key | 1) & MASK32


def sign(x: Any) -> int:
    return 1 if x > 0 else -1 if x < 0 else 0


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """Widens by bits, not by torch."""
    raw = bits(tensor).numpy()
    if tensor.dtype == torch.float32:
        return raw.view(np.float32)
    if tensor.dtype == torch.float16:
        return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.float32, dtype: torch.dtype) -> int:
    """The bit pattern of x rounded to nearest even."""
    if dtype == torch.float32:
        return pattern(x)
    if dtype == torch.float16:
        return 0x7E00 if np.isnan(x) else int(np.float16(x).view(np.uint16))
    if np.isnan(x):
        return 0x7FC0
    word = pattern(x)
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16


def fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c by rational arithmetic, rounded once."""
    plain = np.float64(a) * np.float64(b) + np.float64(c)
    if not all(np.isfinite([a, b, c])):
        return F(plain)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return F(plain)  # exact in float64 too, with the sign that IEEE gives a zero
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    nearest = float(round(exact / unit) * unit)
    return F(math.copysign(nearest, exact))


class Restated:
    """One entry, element by element."""

    def __init__(self, part: Part, program: Program, scalars: TensorScalars) -> None:
        self.part, self.program, self.scalars = part, program, scalars
        self.models = [numbers(model) for model in part.models]
        self.base = None if part.base is None else numbers(part.base)
        self.scores = [numbers(score) for score in part.scores]
        self.taus = [
            m
            if self.base is None or part.task_vectors
            else [x - b for x, b in zip(m, self.base, strict=True)]
            for m in self.models
        ]
        self.ranks = [self._ranks(tau) for tau in self.taus]

    def _ranks(self, tau: Sequence[np.float32]) -> list[int]:
        if self.program.keep not in BY_RANK:
            return [0] * len(tau)
        row = self.part.row or max(1, len(tau))
        result = [0] * len(tau)
        for start in range(0, len(tau), row):
            members = range(start, min(start + row, len(tau)))
            for rank, i in enumerate(sorted(members, key=lambda i: (magnitude(tau[i]), i))):
                result[i] = rank
        return result

    def variance(self, i: int) -> np.float32:
        total, squares, n = np.float64(0), np.float64(0), np.float64(len(self.taus))
        for tau in self.taus:
            total += np.float64(tau[i])
        for tau in self.taus:
            squares += (np.float64(tau[i]) - total / n) * (np.float64(tau[i]) - total / n)
        return F(squares / n)

    def score(self, k: int, i: int) -> np.float32:
        raw = self.scores[k][i]
        if not self.part.score_maps:
            return abs(raw)
        own = self.part.score_maps[k]
        mapped = raw * F(own.scale) + F(own.shift)
        return abs(max(mapped, F(own.floor)))

    def ruled_out(self, k: int, i: int) -> bool:
        """Whether another model's score takes the entry's place."""
        others = [j for j in range(len(self.taus)) if j != k]
        if self.program.cross is Cross.WINNER:
            return any(self.score(j, i) >= self.score(k, i) for j in others)
        if self.program.cross is Cross.EXCLUDE_OTHERS:
            return any(self.in_band(j, i, self.score(j, i)) for j in others)
        return False

    def weight(self, k: int, i: int) -> np.float32:
        weight = F(self.scalars.models[k].weight)
        match self.program.weighting:
            case Weighting.MODEL:
                return weight
            case Weighting.SCORE:
                return weight * self.score(k, i)
            case Weighting.ALONE:
                present = sum(bool(self.rescaled(j, i) != 0) for j in range(len(self.taus)))
                return weight if present == 1 else F(1)
            case Weighting.NEARNESS:
                apart = abs(self.rescaled(0, i) - self.rescaled(1, i))
                floor = F(self.scalars.divisor_floor)
                share = F(1) / (max(apart, floor)) * F(self.scalars.models[1].weight)
                share = F(0) if share < 0 else F(1) if share > 1 else share
                return share if k else F(1) - share

    def kept(self, k: int, i: int) -> bool:
        own, g, tau = self.scalars.models[k], self.part.offset + i, self.taus[k][i]
        if np.isnan(tau):
            return True
        match self.program.keep:
            case Keep.ALL:
                return True
            case Keep.RANDOM:
                return philox(own.key, g) < own.limit
            case Keep.RANDOM_BY_RANK:
                rise = self.ranks[k][i] * own.limit_step % 2**64 >> 32
                return philox(own.key, g) < own.limit + rise
            case Keep.BAND_BY_RANK:
                return own.rank_lo <= self.ranks[k][i] < own.rank_hi
            case Keep.MASK:
                return bool(self.part.masks[k][i])
            case Keep.BAND:
                a = abs(tau)
            case Keep.SCORE:
                a = F(-1) if self.ruled_out(k, i) else self.score(k, i)
            case Keep.VARIANCE:
                a = self.variance(i)
        return self.in_band(k, i, a)

    def in_band(self, k: int, i: int, a: np.float32) -> bool:
        own, g = self.scalars.models[k], self.part.offset + i
        if a < F(own.lo) or a > F(own.hi):
            return False
        if self.program.tie is Tie.GE:
            return True
        rank = g if self.program.tie is Tie.INDEX else tie_hash(own.key, g)
        return not (a == F(own.lo) and rank >= own.lo_cut) and not (a == F(own.hi) and rank < own.hi_cut)

    def rescaled(self, k: int, i: int) -> np.float32:
        own = self.scalars.models[k]
        entry = self.taus[k][i] if self.kept(k, i) else F(0)
        if self.program.gain is Gain.MODEL:
            return entry * F(own.gain)
        return entry / (F(own.prob) + F(self.ranks[k][i]) * F(own.prob_step))

    def voted(self, ballots: Sequence[np.float32]) -> int:
        if self.program.vote is Vote.COUNT:
            return sign(sum(sign(x) for x in ballots))
        mass = F(0)
        for x in ballots:
            mass = mass + x
        return sign(mass)

    def ballots(self, i: int) -> tuple[list[np.float32], list[np.float32]]:
        t = [self.rescaled(k, i) for k in range(len(self.taus))]
        v = [x * self.weight(k, i) for k, x in enumerate(t)]
        return (t if self.program.ballot is Ballot.RAW else v), v

    def belongs(self, x: np.float32, v: np.float32, elected: int) -> bool:
        strict = self.program.members is Members.STRICT
        if self.program.vote is Vote.NONE:
            return bool(v != 0) if strict else True
        if np.isnan(x):
            return True
        return sign(x) == elected and not (strict and x == 0)

    def element(self, i: int) -> np.float32:
        program, own = self.program, self.scalars
        ballots, v = self.ballots(i)
        zero = {ZeroSign.PLUS: 1, ZeroSign.MINUS: -1, ZeroSign.NONE: 0, ZeroSign.MAJORITY: int(own.majority)}
        elected = self.voted(ballots) or zero[program.zero_sign]
        belong = [self.belongs(x, y, elected) for x, y in zip(ballots, v, strict=True)]
        if program.reduce is Reduce.FUSED_SUM:
            result = F(-0.0)
            for k, member in enumerate(belong):
                result = fused(self.rescaled(k, i) if member else F(0), self.weight(k, i), result)
        elif program.reduce is Reduce.SUM:
            result = F(-0.0)
            for member, y in zip(belong, v, strict=True):
                result = result + (y if member else F(0))
        else:
            candidates = [(magnitude(y), k) for k, y in enumerate(v) if belong[k]]
            result = v[max(candidates)[1]] if candidates else F(0)
        if program.divisor is not Divisor.NONE:
            divisor = F(sum(belong))
            if program.divisor is Divisor.WEIGHT:
                divisor = F(0)
                for k, member in enumerate(belong):
                    divisor = divisor + (self.weight(k, i) if member else F(0))
            result = result / (F(own.divisor_fill) if abs(divisor) < F(own.divisor_floor) else divisor)
        result = result * F(own.scale)
        return result if self.base is None else self.base[i] + result

    def output(self) -> torch.Tensor:
        words = [rounded(self.element(i), self.part.out_dtype) for i in range(self.part.n)]
        unsigned, signed = (
            (np.uint32, np.int32) if self.part.out_dtype == torch.float32 else (np.uint16, np.int16)
        )
        return torch.from_numpy(np.array(words, dtype=unsigned).view(signed)).view(self.part.out_dtype)


def exact_sum(addends: Sequence[float]) -> float:
    """The binned sum by rational arithmetic."""
    finite = [Fraction(x) for x in addends if math.isfinite(x)]
    if len(finite) < len(addends):
        return float(np.sum([x for x in addends if not math.isfinite(x)]))
    largest = max((abs(x) for x in finite), default=Fraction(0))
    if largest == 0:
        return 0.0
    unit = Fraction(2) ** (40 * (math.frexp(float(largest))[1] // 40 - 1))
    return float(sum(round(x / unit) for x in finite) * unit)  # round() of a Fraction goes half to even


@settings(max_examples=250)
@given(cases(widest=70, most_parts=2))
def test_combine_is_the_restated_page(case: Case) -> None:
    with np.errstate(all="ignore"):
        expected = [
            Restated(part, case.program, own).output()
            for part, own in zip(case.parts, case.scalars, strict=True)
        ]
    assert_same_bits(combined(REFERENCE, case), expected, case.program)


@settings(max_examples=60)
@given(cases(widest=70, most_parts=1, choose=scoring_programs).flatmap(scored))
def test_stages_on_scores_are_the_restated_page(case: Case) -> None:
    with np.errstate(all="ignore"):
        expected = Restated(case.parts[0], case.program, case.scalars[0]).output()
    assert_same_bits(combined(REFERENCE, case), [expected], case.program)


@settings(max_examples=40)
@given(cases(widest=70, most_parts=1, choose=near_programs, counts=st.just(2)))
def test_weights_by_nearness_are_the_restated_page(case: Case) -> None:
    with np.errstate(all="ignore"):
        expected = Restated(case.parts[0], case.program, case.scalars[0]).output()
    assert_same_bits(combined(REFERENCE, case), [expected], case.program)


@settings(max_examples=80)
@given(cases(widest=40, most_parts=1))
def test_measure_is_the_restated_page(case: Case) -> None:
    wants = Wants.L1_BEFORE | Wants.L1 | Wants.GRAM | Wants.COUNTS | Wants.VOTES | Wants.ALONE
    (found,) = REFERENCE.measure(case.table(), case.program, case.scalars, wants)
    part = case.parts[0]
    models = range(len(part.models))
    with np.errstate(all="ignore"):
        restated = Restated(part, case.program, case.scalars[0])
        kept = [[restated.kept(k, i) for i in range(part.n)] for k in models]
        t = [[restated.taus[k][i] if kept[k][i] else F(0) for i in range(part.n)] for k in models]
        l1_before = [exact_sum([float(abs(x)) for x in restated.taus[k]]) for k in models]
        l1 = [exact_sum([float(abs(x)) for x in t[k]]) for k in models]
        gram = [
            [
                exact_sum([float(np.float64(x) * np.float64(y)) for x, y in zip(t[j], t[k], strict=True)])
                for k in models
            ]
            for j in models
        ]
        voted = [restated.voted(restated.ballots(i)[0]) for i in range(part.n)]
    assert found.n_kept == [sum(flags) for flags in kept]
    assert found.n_nonzero == [sum(bool(x != 0) for x in row) for row in t]
    alone = [sum(bool(x != 0) for x in column) == 1 for column in zip(*t, strict=True)]
    assert found.n_alone == [sum(bool(x != 0) and a for x, a in zip(row, alone, strict=True)) for row in t]
    assert found.n_nonfinite == [int(np.sum(~np.isfinite(m))) for m in restated.models]
    assert found.n_base_nonfinite == (
        0 if restated.base is None else int(np.sum(~np.isfinite(restated.base)))
    )
    assert found.elected == (0 if case.program.vote is Vote.NONE else sum(voted))
    assert found.n_conflict == sum(
        any(x > 0 for x in at) and any(x < 0 for x in at) for at in zip(*t, strict=True)
    )
    for ours, theirs in zip([found.l1_before, found.l1, *found.gram], [l1_before, l1, *gram], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=60)
@given(cases(widest=150, most_parts=2))
def test_row_masks_are_the_restated_keep(case: Case) -> None:
    if case.program.keep is Keep.MASK:
        case = replace(case, program=replace(case.program, keep=Keep.BAND))
    table = case.table()
    REFERENCE.row_masks(table, case.program, case.scalars)
    for part, own, entry in zip(case.parts, case.scalars, table.entries, strict=True):
        with np.errstate(all="ignore"):
            restated = Restated(part, case.program, own)
            for k, mask in enumerate(entry.masks):
                expected = [restated.kept(k, i) for i in range(part.n)]
                assert unpack_plane(mask.owner, part.n).tolist() == expected
                assert not unpack_plane(mask.owner, 64 * mask.owner.numel())[part.n :].any()


@pytest.mark.parametrize("tile", [1, 7, 64])
@settings(max_examples=20)
@given(case=cases(widest=70, most_parts=1))
def test_tiles_do_not_change_results(tile: int, case: Case) -> None:
    wants = Wants.L1_BEFORE | Wants.GRAM | Wants.COUNTS | Wants.VOTES
    whole = combined(REFERENCE, case), REFERENCE.measure(case.table(), case.program, case.scalars, wants)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_TILE", tile)
        assert_same_bits(combined(REFERENCE, case), whole[0])
        assert str(REFERENCE.measure(case.table(), case.program, case.scalars, wants)) == str(whole[1])


@given(st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 2**32 - 1))
def test_float64_is_rounded_once(dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = bit_values(rng, 200, dtype)
    up = (bits(low) + 1).view(dtype)
    ends = torch.isfinite(low) & torch.isfinite(up)
    middle = (low.double() / 2 + up.double() / 2)[ends]
    even = torch.where(bits(low)[ends] & 1 == 0, low[ends], up[ends])
    nudge = middle.abs() * 2.0**-45  # far below what float32 resolves
    for x, expected in [
        (middle, even),
        (middle - nudge, torch.minimum(low, up)[ends]),
        (middle + nudge, torch.maximum(low, up)[ends]),
    ]:
        out = torch.empty(x.numel(), dtype=dtype)
        _reference_stages.write(out, x)
        moved = (bits(out) != bits(expected)) & (out.double() != expected.double())
        assert not bool(moved.any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_tensors_pass_through_the_oracle(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    base, model = (
        normal_values(rng, 99, dtype).double(),
        normal_values(rng, 99, dtype).double() * (1 + 2**-40),
    )
    case = Case(Program(), [Part([model], base)], [TensorScalars(models=[ModelScalars()])])
    assert torch.equal(combined(ORACLE, case, torch.float64)[0], base + (model - base))


def test_why_not_names_the_view() -> None:
    table = table_of([Part([torch.zeros(4)], torch.zeros(4))], [torch.zeros(4)])
    assert REFERENCE.why_not(table) is None
    entry = table.entries[0]
    for view, reason in [
        (View(entry.models[0].address, 4, entry.models[0].dtype), "base has no torch tensor as owner"),
        (replace(entry.models[0], owner=torch.zeros(8)[::2]), "base is not contiguous"),
        (replace(entry.models[0], owner=torch.zeros(5)), "base has 5 elements, expected 4"),
    ]:
        entry.base = view
        assert f"tensor 'tensor 0': {reason}" in str(REFERENCE.why_not(table))


def test_impossible_questions_are_argument_errors() -> None:
    table = table_of([Part([torch.ones(4)])])
    scalars = [TensorScalars(models=[ModelScalars()])]
    with pytest.raises(ArgumentError, match=r"k must be in \[1, 4\]; found 5"):
        REFERENCE.thresholds(table, Keep.BAND, [RankQuery(0, 0, 5)])
    with pytest.raises(ArgumentError, match=r"4 entries equal 1\.0; expected more than r = 4"):
        REFERENCE.nth_equal(table, Keep.BAND, [(0, 0, 1.0, 4)])
    with pytest.raises(ArgumentError, match="keep must be BAND, SCORE or VARIANCE to rank; found RANDOM"):
        REFERENCE.thresholds(table, Keep.RANDOM, [RankQuery(0, 0, 1)])
    with pytest.raises(ArgumentError, match="'tensor 0': combine needs an output"):
        REFERENCE.combine(table, Program(), scalars)
    with pytest.raises(ArgumentError, match=r"torch\.float32 or torch\.float64; found torch\.float16"):
        reference.backend(torch.float16)
