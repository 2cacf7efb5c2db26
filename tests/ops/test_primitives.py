"""`tvfast.ops`: every public primitive against a plain restatement, its `out=`, and every bad argument."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import DTYPES, bit_values, grid_values, normal_values
from tvfast import ops
from tvfast.errors import (
    ArgumentError,
    DTypeError,
    LayoutError,
    ShapeError,
    TvfastError,
    UnknownNameError,
)
from tvfast.methods.scalars import model_key
from tvfast.ops._philox_torch import tie_hash
from tvfast.ops.raw import Wants
from tvfast.program import Keep, ModelScalars, Moments, Program, TensorScalars, Vote

N = 1000


@pytest.fixture(params=("reference", "cpp"), autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import load

    load(request.param)
    monkeypatch.setenv("TVFAST_BACKEND", request.param)


def drawn(seed: int, n: int = N, dtype: torch.dtype = torch.float32, make: Any = grid_values) -> Tensor:
    return make(np.random.default_rng(seed), n, dtype)


def rank_threshold(magnitudes: Tensor, k: int) -> float:
    """The k-th largest by sorting in numpy; NaN above all."""
    if k == 0:
        return math.inf
    values = magnitudes.view(-1).numpy()
    return float(np.sort(values)[len(values) - k])  # numpy sorts NaN last


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [grid_values, normal_values, bit_values], ids=lambda f: f.__name__)
@pytest.mark.parametrize("density", [0.0, 0.0015, 0.2, 0.5, 0.9995, 1.0])
def test_threshold_is_the_exact_order_statistic(make: Any, dtype: torch.dtype, density: float) -> None:
    x = drawn(1, dtype=dtype, make=make)
    found = ops.threshold(x, density)
    assert found.shape == ()
    assert found.dtype == torch.float32
    expected = rank_threshold(x.float().abs(), int(density * N))
    assert found.item() == expected or (math.isnan(found.item()) and math.isnan(expected))


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_threshold_splits_the_ranks(n: int, density: float, seed: int) -> None:
    x, base = drawn(seed, n), drawn(seed + 1, n, torch.bfloat16)
    k = int(density * n)
    t = ops.threshold(x, density, base=base).item()
    magnitudes = (x - base.float()).abs()
    assert int((magnitudes > t).sum()) < k <= int((magnitudes >= t).sum()) or (k == 0 and t == math.inf)


def test_threshold_of_a_list_is_one_per_tensor() -> None:
    tensors = [drawn(s, n).view(shape) for s, n, shape in ((0, 60, (3, 20)), (1, 7, (7,)), (2, 0, (0, 4)))]
    bases = [drawn(s + 9, t.numel()).view(t.shape) for s, t in enumerate(tensors)]
    found = ops.threshold(tensors, 0.3, base=bases)
    assert found.shape == (3,)
    alone = [ops.threshold(t, 0.3, base=b) for t, b in zip(tensors, bases, strict=True)]
    assert torch.equal(found, torch.stack(alone))
    assert found[2] == math.inf


def expected_mask(x: Tensor, density: float, tie: str, key: int) -> Tensor:
    """The rules of docs/numerics.md from sorted magnitudes."""
    magnitudes = x.float().view(-1).abs()
    k = int(density * x.numel())
    t = rank_threshold(magnitudes, k)
    if k == 0 or math.isnan(t):
        return magnitudes.isnan().view(x.shape)
    greater, equal = (magnitudes > t) | magnitudes.isnan(), magnitudes == t
    n_before = k - int(greater.sum())
    if tie == "index":
        equal &= equal.cumsum(0) <= n_before
    elif tie == "hash" and n_before < int(equal.sum()):
        hashes = tie_hash(key, torch.arange(x.numel()))
        equal &= hashes < (n_before << 32) // int(equal.sum())
    return (greater | equal).view(x.shape)


@pytest.mark.parametrize("tie", ["hash", "index", "ge"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("make", [grid_values, bit_values], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (64,), (13, 77)], ids=str)
def test_topk_mask_keeps_what_the_rule_says(shape: Any, make: Any, density: float, tie: str) -> None:
    x = drawn(3, math.prod(shape), torch.bfloat16, make).view(shape)
    found = ops.topk_mask(x, density, tie=tie, seed=5, name="layer.weight")
    assert found.dtype == torch.bool
    assert found.shape == x.shape
    assert torch.equal(found, expected_mask(x, density, tie, model_key(5, "layer.weight", 0)))


def test_topk_mask_counts() -> None:
    x, base = drawn(4), drawn(5, dtype=torch.float16)
    assert int(ops.topk_mask(x, 0.25, base=base, tie="index").sum()) == 250
    assert int(ops.topk_mask(x, 0.25, base=base, tie="ge").sum()) > 250  # a grid has ties at the threshold
    masks = [ops.topk_mask(x, 0.25, base=base, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def plain_elect(deltas: list[Tensor], weights: list[float], vote: str, zero: int) -> Tensor:
    total = torch.zeros(deltas[0].shape, dtype=torch.float32)
    for delta, weight in zip(deltas, weights, strict=True):
        x = delta.float() * weight
        total = total + (x if vote == "mass" else (x > 0).float() - (x < 0).float())
    sign = (total > 0).to(torch.int8) - (total < 0).to(torch.int8)
    return torch.where(sign == 0, zero, sign).to(torch.int8)


@pytest.mark.parametrize("vote", ["mass", "count"])
@pytest.mark.parametrize(("zero_sign", "zero"), [("plus", 1), ("minus", -1), ("none", 0)])
@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0]], ids=["plain", "weighted"])
@pytest.mark.parametrize("make", [grid_values, bit_values], ids=lambda f: f.__name__)
def test_elect(make: Any, weights: list[float] | None, zero_sign: str, zero: int, vote: str) -> None:
    deltas = [drawn(k, dtype=dtype, make=make).view(20, 50) for k, dtype in enumerate(DTYPES)]
    found = ops.elect(deltas, weights=weights, vote=vote, zero_sign=zero_sign)
    assert found.dtype == torch.int8
    assert torch.equal(found, plain_elect(deltas, weights or [1.0] * 3, vote, zero))


def test_one_weight_is_that_of_every_task_vector() -> None:
    deltas = [drawn(k) for k in range(3)]
    assert ops.elect(deltas, weights=-2.0).equal(ops.elect(deltas, weights=[-2.0] * 3))


def test_elect_agrees_with_the_vote_inside_measure() -> None:
    deltas = [drawn(k) for k in range(4)]
    for vote, name in ((Vote.MASS, "mass"), (Vote.COUNT, "count")):
        moments = ops.measure(None, deltas, Wants.VOTES, Program(vote=vote))
        assert moments.elected == int(ops.elect(deltas, vote=name, zero_sign="none").sum())


def test_elect_takes_a_stack_and_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvfast.ops.primitives.CHUNK", 64)
    stack = torch.stack([drawn(k).view(8, 125) for k in range(3)])
    for vote in ("mass", "count"):
        found = ops.elect(stack, vote=vote)
        assert torch.equal(found, plain_elect(list(stack), [1.0] * 3, vote, 1))


def test_combine_is_task_arithmetic_by_default() -> None:
    base, models = drawn(0).view(25, 40), [drawn(k + 1).view(25, 40) for k in range(3)]
    scalars = TensorScalars(models=[ModelScalars(weight=w) for w in (1.0, 0.5, -2.0)], scale=0.25)
    found = ops.combine(base, models, Program(), scalars)
    total = sum((m - base) * w for m, w in zip(models, (1.0, 0.5, -2.0), strict=True))
    assert torch.equal(found, base + total * 0.25)  # dyadic, so that float32 is exact
    assert torch.equal(ops.combine(base, torch.stack(models), Program(), scalars), found)
    assert torch.equal(ops.combine(None, models), models[0] + models[1] + models[2])


@pytest.mark.parametrize("where", ["new", "base", "model"])
def test_combine_writes_where_it_is_told(where: str) -> None:
    base, models = drawn(0, dtype=torch.bfloat16), [drawn(k + 1, dtype=torch.bfloat16) for k in range(2)]
    expected = ops.combine(base, models)
    assert expected.dtype == torch.bfloat16
    out = {"new": torch.empty(N, dtype=torch.float16), "base": base, "model": models[1]}[where]
    assert ops.combine(base, models, out=out) is out
    assert torch.equal(out.float(), expected.float())


def test_combine_reads_masks_and_scores() -> None:
    models = [drawn(k).view(10, 100) for k in range(2)]
    masks = [drawn(k + 5).view(10, 100) > 0 for k in range(2)]
    found = ops.combine(None, models, Program(keep=Keep.MASK), masks=masks)
    assert torch.equal(found, models[0] * masks[0] + models[1] * masks[1])
    scores = [drawn(k + 7, dtype=torch.bfloat16).view(10, 100) for k in range(2)]
    scalars = TensorScalars(models=[ModelScalars(lo=0.25), ModelScalars(lo=0.125, hi=0.375)])
    found = ops.combine(None, models, Program(keep=Keep.SCORE), scalars, scores=scores)
    kept = [scores[0].abs() >= 0.25, (scores[1].abs() >= 0.125) & (scores[1].abs() <= 0.375)]
    assert torch.equal(found, models[0] * kept[0] + models[1] * kept[1])


def test_combine_of_parts_is_the_whole() -> None:
    models = [drawn(k) for k in range(2)]
    scalars = TensorScalars(models=[ModelScalars(limit=2**31, key=k + 3) for k in range(2)])
    program = Program(keep=Keep.RANDOM)
    whole = ops.combine(None, models, program, scalars)
    parts = [
        ops.combine(None, [m[a:b] for m in models], program, scalars, offset=a)
        for a, b in ((0, 1), (1, 77), (77, N))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, models[0] + models[1])


def test_rows_follow_the_last_dimension() -> None:
    x = drawn(1, make=normal_values).view(10, 100)
    scalars = TensorScalars(models=[ModelScalars(rank_lo=90)])
    program = Program(keep=Keep.BAND_BY_RANK)
    assert (ops.combine(None, [x], program, scalars) != 0).sum(1).tolist() == [10] * 10
    assert int((ops.combine(None, [x], program, scalars, row=0) != 0).sum()) == N - 90


def test_measure() -> None:
    base, models = drawn(0), [drawn(k + 1) for k in range(3)]
    models[1][3] = math.nan
    tau = torch.stack([m - base for m in models]).double()
    moments = ops.measure(base, models)
    assert moments.n_nonfinite == [0, 1, 0]
    assert moments.gram[0][2] == moments.gram[2][0] == float(tau[0] @ tau[2])
    assert moments.l1[0] == moments.l1_before[0] == float(tau[0].abs().sum())
    assert math.isnan(moments.l1[1])
    only = ops.measure(base, models, Wants.SQUARES, n_threads=1)
    assert only.gram[0] == [float(tau[0] @ tau[0]), 0.0, 0.0]
    assert only.l1 == [0.0] * 3
    assert ops.measure(base, models, out=only) is only
    assert isinstance(only, Moments)
    assert only.l1[2] == moments.l1[2]
    assert only.n_nonfinite == [0, 1, 0]


def test_measure_after_a_keep_stage() -> None:
    x = drawn(2)
    scalars = TensorScalars(models=[ModelScalars(lo=0.25)])
    moments = ops.measure(None, [x], program=Program(keep=Keep.BAND), scalars=scalars)
    kept = x[x.abs() >= 0.25]
    assert moments.n_kept == [kept.numel()]
    assert moments.l1 == [float(kept.double().abs().sum())]
    assert moments.l1_before == [float(x.double().abs().sum())]


def test_measure_of_nothing() -> None:
    moments = ops.measure(None, [torch.empty(0), torch.empty(0)])
    assert moments.l1 == [0.0, 0.0]
    assert moments.n_kept == [0, 0]


@pytest.mark.parametrize("kind", ["product", "square", "delta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score(kind: str, dtype: torch.dtype) -> None:
    g, w, b = (drawn(k, dtype=dtype, make=normal_values).view(10, 100) for k in range(3))
    formula = {
        "product": lambda: (g.float() * w.float()).abs(),
        "square": lambda: g.float() * g.float(),
        "delta": lambda: (g.float() * (w.float() - b.float())).abs(),
    }[kind]
    arguments = {"kind": kind} | ({"base": b} if kind == "delta" else {})
    weight = None if kind == "square" else w
    first = ops.score(g, weight, **arguments)
    assert first.dtype == torch.float32
    assert torch.equal(first, formula())
    total = drawn(9).view(10, 100)
    expected = total + formula()
    assert ops.score(g, weight, out=total, **arguments) is total
    assert torch.equal(total, expected)


def symmetric(n: int, seed: int) -> Tensor:
    square = drawn(seed, n * n).view(n, n)
    return square + square.T


def dense(blocks: list[Tensor]) -> Tensor:
    return torch.block_diag(*blocks)


def test_kron_is_the_quadratic_form_of_the_kronecker_product() -> None:
    x, a, b = drawn(0, 35).view(5, 7), symmetric(7, 1), symmetric(5, 2)
    product, value = ops.kron(x, a, b)
    assert torch.equal(product, b @ x @ a)  # products of small dyadic numbers are exact in float32
    flat = x.reshape(-1).double()
    assert value.item() == float(flat @ torch.kron(b, a).double() @ flat)


@pytest.mark.parametrize("s", [1, 2, 3, 4, 7, 9])
def test_kron_of_blocks_is_that_of_their_diagonal(s: int) -> None:
    x = drawn(0, 56).view(8, 7)
    a = [symmetric(min(s, 7 - at), at) for at in range(0, 7, s)]
    b = [symmetric(min(s, 8 - at), at + 20) for at in range(0, 8, s)]
    expected = ops.kron(x, dense(a), dense(b))
    for found in (ops.kron(x, a, b, block=s), ops.kron(x, dense(a), b, block=s)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    if s in (1, 2, 4):
        assert torch.equal(ops.kron(x, a, torch.stack(b), block=s)[0], expected[0])


def test_kron_computes_in_the_widest_type() -> None:
    x, a, b = drawn(0, 6, torch.bfloat16).view(2, 3), symmetric(3, 1), symmetric(2, 2)
    assert [t.dtype for t in ops.kron(x, a, b)] == [torch.float32] * 2
    assert [t.dtype for t in ops.kron(x, a.double(), b)] == [torch.float64] * 2


OUTS: dict[str, tuple[Callable[..., Any], tuple[int, ...], torch.dtype]] = {
    "threshold": (lambda x, **o: ops.threshold(x, 0.3, **o), (), torch.float32),
    "topk_mask": (lambda x, **o: ops.topk_mask(x, 0.3, **o), (12, 12), torch.bool),
    "elect": (lambda x, **o: ops.elect([x, -x], **o), (12, 12), torch.int8),
    "combine": (lambda x, **o: ops.combine(None, [x, x], **o), (12, 12), torch.float32),
    "kron": (lambda x, **o: ops.kron(x, x.T.contiguous(), x.clone(), **o), (12, 12), torch.float32),
}


@pytest.mark.parametrize("name", OUTS)
def test_out_takes_the_result_and_is_returned(name: str) -> None:
    call, shape, dtype = OUTS[name]
    x = drawn(6, 144, make=normal_values).view(12, 12)
    expected = call(x)
    out = torch.full(shape, 1, dtype=dtype)
    found = call(x, out=out)
    if name == "kron":
        found, expected = found[0], expected[0]
    assert found is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", OUTS)
def test_out_that_does_not_fit_is_named(name: str) -> None:
    call, shape, dtype = OUTS[name]
    x = drawn(6, 144).view(12, 12)
    other = {torch.float32: torch.int8, torch.bool: torch.uint8, torch.int8: torch.bool}[dtype]
    with pytest.raises(DTypeError, match=r"out has dtype .*expected"):
        call(x, out=torch.ones(shape, dtype=other))
    with pytest.raises(ShapeError, match=r"out has shape \[3\]"):
        call(x, out=torch.ones(3, dtype=dtype))
    if shape:
        wide = torch.ones(12, 24, dtype=dtype)[:, ::2]
        with pytest.raises(LayoutError, match="not contiguous"):
            call(x, out=wide)


@pytest.mark.parametrize("name", ["combine", "kron", "score"])
def test_out_must_not_overlap_an_input_in_part(name: str) -> None:
    buffer = drawn(7, 150)
    x, out = buffer[:144].view(12, 12), buffer[6:].view(12, 12)
    calls = {"score": lambda x, **o: ops.score(x, kind="square", **o)} | {k: v[0] for k, v in OUTS.items()}
    with pytest.raises(LayoutError, match="overlaps"):
        calls[name](x, out=out)


def test_scores_may_not_be_their_own_output() -> None:
    x = drawn(1)
    with pytest.raises(LayoutError, match="overlaps"):
        ops.score(x, kind="square", out=x)
    score = drawn(2)
    with pytest.raises(LayoutError, match="overlaps"):
        ops.combine(None, [x], Program(keep=Keep.SCORE), scores=[score], out=score)


X = torch.ones(4, 6)
BAD: dict[str, tuple[Callable[[], Any], type[TvfastError], str]] = {
    "density above 1": (lambda: ops.threshold(X, 1.5), ArgumentError, r"density is 1\.5.*\[0, 1\]"),
    "density NaN": (lambda: ops.topk_mask(X, math.nan), ArgumentError, "density is nan"),
    "density text": (lambda: ops.topk_mask(X, "0.5"), ArgumentError, "density is '0.5'"),  # type: ignore[arg-type]
    "tie": (lambda: ops.topk_mask(X, 0.5, tie="hush"), UnknownNameError, "Did you mean 'hash'"),
    "vote": (lambda: ops.elect([X], vote="votes"), UnknownNameError, "vote is 'votes'"),
    "zero sign": (lambda: ops.elect([X], zero_sign="zero"), UnknownNameError, "zero_sign"),
    "kind": (lambda: ops.score(X, X, kind="squared"), UnknownNameError, "Did you mean 'square'"),
    "empty list": (lambda: ops.elect([]), ArgumentError, "deltas is empty"),
    "not a tensor": (lambda: ops.elect([X, [1.0]]), ArgumentError, r"deltas\[1\] is a list"),  # type: ignore[list-item]
    "scalar stack": (lambda: ops.elect(torch.tensor(1.0)), ShapeError, r"shape \[\]"),
    "bases": (lambda: ops.threshold([X, X], 0.5, base=[X]), ArgumentError, "base has 1 tensors for 2"),
    "base shape": (lambda: ops.threshold(X, 0.5, base=X[:3]), ShapeError, r"\[4, 6\], base has \[3, 6\]"),
    "model shape": (lambda: ops.combine(X, [X, X.view(6, 4)]), ShapeError, r"models\[1\] has shape \[6, 4\]"),
    "integers": (lambda: ops.combine(None, [X.int()]), DTypeError, "int32"),
    "strides": (lambda: ops.measure(None, [X.T]), LayoutError, r"models\[0\] is not contiguous"),
    "weights": (lambda: ops.elect([X, X], weights=[1.0]), ArgumentError, "weights has 1 values for 2 models"),
    "weight text": (lambda: ops.elect([X], weights="a"), ArgumentError, r"weights\[0\] is 'a'"),  # type: ignore[arg-type]
    "no sequence": (
        lambda: ops.threshold(None, 0.5),
        ArgumentError,
        "tensor is a NoneType; expected tensors",
    ),  # type: ignore[arg-type]
    "threads": (lambda: ops.threshold(X, 0.5, n_threads=-1), ArgumentError, "n_threads is -1"),
    "threads of combine": (lambda: ops.combine(X, [X], n_threads=2**31), ArgumentError, "n_threads is 2147"),
    "program": (lambda: ops.combine(X, [X], "ties"), ArgumentError, "program is a str; expected Program"),  # type: ignore[arg-type]
    "scalars list": (lambda: ops.combine(X, [X], scalars=[1.0]), ArgumentError, "scalars is a list"),  # type: ignore[arg-type]
    "limit": (
        lambda: ops.combine(X, [X], scalars=TensorScalars(models=[ModelScalars(limit=-1)])),
        ArgumentError,
        r"models\[0\]\.limit is -1; expected an integer in",
    ),
    "key": (
        lambda: ops.combine(X, [X], scalars=TensorScalars(models=[ModelScalars(key=2**64)])),
        ArgumentError,
        r"models\[0\]\.key is 18446744073709551616",
    ),
    "wants": (lambda: ops.measure(X, [X], "gram"), ArgumentError, "wants is a str; expected int"),  # type: ignore[arg-type]
    "measure out": (lambda: ops.measure(X, [X], out=X), ArgumentError, "out is a Tensor; expected Moments"),  # type: ignore[arg-type]
    "offset size": (
        lambda: ops.combine(X, [X], offset=2**63),
        ArgumentError,
        "offset is 9223372036854775808",
    ),
    "seed": (lambda: ops.topk_mask(X, 0.5, seed=1.5), ArgumentError, "seed is 1.5; expected an integer"),  # type: ignore[arg-type]
    "name": (lambda: ops.topk_mask(X, 0.5, name=3), ArgumentError, "name is a int; expected str"),  # type: ignore[arg-type]
    "infinite weight": (lambda: ops.elect([X], weights=[math.inf]), ArgumentError, r"weights\[0\] is inf"),
    "scalars": (
        lambda: ops.combine(None, [X, X], scalars=TensorScalars(models=[ModelScalars()])),
        ArgumentError,
        "scalars.models has 1 entries for 2 models",
    ),
    "NaN scale": (
        lambda: ops.combine(None, [X], scalars=TensorScalars(models=[ModelScalars()], scale=math.nan)),
        ArgumentError,
        "scalars.scale is nan",
    ),
    "large weight": (
        lambda: ops.combine(None, [X], scalars=TensorScalars(models=[ModelScalars(weight=1e39)])),
        ArgumentError,
        "weight is 1e.39; expected a finite number that float32 holds",
    ),
    "NaN band": (
        lambda: ops.combine(None, [X], scalars=TensorScalars(models=[ModelScalars(lo=math.nan)])),
        ArgumentError,
        r"models\[0\]\.lo is nan",
    ),
    "no scores": (lambda: ops.combine(None, [X], Program(keep=Keep.SCORE)), ArgumentError, "reads scores"),
    "no masks": (
        lambda: ops.measure(None, [X], program=Program(keep=Keep.MASK)),
        ArgumentError,
        "reads masks",
    ),
    "mask count": (
        lambda: ops.combine(None, [X, X], masks=[X > 0]),
        ArgumentError,
        "masks has 1 tensors for 2",
    ),
    "mask dtype": (lambda: ops.combine(None, [X], masks=[X]), DTypeError, r"masks\[0\] has dtype float32"),
    "score shape": (
        lambda: ops.combine(None, [X], scores=[X[0]]),
        ShapeError,
        r"scores\[0\] has shape \[6\]",
    ),
    "offset": (lambda: ops.combine(None, [X], offset=-1), ArgumentError, "offset is -1"),
    "row": (lambda: ops.combine(None, [X], row=True), ArgumentError, "row is True"),
    "no weight": (lambda: ops.score(X), ArgumentError, "reads weight"),
    "no base": (lambda: ops.score(X, X, kind="delta"), ArgumentError, "reads base"),
    "base unread": (lambda: ops.score(X, X, base=X), ArgumentError, "does not read base"),
    "score dtype": (lambda: ops.score(X, X.double()), DTypeError, "weight has dtype"),
    "kron vector": (lambda: ops.kron(X[0], X, X), ShapeError, r"x has shape \[6\]"),
    "kron factor": (
        lambda: ops.kron(X, torch.ones(4, 4), torch.ones(4, 4)),
        ShapeError,
        r"a has shape \[4, 4\].*\[6, 6\]",
    ),
    "kron no block": (lambda: ops.kron(X, [X], torch.ones(4, 4)), ArgumentError, "block is None"),
    "kron block": (lambda: ops.kron(X, [X], torch.ones(4, 4), block=0), ArgumentError, "block is 0"),
    "kron blocks": (
        lambda: ops.kron(X, [torch.ones(3, 3)], torch.ones(4, 4), block=3),
        ShapeError,
        r"a has 1 blocks.*expected 2: \[3, 3\] each",
    ),
    "kron integers": (lambda: ops.kron(X.int(), torch.ones(6, 6), torch.ones(4, 4)), DTypeError, "int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError)


def test_the_package_is_lazy_and_complete() -> None:
    code = "import sys, tvfast.ops as o; print('torch' in sys.modules, sorted(o.__all__) == o.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
    assert set(ops.__all__) <= set(dir(ops))
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        _ = ops.merge
