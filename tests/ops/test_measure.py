"""`measure` of every backend: the reference's numbers exactly, in any order, near the true sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import bounds
from tests.conftest import load
from tests.strategies import (
    DTYPES,
    Case,
    Part,
    bit_values,
    cases,
    grid_values,
    model_counts,
    normal_values,
    programs,
)
from tvfast.ops import reference
from tvfast.ops.raw import Backend, MaskingBackend, Wants
from tvfast.program import Keep, ModelScalars, Moments, Program, TensorScalars, Vote, WorkTable

REFERENCE = reference.backend()
EVERYTHING = Wants.L1_BEFORE | Wants.L1 | Wants.GRAM | Wants.COUNTS | Wants.VOTES | Wants.DOTS | Wants.ALONE
_FILLED_BY = {
    Wants.L1_BEFORE: ("l1_before",),
    Wants.L1: ("l1",),
    Wants.GRAM: ("gram",),
    Wants.COUNTS: ("n_kept", "n_nonzero", "n_nonfinite", "n_base_nonfinite"),
    Wants.VOTES: ("elected", "n_conflict"),
    Wants.DOTS: ("dots",),
    Wants.ALONE: ("n_alone",),
}


def asked(moments: Moments, wants: Wants) -> dict[str, str]:
    """The fields that `wants` names, as text: NaN equals NaN and -0 differs from 0."""
    names = [name for want, filled in _FILLED_BY.items() if wants & want for name in filled]
    seen = {name: repr(getattr(moments, name)) for name in names}
    if wants & Wants.SQUARES:
        seen["squares"] = repr([moments.gram[k][k] for k in range(len(moments.gram))])
    return seen


def sums_case(models: Sequence[torch.Tensor]) -> Case:
    """Keep everything: the sums are those of the models themselves."""
    scalars = TensorScalars(models=[ModelScalars() for _ in models])
    return Case(Program(vote=Vote.MASS), [Part(list(models))], [scalars])


def test_every_field_of_moments_has_a_want() -> None:
    named = {name for filled in _FILLED_BY.values() for name in filled}
    assert named == {one.name for one in fields(Moments)}


@settings(max_examples=80)
@given(case=cases(), wants=st.one_of(st.just(EVERYTHING), st.integers(0, 255).map(Wants)))
def test_every_number_equals_the_reference(natives: dict[str, Backend], case: Case, wants: Wants) -> None:
    expected = REFERENCE.measure(case.table(), case.program, case.scalars, wants)
    for name, native in natives.items():
        found = native.measure(case.table(), case.program, case.scalars, wants)
        assert [asked(one, wants) for one in found] == [asked(one, wants) for one in expected], name


@settings(max_examples=30)
@given(case=cases(choose=programs.filter(lambda program: program.keep is not Keep.MASK)))
def test_masks_and_numbers_of_one_pass_are_those_of_two(natives: dict[str, Backend], case: Case) -> None:
    def planes(table: WorkTable) -> list[list[int]]:
        return [mask.owner.tolist() for entry in table.entries for mask in entry.masks]

    two = case.table()
    REFERENCE.row_masks(two, case.program, case.scalars)
    for name, native in natives.items():
        assert isinstance(native, MaskingBackend)
        one = case.table()
        found = native.measured_masks(one, case.program, case.scalars, EVERYTHING)
        expected = native.measure(case.table(), case.program, case.scalars, EVERYTHING)
        assert [asked(moments, EVERYTHING) for moments in found] == [
            asked(moments, EVERYTHING) for moments in expected
        ], name
        assert planes(one) == planes(two), name


@settings(max_examples=25)
@given(case=cases(most_parts=4))
def test_threads_and_tiles_do_not_change_numbers(natives: dict[str, Backend], case: Case) -> None:
    def measured(backend: Backend, n_threads: int) -> list[dict[str, str]]:
        found = backend.measure(case.table(), case.program, case.scalars, EVERYTHING, n_threads=n_threads)
        return [asked(one, EVERYTHING) for one in found]

    for name, native in natives.items():
        expected = measured(native, 1)
        for tile, n_threads in ((0, 2), (0, 3), (64, 1), (64, 3), (192, 2), (1024, 2)):
            backend = load(name, tile=tile) if tile else native
            assert measured(backend, n_threads) == expected, name


@settings(max_examples=60)
@given(n_models=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["bits", "normal"]))
def test_the_order_of_elements_does_not_change_sums(
    backends: dict[str, Backend], n_models: int, seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    make = bit_values if kind == "bits" else normal_values
    models = [make(rng, 700, DTYPES[int(rng.integers(3))]) for _ in range(n_models)]
    if kind == "bits":
        models = [torch.where(torch.isfinite(model), model, 1.0) for model in models]
    permutation = torch.from_numpy(rng.permutation(700))
    for name, backend in backends.items():
        found = []
        for case in (sums_case(models), sums_case([model[permutation] for model in models])):
            (moments,) = backend.measure(case.table(), case.program, case.scalars, EVERYTHING)
            found.append(asked(moments, EVERYTHING))
        assert found[0] == found[1], name


@settings(max_examples=60)
@given(n_models=model_counts, n=st.integers(0, 600), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_sums_are_within_the_bound_of_the_true_sums(
    backends: dict[str, Backend], n_models: int, n: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    kind = data.draw(st.sampled_from(["grid", "normal", "wide"]))
    models = []
    for _ in range(n_models):
        if kind == "grid":
            models.append(grid_values(rng, n, DTYPES[int(rng.integers(3))]))
        else:
            values = normal_values(rng, n, torch.float32, 1.0)
            scale = rng.integers(-100, 30, n) if kind == "wide" else np.zeros(n)
            models.append(values * torch.from_numpy(2.0**scale).float())
    case = sums_case(models)
    found = {
        name: backend.measure(case.table(), case.program, case.scalars, EVERYTHING)[0]
        for name, backend in backends.items()
    }

    def check(addends: np.ndarray, sum_of: Callable[[Moments], float]) -> None:
        truth = math.fsum(addends)
        limit = 0.0 if kind == "grid" else bounds.sum_error(addends.tolist())
        for name, moments in found.items():
            assert abs(sum_of(moments) - truth) <= limit, name

    rows = [model.double().numpy() for model in models]
    for j, row in enumerate(rows):
        check(np.abs(row), lambda moments, j=j: moments.l1[j])
        check(np.abs(row), lambda moments, j=j: moments.l1_before[j])
        for k, other in enumerate(rows):
            check(row * other, lambda moments, j=j, k=k: moments.gram[j][k])


def by_definition(addends: Sequence[float]) -> float:
    """docs/numerics.md, Sums: each addend at a multiple of 2^(40 (J - 1)), added as integers."""
    largest = max(map(abs, addends))
    if largest == 0.0:
        return 0.0
    grid = 40 * (math.frexp(largest)[1] // 40 - 1)
    unit = Fraction(2) ** grid
    return float(unit * sum(round(Fraction(x) / unit) for x in addends))


BLOCKS: dict[str, list[int | None]] = {
    "alike": [0, 0, 0, 0, 0],
    "windows rise": [-60, -40, -20, 0, 20],
    "windows fall": [20, 0, -20, -40, -60],
    "by one bit": [-1, 0, -21, -20, -19],
    "some of zeros": [None, -10, None, 10, None],
    "nothing": [None] * 5,
}
"""Exponents of what blocks of elements are scaled by; None: they are zeros."""


@pytest.mark.parametrize("exponents", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_models", [1, 2, 3, 4])
def test_products_of_many_blocks_follow_the_definition(
    native_with: Callable[..., Backend], exponents: list[int | None], dtype: torch.dtype, n_models: int
) -> None:
    """Other blocks than the first have a window to be added at, if their products stay below it; up to three
    models of 16 bits are added exactly where their entries are multiples of a unit."""
    rng = np.random.default_rng(5)
    n, n_last = 1344, 333
    models = []
    if dtype is torch.float16:  # 2^60 is none of its numbers
        exponents = [exponent if exponent is None else exponent // 6 for exponent in exponents]
    for model in range(n_models):
        shifted = exponents[model % 2 :] + exponents[: model % 2]  # so that pairs have windows of their own
        blocks = [
            torch.zeros(n) if exponent is None else normal_values(rng, n, torch.float32) * 2.0**exponent
            for exponent in shifted
        ]
        models.append(torch.cat(blocks)[: -(n - n_last)].to(dtype))
    case = sums_case(models)
    rows = [model.double().tolist() for model in models]
    expected = [
        [by_definition([x * y for x, y in zip(one, other, strict=True)]) for other in rows] for one in rows
    ]
    for backend in (native_with(), native_with(tile=64), native_with(tile=1024)):
        (found,) = backend.measure(case.table(), case.program, case.scalars, Wants.GRAM, n_threads=2)
        assert found.gram == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinity_in_a_late_block_is_in_its_own_sums_only(native: Backend, dtype: torch.dtype) -> None:
    models = [torch.full((5000,), 0.5, dtype=dtype) for _ in range(3)]
    models[1][4321] = -math.inf
    models[2][4321] = 0.0
    case = sums_case(models)
    (found,) = native.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    assert found.gram[0][0] == 1250.0
    assert found.gram[2][2] == found.gram[0][2] == 1249.75
    assert found.gram[1][1] == math.inf
    assert found.gram[0][1] == -math.inf
    assert math.isnan(found.gram[1][2])


@pytest.mark.parametrize("odd", ["base", 0, 1, 2])
def test_one_tensor_of_another_storage_type(native: Backend, odd: str | int) -> None:
    rng = np.random.default_rng(6)
    base, *models = (normal_values(rng, 20_000, torch.bfloat16) for _ in range(4))
    if odd == "base":
        base = base.half()
    else:
        models[int(odd)] = models[int(odd)].half()
    case = Case(Program(), [Part(models, base)], [TensorScalars(models=[ModelScalars() for _ in models])])
    (found,) = native.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    (expected,) = REFERENCE.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    assert found.gram == expected.gram


def test_squares_are_the_diagonal_of_the_gram_matrix(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    case = sums_case([normal_values(rng, 333, torch.bfloat16) for _ in range(4)])
    (whole,) = backend.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    (diagonal,) = backend.measure(case.table(), case.program, case.scalars, Wants.SQUARES)
    assert [diagonal.gram[k][k] for k in range(4)] == [whole.gram[k][k] for k in range(4)]
    assert all(whole.gram[k][k] > 0 for k in range(4))


def test_products_with_the_last_model_are_those_of_the_gram_matrix(backend: Backend) -> None:
    rng = np.random.default_rng(4)
    case = sums_case([normal_values(rng, 333, torch.bfloat16) for _ in range(4)])
    (whole,) = backend.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    (some,) = backend.measure(case.table(), case.program, case.scalars, Wants.GRAM | Wants.LAST)
    for k in range(4):
        assert some.gram[k][k] == whole.gram[k][k] != 0
        assert some.gram[k][3] == some.gram[3][k] == whole.gram[k][3] != 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts(backend: Backend, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([0.0, inf, 0.0, nan, 1.0, 0.0, 0.0, 1.0], dtype=dtype)
    first = torch.tensor([nan, 0.0, -inf, 1.0, 2.0, 0.5, 0.0, 1.0], dtype=dtype)
    other = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5, 0.0, 3.0], dtype=dtype)
    case = Case(
        Program(keep=Keep.BAND, vote=Vote.COUNT),
        [Part([first, other], base)],
        [TensorScalars(models=[ModelScalars(lo=1.0), ModelScalars(lo=0.0, gain=-1.0)])],
    )
    (found,) = backend.measure(case.table(), case.program, case.scalars, Wants.COUNTS | Wants.VOTES)
    # tau: first [nan, -inf, -inf, nan, 1, .5, 0, 0], other [1, -inf, 2, nan, -1, .5, 0, 2]
    assert found.n_nonfinite == [2, 0]
    assert found.n_base_nonfinite == 2
    assert found.n_kept == [5, 8]
    assert found.n_nonzero == [5, 7]
    assert found.n_conflict == 2  # elements 2 and 4
    # ballots: first as tau, other times -1: signs 0-1, -1+1, -1-1, 0, 1+1, 0-1, 0, 0-1
    assert found.elected == -1 + 0 - 1 + 0 + 1 - 1 + 0 - 1


def test_nonfinite_sums(backend: Backend) -> None:
    inf = float("inf")
    tensors = [
        torch.tensor([1.0, inf, 2.0]),
        torch.tensor([1.0, float("nan"), 2.0]),
        torch.tensor([-1.0, 1.0, -inf]),
    ]
    case = sums_case(tensors)
    (found,) = backend.measure(case.table(), case.program, case.scalars, EVERYTHING)
    assert found.l1[0] == inf
    assert math.isnan(found.l1[1])
    assert found.l1[2] == inf
    assert math.isnan(found.gram[0][2])  # inf - inf
    assert found.gram[0][0] == inf


def test_the_kept_entries_are_summed_before_gain_and_weight(backend: Backend) -> None:
    case = sums_case([torch.tensor([0.25, -0.5, 1.0])])
    own = TensorScalars(models=[ModelScalars(lo=0.5, gain=7.0, weight=-3.0)])
    case = replace(case, program=Program(keep=Keep.BAND), scalars=[own])
    (found,) = backend.measure(case.table(), case.program, case.scalars, EVERYTHING)
    assert (found.l1_before, found.l1, found.gram) == ([1.75], [1.5], [[1.25]])


Change = Callable[[torch.Tensor, list[torch.Tensor], slice], None]
SMALLEST = {torch.bfloat16: 2.0**-40, torch.float16: 2.0**-24}


def _usual(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
    pass


def _odd(n: int) -> Change:
    """`n` entries are no multiples of what the others are, the first and the last of the part among them."""

    def change(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
        at = torch.linspace(part.start, part.stop - 1, n).round().long()
        base[at] = 0.0
        for k, model in enumerate(models):
            model[at] = (2 * k + 3) * SMALLEST[base.dtype]

    return change


def _larger(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
    base[part.start + 5], models[-1][part.start + 5] = -0.25, 0.375


def _beyond_the_unit(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
    """24 bits each: products of half a block are not exact as sums of doubles, and the other half cancels."""
    n = part.stop - part.start
    base[0] = base[1030] = 0.0  # and a product whose window holds them, before an entry whose unit does
    base[part] = ((2 * (torch.arange(n) % 100) + 1) * 2.0**-19).to(base.dtype)
    for model in models:
        model[0], model[1030] = 4.0, 0.75
        model[part] = 20.0
    models[-1][part.start + n // 2 : part.stop] = -20.0


def _of_the_next_window(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
    models[-1][part.start + 5] = -100.0


def _of_the_next_window_within_the_unit(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
    """Squares of the largest entries are 0.47 before, and 0.56 then."""
    for model in models:
        model[:] = base + (model - base).clamp(-0.6875, 0.6875)
        base[3::8192], model[3::8192] = 0.0, 0.6875
        model[part.start + 5] = base[part.start + 5] + 0.75


def _equal(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
    models[-1][part] = base[part]


def _often(base: torch.Tensor, models: list[torch.Tensor], part: slice) -> None:
    """So many blocks are unlike others that the rest of a tile is summed without units."""
    for block in range(4):
        _odd(500)(base, models, slice(block * 8192 + 2048, block * 8192 + 6144))


CHANGES: dict[str, Change] = {
    "usual": _usual,
    "3 odd": _odd(3),
    "255 odd": _odd(255),
    "256 odd": _odd(256),
    "257 odd": _odd(257),
    "1024 odd": _odd(1024),
    "larger": _larger,
    "beyond the unit": _beyond_the_unit,
    "next window": _of_the_next_window,
    "next window within the unit": _of_the_next_window_within_the_unit,
    "equal": _equal,
    "often": _often,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("n_models", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_task_vectors_that_are_multiples_of_a_unit_but_for_some(
    native_with: Callable[..., Backend], dtype: torch.dtype, n_models: int, change: Change
) -> None:
    """Fine-tunes close to a base: blocks after the first are summed in units of what the one before held."""
    rng = np.random.default_rng(3)
    n = 1024 + (4 if change is _often else 2) * 8192 + 37
    base = normal_values(rng, n, torch.float32).to(dtype)
    models = [(base.float() + normal_values(rng, n, torch.float32) * 0.1).to(dtype) for _ in range(n_models)]
    change(base, models, slice(1024 + 8192, 1024 + 2 * 8192))
    case = Case(Program(), [Part(models, base)], [TensorScalars(models=[ModelScalars() for _ in models])])
    rows = [(model.float() - base.float()).double().tolist() for model in models]
    expected = [[0.0] * n_models for _ in models]
    for j, k in combinations_with_replacement(range(n_models), 2):
        products = [x * y for x, y in zip(rows[j], rows[k], strict=True)]
        expected[j][k] = expected[k][j] = by_definition(products)
    for n_threads, tile in ((1, 0), (2, 1024), (1, 12_000)):
        backend = native_with(tile=tile)
        for wants in (Wants.GRAM, Wants.SQUARES):
            (found,) = backend.measure(case.table(), case.program, case.scalars, wants, n_threads=n_threads)
            assert [found.gram[k][k] for k in range(n_models)] == [expected[k][k] for k in range(n_models)]
            assert wants is Wants.SQUARES or found.gram == expected


def test_models_that_are_large_in_different_places(native: Backend) -> None:
    """Their product is small, and would be nothing in units of the two."""
    first, second = torch.zeros(20_000, dtype=torch.bfloat16), torch.zeros(20_000, dtype=torch.bfloat16)
    first[0] = second[1] = 2.0**60
    first[2] = second[2] = 2.0**-60
    first[9_000] = second[9_000] = 2.0**-60
    case = sums_case([first, second])
    (found,) = native.measure(case.table(), case.program, case.scalars, Wants.GRAM)
    assert found.gram == [[2.0**120, 2.0**-119], [2.0**-119, 2.0**120]]
