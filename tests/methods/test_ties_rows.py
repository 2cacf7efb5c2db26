"""Every TIES that is in use is one `Program` with scalars: each against its peer's formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import tvfast
from tests.methods.peer_ties import EXACTLY_K, RESTATEMENTS, WEIGHTED, WHOLE_MODEL, Array
from tests.strategies import Case, Part, grid_values, table_of
from tvfast.methods.dialects import TIES_DIALECTS
from tvfast.ops import reference
from tvfast.ops.raw import Backend, Wants
from tvfast.program import Divisor, Keep, ModelScalars, RankQuery, TensorScalars, Tie

NAMES = sorted(TIES_DIALECTS)
DENSITIES = (0.0, 0.05, 0.2, 0.29, 0.5, 0.57, 0.9, 1.0)
LENGTHS = (37, 100)  # 0.29 * 100 and 0.57 * 100 are below 29 and 57 in float64


@dataclass
class Inputs:
    """Two tensors, each with a base and K models on a dyadic grid."""

    bases: list[torch.Tensor]
    models: list[list[torch.Tensor]]  # [tensor][K]
    weights: list[float]
    scale: float

    @property
    def taus(self) -> list[Array]:
        return [
            np.stack([(m - b).numpy() for m in models]).astype(np.float64)
            for b, models in zip(self.bases, self.models, strict=True)
        ]


def make(seed: int, n_models: int) -> Inputs:
    rng = np.random.default_rng(seed)
    bases, models = [], []
    for n in LENGTHS:
        base = grid_values(rng, n, torch.float32)
        bases.append(base)
        models.append([base + grid_values(rng, n, torch.float32, width=9) for _ in range(n_models)])
    weights = rng.choice([1.0, 0.5, 2.0, 0.25, -1.0], n_models).tolist()
    return Inputs(bases, models, weights, float(rng.choice([1.0, 0.5, -2.0])))


def expected(name: str, inputs: Inputs, density: float) -> list[tuple[Array, Array]]:
    """(R, D) per tensor by the peer's formula."""
    weights = np.array(inputs.weights if name in WEIGHTED else [1.0] * len(inputs.weights))
    restate = RESTATEMENTS[name]
    if name not in WHOLE_MODEL:
        return [restate(taus, weights, density) for taus in inputs.taus]
    r, d = restate(np.concatenate(inputs.taus, axis=1), weights, density)
    cut = LENGTHS[0]
    return [(r[:cut], d[:cut]), (r[cut:], d[cut:])]


