"""Rows that are ranked a segment at a time: the bits of rows that are ranked as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import tvfast
from tests.conftest import load
from tests.strategies import (
    Case,
    Part,
    assert_same_bits,
    bit_values,
    combined,
    grid_values,
    normal_values,
    view_of,
)
from tvfast.ops import reference
from tvfast.ops.raw import Backend, Wants
from tvfast.program import ALWAYS, Divisor, Gain, Keep, ModelScalars, Program, TensorScalars, Vote

TILE = 64
"""A row is long from two tiles on, and a segment of three models has about twenty."""

REFERENCE = reference.backend()
N = 2000
ROWS = {"one": 0, "several, the last one short": 1501, "short and long": 130}


def part_of(kind: str, dtype: torch.dtype, *, row: int, n_models: int = 3, seed: int = 0, n: int = N) -> Part:
    rng = np.random.default_rng(seed)
    make = {"continuous": normal_values, "ties": grid_values, "bits": bit_values}[kind]
    base = make(rng, n, dtype)
    models = [make(rng, n, dtype) for _ in range(n_models)]
    if kind == "continuous":  # close to the base, as a fine-tune is
        models = [(base.float() + 0.01 * model.float()).to(dtype) for model in models]
    masks = [np.zeros(n, dtype=bool) for _ in models]
    return Part(models, base, out_dtype=dtype, masks=masks, row=row, offset=2**32 - 7)


def case_of(program: Program, part: Part) -> Case:
    row = part.row or part.n
    own = [
        ModelScalars(
            weight=0.3 + k,
            limit=ALWAYS // 4,
            limit_step=2**63 // row,
            prob=0.25,
            prob_step=0.5 / row,
            rank_lo=row // 5 + k,
            rank_hi=row - row // 7,
            key=k,
        )
        for k in range(len(part.models))
    ]
    return Case(program, [part], [TensorScalars(models=own)])


PROGRAMS = [
    Program(keep=Keep.RANDOM_BY_RANK, vote=Vote.MASS, divisor=Divisor.WEIGHT),
    Program(keep=Keep.RANDOM_BY_RANK, gain=Gain.INVERSE_PROBABILITY),
    Program(keep=Keep.BAND_BY_RANK, vote=Vote.MASS, divisor=Divisor.WEIGHT),
]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("continuous", torch.float32),
        ("continuous", torch.bfloat16),
        ("ties", torch.float16),
        ("bits", torch.bfloat16),
    ],
    ids=str,
)
def test_long_rows_have_the_bits_of_whole_ones(
    native_with: Callable[..., Backend], kind: str, dtype: torch.dtype, row: int
) -> None:
    part = part_of(kind, dtype, row=row)
    for n_threads, program in enumerate(PROGRAMS, 1):
        case = case_of(program, part)
        found, expected = (_everything(one, case, n_threads) for one in (native_with(tile=TILE), REFERENCE))
        assert_same_bits(found[0], expected[0], program)
        assert found[1:] == expected[1:]


def _everything(backend: Backend, case: Case, n_threads: int) -> tuple[list[Tensor], str, list[list[int]]]:
    """The results, the sums, and the bit planes."""
    wants = Wants.L1_BEFORE | Wants.L1 | Wants.COUNTS | Wants.GRAM | Wants.VOTES
    outs = combined(backend, case, n_threads=n_threads)
    moments = backend.measure(case.table(), case.program, case.scalars, wants, n_threads)
    table = case.table()
    backend.row_masks(table, case.program, case.scalars, n_threads)
    return outs, str(moments), [mask.owner.tolist() for mask in table.entries[0].masks]


@pytest.mark.parametrize("kind", ["continuous", "ties", "bits"])
@pytest.mark.parametrize(("row", "n"), [(0, 65_535), (0, 65_536), (5000, 14_000)])
@pytest.mark.parametrize("program", PROGRAMS[:2])
def test_whole_rows_whose_places_16_bits_hold_or_just_not(
    native_with: Callable[..., Backend], kind: str, row: int, n: int, program: Program
) -> None:
    case = case_of(program, part_of(kind, torch.float32, row=row, n_models=1, n=n))
    found, expected = (_everything(one, case, 2) for one in (native_with(), REFERENCE))
    assert_same_bits(found[0], expected[0], program)
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("where", ["base", "first model", "last model"])
def test_long_rows_in_place(native_with: Callable[..., Backend], where: str) -> None:
    """Every segment reads the whole row, so what is written must not reach it."""
    part = part_of("continuous", torch.bfloat16, row=0)
    case = case_of(Program(keep=Keep.RANDOM_BY_RANK, gain=Gain.INVERSE_PROBABILITY), part)
    expected = combined(REFERENCE, case)
    assert part.base is not None
    out = {"base": part.base, "first model": part.models[0], "last model": part.models[-1]}[where]
    table = case.table([out])
    table.entries[0].out = view_of(out)
    native_with(tile=TILE).combine(table, case.program, case.scalars)
    assert_same_bits([out], expected)


def million(n: int, seed: int, std: float) -> Tensor:
    out = torch.empty(n, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for part in out.split(2**20):
        part.copy_(torch.randn(part.numel(), generator=generator) * std)
    return out


PEAK = """
import sys
import torch
import tvfast
from tests.ops.test_long_rows import million

def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

n, method, dialect = int(sys.argv[1]), sys.argv[2], sys.argv[3]
base, models = million(n, 0, 0.02), [million(n, k, 0.02) for k in (1, 2, 3)]
merge = lambda base, models: tvfast.merge_(base, models, method, dialect=dialect, density=0.5)
merge(base[:4096].clone(), [model[:4096] for model in models])
before = peak_kib()
merge(base, models)
print(peak_kib() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dialect"), [("della", "mergekit"), ("della", "paper"), ("breadcrumbs", "paper")]
)
def test_extra_memory_of_a_long_row_is_the_output_and_64_mib(method: str, dialect: str) -> None:
    load("cpp")
    n = 32 * 2**20
    command = [sys.executable, "-c", PEAK, str(n), method, dialect]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 2 * n // 1024 + 64 * 1024


@pytest.mark.slow
def test_a_row_of_eight_million_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 8 * 2**20 + 3
    base = million(n, 0, 0.02)
    models = [(base.float() + million(n, k, 1e-3).float()).bfloat16() for k in (1, 2)]
    for method, dialect in (("della", "mergekit"), ("della_linear", "paper"), ("breadcrumbs", "paper")):
        results = []
        for backend in ("cpp", "reference"):
            monkeypatch.setenv("TVFAST_BACKEND", backend)
            results.append(tvfast.merge(base, models, method, dialect=dialect, density=0.5))
        assert_same_bits([results[0]], [results[1]], method)
