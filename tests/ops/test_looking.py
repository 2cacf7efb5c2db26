"""A merge that looks for NaN and infinity where it reads anyway, on every instruction set."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import NATIVE, load
from tvfast.ops._views import view
from tvfast.ops.raw import Look, LookingBackend
from tvfast.program import (
    Divisor,
    Entry,
    Keep,
    Members,
    ModelScalars,
    Program,
    TensorScalars,
    Vote,
    Weighting,
    WorkTable,
)

N = 200_003  # of four tiles, the last short
ROLES = ("base", "first", "second", "score")
PROGRAMS = {
    "sum": Program(),
    "trimmed votes": Program(keep=Keep.BAND, vote=Vote.MASS, members=Members.STRICT, divisor=Divisor.COUNT),
    "ranked draws": Program(keep=Keep.RANDOM_BY_RANK),
    "weighed by scores": Program(weighting=Weighting.SCORE, divisor=Divisor.WEIGHT),
}
SCALARS = [TensorScalars(models=[ModelScalars(lo=0.5, limit=1 << 31, key=k) for k in range(2)])]


@pytest.fixture(scope="module", params=NATIVE)
def backend(request: pytest.FixtureRequest) -> LookingBackend:
    found = load(request.param)
    assert isinstance(found, LookingBackend)
    return found


def operands(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(2)
    return {role: torch.randn(N, generator=drawn).to(dtype) for role in ROLES}


def table_of(found: dict[str, Tensor], out: Tensor, *, scored: bool) -> WorkTable:
    models = tuple(view(found[role], "", role) for role in ("first", "second"))
    entry = Entry(
        name="", models=models, base=view(found["base"], "", "base"), out=view(out, "", "out"), row=509
    )
    if scored:
        entry = replace(entry, scores=(view(found["score"], "", "score"),) * 2)
    return WorkTable([entry], 2)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_looking_changes_no_bit(backend: LookingBackend, name: str, dtype: torch.dtype) -> None:
    found, program = operands(dtype), PROGRAMS[name]
    scored = program.weighting is Weighting.SCORE
    plain, looked = (torch.empty(N, dtype=dtype) for _ in range(2))
    backend.combine(table_of(found, plain, scored=scored), program, SCALARS)
    everything = Look.INPUTS | Look.RESULTS
    assert not backend.combine_looking(
        table_of(found, looked, scored=scored), program, SCALARS, everything, 2
    )
    assert torch.equal(plain, looked)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("at", [0, 65_536, 65_535, N - 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_is_found_wherever_it_is(backend: LookingBackend, role: str, at: int, value: float) -> None:
    found = operands()
    found[role][at] = value
    out = torch.empty(N, dtype=torch.bfloat16)
    scored = PROGRAMS["weighed by scores"]
    table = table_of(found, out, scored=True)
    assert backend.combine_looking(table, scored, SCALARS, Look.INPUTS, 2) == Look.INPUTS
    assert not backend.combine_looking(table, scored, SCALARS, Look(0), 2)
    if role != "score":
        table = table_of(found, out, scored=False)
        assert Look.INPUTS in backend.combine_looking(table, Program(), SCALARS, Look.INPUTS | Look.RESULTS)


@pytest.mark.parametrize("name", ["sum", "ranked draws"])
@pytest.mark.parametrize("at", [0, 65_536, N - 1])
def test_a_result_that_its_type_does_not_hold_is_found(backend: LookingBackend, name: str, at: int) -> None:
    found = operands(torch.float16)
    found["first"][at], found["second"][at] = 6e4, 6e4
    out = torch.empty(N, dtype=torch.float16)
    table = table_of(found, out, scored=False)
    certain = [TensorScalars(models=[ModelScalars(key=k) for k in range(2)])]
    everything = Look.INPUTS | Look.RESULTS
    assert backend.combine_looking(table, PROGRAMS[name], certain, everything, 2) == Look.RESULTS
    assert not backend.combine_looking(table, PROGRAMS[name], certain, Look.INPUTS, 2)


def test_what_is_overwritten_is_seen_before(backend: LookingBackend) -> None:
    """Infinity in a result is none in the inputs; in an input it is seen where the result takes its place."""
    found = operands(torch.float32)
    found["first"].fill_(3e38), found["base"].fill_(-3e38)
    over_base, over_first = (table_of(found, found[role], scored=False) for role in ("base", "first"))
    assert not backend.combine_looking(over_base, Program(), SCALARS, Look.INPUTS)
    assert found["base"].isinf().all()
    assert backend.combine_looking(over_first, Program(), SCALARS, Look.INPUTS) == Look.INPUTS