def merged_by_row(
    name: str, backend: Backend, inputs: Inputs, density: float, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What the row's program gives, the scalars set from the row as data."""
    row = TIES_DIALECTS[name]
    program = replace(row.program, tie=Tie.INDEX) if name in EXACTLY_K else row.program
    whole = row.scope == "model"
    parts = [
        Part(list(models), base, group=0 if whole else i, group_offset=LENGTHS[0] * i if whole else 0)
        for i, (base, models) in enumerate(zip(inputs.bases, inputs.models, strict=True))
    ]
    n_models = len(inputs.weights)
    weights = inputs.weights if row.takes_weights else [1.0] * n_models
    scalars = [
        TensorScalars(models=[ModelScalars(weight=w) for w in weights], scale=inputs.scale) for _ in parts
    ]
    table = table_of(parts)
    sizes = [sum(LENGTHS)] if whole else list(LENGTHS)
    for group, n in enumerate(sizes):
        k = row.kept(density, n)
        for model in range(n_models):
            lo, cut, position = trim(backend, table, group, model, k, n, program.tie)
            for part, tensor in zip(parts, scalars, strict=True):
                if part.group == group:
                    tensor.models[model].lo = lo
                    # an index cut is a position in the tensor, the k-th entry's one in the group
                    tensor.models[model].lo_cut = max(0, cut - part.group_offset) if position else cut
    elected = [moments.elected for moments in backend.measure(table, program, scalars, Wants.VOTES)]
    for i, tensor in enumerate(scalars):
        tensor.majority = row.majority(sum(elected) if whole else elected[i])
    outs = [torch.zeros(n, dtype=dtype) for n in LENGTHS]
    case = Case(program, parts, scalars)
    backend.combine(case.table(outs), program, scalars)
    return outs


def trim(
    backend: Backend, table: tvfast.program.WorkTable, group: int, model: int, k: int, n: int, tie: Tie
) -> tuple[float, int, bool]:
    """(lo, lo_cut, whether the cut is a position) for the k largest magnitudes."""
    if k == 0:
        return float("inf"), 0, False
    (found,) = backend.thresholds(table, Keep.BAND, [RankQuery(group, model, k)])
    n_tied = k - found.n_greater
    if tie is Tie.GE or n_tied == found.n_equal:
        return found.value, ModelScalars().lo_cut, False
    (cut,) = backend.nth_equal(table, Keep.BAND, [(group, model, found.value, n_tied)])
    return found.value, cut, True


def compose(
    bases: Sequence[torch.Tensor], parts: list[tuple[Array, Array]], scale: float, dtype: type
) -> list[Array]:
    """base + (R / D) * scale, each operation rounded to `dtype`; R and D are exact in it."""
    composed = []
    for base, (r, d) in zip(bases, parts, strict=True):
        merged = r.astype(dtype) / d.astype(dtype) * dtype(scale)
        composed.append(base.numpy().astype(dtype) + merged)
    return composed


def assert_equal(found: Sequence[torch.Tensor], wanted: Sequence[Array], what: str) -> None:
    for i, (left, right) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_array_equal(left.numpy(), right, err_msg=f"{what}, tensor {i}")


@pytest.mark.parametrize("n_models", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_the_peers_formula(name: str, n_models: int) -> None:
    oracle = reference.backend(torch.float64)
    n_zero_votes = 0
    for seed in range(4):
        inputs = make(seed, n_models)
        for density in DENSITIES:
            found = merged_by_row(name, oracle, inputs, density, torch.float64)
            wanted = compose(inputs.bases, expected(name, inputs, density), inputs.scale, np.float64)
            assert_equal(found, wanted, f"{name}, seed {seed}, density {density}")
        votes = np.concatenate(inputs.taus, axis=1)
        n_zero_votes += int(((votes.sum(axis=0) == 0) & (votes != 0).any(axis=0)).sum())
    assert n_models == 1 or n_zero_votes > 0, "no tied vote among the inputs"


@pytest.mark.parametrize("name", NAMES)
def test_backends_equal_the_peers_formula(name: str, backend: Backend) -> None:
    for seed, density in enumerate(DENSITIES):
        inputs = make(100 + seed, 3)
        found = merged_by_row(name, backend, inputs, density, torch.float32)
        wanted = compose(inputs.bases, expected(name, inputs, density), inputs.scale, np.float32)
        assert_equal(found, wanted, f"{name}, density {density}")


@pytest.mark.parametrize("name", NAMES)
def test_merge_takes_every_row_by_its_name(name: str) -> None:
    """The public call chooses the row's program, scope, rank rule and majority."""
    for seed, density in enumerate(DENSITIES):
        inputs = make(200 + seed, 3)
        out = tvfast.merge(
            dict(zip("ab", inputs.bases, strict=True)),
            [dict(zip("ab", model, strict=True)) for model in zip(*inputs.models, strict=True)],
            method="ties",
            dialect=name,
            density=density,
            scale=inputs.scale,
            **({"weights": inputs.weights} if name in WEIGHTED else {}),
            **({"tie": "index"} if name in EXACTLY_K else {}),
        )
        wanted = compose(inputs.bases, expected(name, inputs, density), inputs.scale, np.float32)
        assert_equal([out["a"], out["b"]], wanted, f"{name}, density {density}")


@pytest.mark.parametrize(
    ("name", "merged"),
    [
        ("fusion_bench_sum", [2.0, -4.0, -0.5, -0.25]),
        ("fusion_bench_mean", [1.0, -2.0, -0.5, -0.25]),
        ("paper", [1.0, -2.0, -0.5, -0.25]),
        ("fusion_bench_max", [1.0, -2.0, 0.0, 0.0]),
        ("mergelm", [1.0, -2.0, 0.0, 0.0]),
        ("mergekit", [1.0, -2.0, 0.5, 0.25]),
        ("peft", [1.0, -2.0, 0.5, 0.25]),
        ("peft_frequency", [1.0, -2.0, 0.5, 0.25]),
        ("sd_mecha", [1.0, -2.0, 0.0, 0.0]),
        ("sd_mecha_values", [1.0, -2.0, 0.0, 0.0]),
    ],
)
def test_tied_votes_under_a_tied_majority(name: str, merged: list[float]) -> None:
    """One entry elects +, one -, two tie: the majority is 0 too, and peers differ in what they do with it."""
    base = torch.zeros(4)
    models = [torch.tensor([1.0, -2.0, 0.5, -0.25]), torch.tensor([1.0, -2.0, -0.5, 0.25])]
    out = tvfast.merge({"a": base}, [{"a": m} for m in models], method="ties", dialect=name, density=1.0)
    assert out["a"].tolist() == merged


@pytest.mark.parametrize(
    ("name", "density", "n", "k"),
    [
        ("mergekit", 0.29, 100, 28),
        ("mergekit", 1e-9, 100, 1),
        ("mergekit", 0.0, 100, 0),
        ("peft", 0.29, 100, 28),
        ("peft", 1e-9, 100, 0),
        ("paper", 0.2, 1000, 201),
        ("paper", 0.0, 1000, 1),
        ("fusion_bench_max", 1.0, 1000, 1000),
        ("mergelm", 0.2, 1000, 201),
        ("mergelm", 0.9, 1000, 901),
        ("mergelm", 1.0, 1000, 1000),
        ("sd_mecha", 0.0, 1000, 1),
        ("sd_mecha", 0.5, 1000, 501),
        ("sd_mecha", 0.9, 1000, 902),
        ("sd_mecha", 1.0, 1000, 1000),
        ("mergekit", 0.5, 0, 0),
        ("paper", 0.5, 0, 0),
        ("sd_mecha", 0.5, 0, 0),
    ],
)
def test_rank_rules(name: str, density: float, n: int, k: int) -> None:
    assert TIES_DIALECTS[name].kept(density, n) == k


def test_rows_that_divide_name_a_divisor() -> None:
    undivided = {name for name in NAMES if TIES_DIALECTS[name].program.divisor is Divisor.NONE}
    assert undivided == {"fusion_bench_sum", "fusion_bench_max"}
