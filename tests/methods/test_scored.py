"""STA and Fisher merging against their formulas in float64, written without the stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tvfast
from tests.methods.inputs import bound, exact_bits, grid, normal
from tvfast.errors import ArgumentError, ShapeError, StateDictError, StatisticsError, UnknownNameError
from tvfast.statistics import Document, Record, StatisticsWriter
from tvfast.statistics.tensors import array_of

Model = dict[str, Tensor]
SHAPES = {"layers.0.w": (5, 7), "layers.0.b": (5,), "layers.1.w": (3, 11), "head": (13,), "one": ()}
N = {name: math.prod(shape) for name, shape in SHAPES.items()}
LAYER = {"layers.0.w": "0", "layers.0.b": "0", "layers.1.w": "1", "head": "h", "one": "o"}


def model(seed: int, make: Callable[..., Tensor] = normal) -> Model:
    return {name: make(*shape, seed=100 * seed + i) for i, (name, shape) in enumerate(SHAPES.items())}


def powers(seed: int) -> Model:
    """Distinct dyadic importances of 0 or more whose quotients by their largest, 2, are exact."""
    found = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(seed * 10 + i)
        order = torch.randperm(N[name], generator=generator).double()
        values = (order * 8 + seed + i) / 4096  # distinct between models and tensors, too
        values[order == N[name] - 1] = 2.0
        values[order == 0] = 0.0 if N[name] > 1 else 2.0
        found[name] = values.reshape(shape).float()
    return found


NORMALISE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "max": lambda x: x / x.max(),
    "minmax": lambda x: (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else torch.zeros_like(x),
    "l1": lambda x: x / x.sum(),
    "rank": lambda x: (x.reshape(-1, 1) >= x.reshape(1, -1)).sum(1).double().reshape(x.shape) / x.numel(),
}


def masks(
    scores: Sequence[Model],
    *,
    density: float = 0.2,
    threshold: float | None = None,
    normalization: str = "max",
    scope: str = "tensor",
    cross: str = "none",
) -> list[Model]:
    """m_k by the definition, in float64."""
    ranked = [{name: NORMALISE[normalization](x.double()) for name, x in one.items()} for one in scores]
    groups: dict[str, list[str]] = {}
    for name in SHAPES:
        by_tensor = scope == "tensor" or normalization == "rank"
        groups.setdefault(name if by_tensor else LAYER[name] if scope == "layer" else "", []).append(name)
    kept: list[Model] = []
    for one, raw in zip(ranked, scores, strict=True):
        found: Model = {}
        for names in groups.values():
            together = torch.cat([one[name].reshape(-1) for name in names])
            k = int(density * together.numel())
            for name in names:
                if threshold is not None:
                    found[name] = one[name] >= threshold
                elif k == 0:
                    found[name] = torch.zeros_like(one[name], dtype=torch.bool)
                else:
                    smallest = together.sort(descending=True).values[k - 1]
                    alive = one[name] > 0 if normalization != "rank" else raw[name] > 0
                    found[name] = (one[name] >= smallest) & (alive | (density >= 1))
        kept.append(found)
    crossed: list[Model] = []
    for k, own in enumerate(kept):
        others = [j for j in range(len(kept)) if j != k]
        crossed.append(
            {
                name: own[name]
                & ~torch.stack(
                    [
                        torch.zeros_like(own[name]),
                        *(
                            kept[j][name] if cross == "exclude_others" else ranked[j][name] >= ranked[k][name]
                            for j in others
                            if cross != "none"
                        ),
                    ]
                ).any(0)
                for name in SHAPES
            }
        )
    return crossed


def expected_sta(
    base: Model, models: Sequence[Model], kept: Sequence[Model], weights: Sequence[float], scale: float
) -> Model:
    return {
        name: base[name].double()
        + scale
        * sum(
            w * m[name].double() * (one[name].double() - base[name].double())
            for w, m, one in zip(weights, kept, models, strict=True)
        )
        for name in SHAPES
    }


def assert_within(found: Model, expected: Model, base: Model, models: Sequence[Model], weights: Any) -> None:
    for name in SHAPES:
        allowed = bound(base[name], [one[name] for one in models], found[name], weights)
        excess = (found[name].double() - expected[name]).abs() - allowed
        assert float(excess.max()) <= 0, name


@pytest.mark.parametrize("cross", ["none", "winner", "exclude_others"])
@pytest.mark.parametrize("scope", ["tensor", "layer", "model"])
@pytest.mark.parametrize("normalization", list(NORMALISE))
@pytest.mark.parametrize("dial", [{"density": 0.3}, {"density": 1.0}, {"density": 0.0}, {"threshold": 0.01}])
def test_sta_is_its_formula(normalization: str, scope: str, cross: str, dial: dict[str, float]) -> None:
    if normalization == "rank" and cross == "winner":
        return
    base, models, scores = model(0), [model(k + 1) for k in range(3)], [powers(k) for k in range(3)]
    options = {"normalization": normalization, "scope": scope, "cross": cross, **dial}
    weights = [1.0, -0.5, 2.0]
    found = tvfast.merge(base, models, method="sta", stats=scores, weights=weights, scale=0.5, **options)
    kept = masks(scores, **options)
    assert_within(found, expected_sta(base, models, kept, weights, 0.5), base, models, weights)


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.5, 0.9]), st.sampled_from(["ge", "index", "hash"]))
def test_sta_keeps_the_asked_share_of_scores_that_tie(seed: int, density: float, tie: str) -> None:
    base, scores = grid(40, 5, seed=seed), grid(40, 5, seed=seed + 1, width=6).abs()
    out = tvfast.merge(base, [base + 1], method="sta", stats=[scores], density=density, tie=tie, seed=seed)
    kept = out != base
    k = int(density * 200)
    smallest = scores.reshape(-1).sort(descending=True).values[k - 1]
    assert bool(kept[scores > smallest].all())
    assert not bool(kept[scores < smallest].any())
    assert not bool(kept[scores == 0].any()), "an entry without importance is never kept"
    if smallest > 0 and tie == "ge":
        assert bool(kept[scores == smallest].all())
    if smallest > 0 and tie == "index":
        assert int(kept.sum()) == k


def test_sta_forget() -> None:
    base, models, scores = model(0), [model(1), model(2)], [powers(0), powers(1)]
    kept = masks(scores, density=0.3)
    found = tvfast.merge(base, models, method="sta_forget", stats=scores, density=0.3, scale=0.7)
    assert_within(found, expected_sta(base, models, kept, [1, 1], -0.7), base, models, None)
    found = tvfast.merge(
        base, models[:1], method="sta_forget", stats=scores[:1], density=0.3, scale=0.7, weights=[2.0],
        source="model",
    )  # fmt: skip
    expected = {
        name: models[0][name].double()
        - 1.4 * kept[0][name].double() * (models[0][name].double() - base[name].double())
        for name in SHAPES
    }
    assert_within(found, expected, base, models[:1], [3.0])
    with pytest.raises(ArgumentError, match="source='model' got 2 models"):
        tvfast.merge(base, models, method="sta_forget", stats=scores, source="model")


def test_density_1_is_task_arithmetic() -> None:
    base, models, scores = model(0), [model(1), model(2)], [powers(0), powers(1)]
    plain = tvfast.merge(base, models, method="task_arithmetic", weights=[0.5, 2.0])
    found = tvfast.merge(base, models, method="sta", stats=scores, density=1.0, weights=[0.5, 2.0])
    assert all(exact_bits(found[name], plain[name]) for name in SHAPES)


# -- Fisher ----------------------------------------------------------------------------------------


def expected_fisher(
    models: Sequence[Model], fishers: Sequence[Model], dialect: str, c: Sequence[float], epsilon: float | None
) -> Model:
    found: Model = {}
    norms = [math.sqrt(sum(float((x.double() ** 2).sum()) for x in f.values())) for f in fishers]
    for name in SHAPES:
        above = below = torch.zeros(SHAPES[name], dtype=torch.float64)
        for k, (theta, f) in enumerate(zip(models, fishers, strict=True)):
            weight = f[name].double()
            if dialect == "matena_raffel":
                floor = 1e-6 if epsilon is None else epsilon
                weight = (weight.clamp(min=floor) if k == 0 else weight) * c[k] / norms[k]
            elif dialect == "mats":
                weight = c[k] * weight.clamp(min=1e-8 if epsilon is None else epsilon)
            else:
                extra = 1e-6 if epsilon is None else epsilon
                weight = c[k] / (norms[k] + 1e-6) * (weight + extra)
            above, below = above + weight * theta[name].double(), below + weight
        found[name] = above / below
    return found


@pytest.mark.parametrize("epsilon", [None, 1e-3])
@pytest.mark.parametrize("dialect", ["matena_raffel", "mats", "mergelm"])
def test_fisher_is_its_formula(dialect: str, epsilon: float | None) -> None:
    base, models = model(0), [model(k + 1) for k in range(3)]
    fishers = [{name: x.square() * 10.0**-k for name, x in model(k + 7).items()} for k in range(3)]
    fishers[1]["head"][3] = fishers[2]["head"][3] = fishers[0]["head"][3] = 0.0
    c = [1.0, 0.25, 3.0]
    options = {} if epsilon is None else {"epsilon": epsilon}
    found = tvfast.merge(
        base, models, method="fisher", stats=fishers, dialect=dialect, weights=c, scale=0.5, **options
    )
    expected = expected_fisher(models, fishers, dialect, c, epsilon)
    for name in SHAPES:
        # K + 4 roundings above, as many below, and two of each weight.
        mass = sum(one[name].double().abs() for one in models)
        excess = (found[name].double() - 0.5 * expected[name]).abs() - 20 * 2.0**-24 * mass
        assert float(excess.max()) <= 0, name


def test_fisher_dialects_differ() -> None:
    base, models = normal(50), [normal(50, seed=1), normal(50, seed=2)]
    fishers = [normal(50, seed=3).square() * 1e-5, normal(50, seed=4).square() * 1e-3]
    outs = [
        tvfast.merge(base, models, method="fisher", stats=fishers, dialect=dialect)
        for dialect in ("matena_raffel", "mats", "mergelm")
    ]
    assert not torch.allclose(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    default = tvfast.merge(base, models, method="fisher", stats=fishers)
    assert exact_bits(default, outs[0])


def test_equal_fishers_average() -> None:
    base, models = normal(50), [normal(50, seed=1), normal(50, seed=2)]
    out = tvfast.merge(base, models, method="fisher", stats=[torch.ones(50)] * 2)
    torch.testing.assert_close(out, (models[0] + models[1]) / 2)


# -- where scores come from --------------------------------------------------------------------------


def stats_file(path: Path, scores: Model, kind: str, samples: int = 4) -> Path:
    with StatisticsWriter(path, Document()) as writer:
        for name, mean in scores.items():
            sums = array_of(mean * samples, name, summary=True)
            writer.add(Record(name, kind, tuple(mean.shape), {"sum": sums}, {"samples": samples}))
    return path


def test_scores_come_from_statistics_files(tmp_path: Path) -> None:
    base, models, scores = model(0), [model(1), model(2)], [powers(0), powers(1)]
    files = [stats_file(tmp_path / str(k), one, "weight") for k, one in enumerate(scores)]
    found = tvfast.merge(base, models, method="sta", stats=files)
    expected = tvfast.merge(base, models, method="sta", stats=scores)
    assert all(exact_bits(found[name], expected[name]) for name in SHAPES)
    with pytest.raises(StatisticsError, match=r"holds weight; expected fisher"):
        tvfast.merge(base, models, method="fisher", stats=files)
    other = dict(base, head=torch.zeros(12))
    with pytest.raises(StatisticsError, match=r"'head' has shape \[13\], the model's has \[12\]"):
        tvfast.merge(other, [other, other], method="sta", stats=files)


BASE, ONE = torch.zeros(3), torch.ones(3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"method": "sta"}, ArgumentError, "needs statistics of every model, and stats is None"),
    "too few": ({"method": "sta", "stats": []}, ArgumentError, "0 items for 1 models"),
    "not asked": ({"method": "ties", "stats": [ONE]}, ArgumentError, "takes no stats"),
    "stats and scores": ({"method": "sta", "stats": [ONE], "scores": [ONE]}, ArgumentError, "both given"),
    "shape": ({"method": "sta", "stats": [torch.ones(4)]}, ShapeError, "shape"),
    "name": ({"method": "sta", "stats": [{"x": ONE}]}, StateDictError, "no score of tensor 'tensor'"),
    "negative": ({"method": "sta", "stats": [-ONE]}, ArgumentError, "from -1.0 to -1.0"),
    "nan": ({"method": "sta", "stats": [ONE * math.nan]}, ArgumentError, "expected finite"),
    "zero Fisher": ({"method": "fisher", "stats": [BASE]}, ArgumentError, "which is 0"),
    "both": ({"method": "sta", "density": 0.5, "threshold": 0.5, "scores": [ONE]}, ArgumentError, "one of"),
    "threshold": ({"method": "sta", "threshold": 1.5, "scores": [ONE]}, ArgumentError, r"in \[0, 1\]"),
    "scope": ({"method": "sta", "scope": "row", "scores": [ONE]}, UnknownNameError, "tensor, layer, model"),
    "cross": ({"method": "sta", "cross": "winners", "scores": [ONE]}, UnknownNameError, "'winner'"),
    "rank": (
        {"method": "sta", "normalization": "rank", "cross": "winner", "scores": [ONE]},
        ArgumentError,
        "the order only",
    ),
    "epsilon": ({"method": "fisher", "epsilon": 0.0, "scores": [ONE]}, ArgumentError, "above 0"),
    "weight": ({"method": "fisher", "weights": 0.0, "scores": [ONE]}, ArgumentError, "above 0"),
    "dialect": ({"method": "fisher", "dialect": "paper", "scores": [ONE]}, UnknownNameError, "matena_raffel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    arguments, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        tvfast.merge(BASE, [ONE], **arguments)
