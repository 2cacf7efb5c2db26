"""Methods that know their tensors by dot products alone, against loops over whole tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tvfast
from tests.methods import spheres
from tests.methods.inputs import bound, exact_bits, normal
from tvfast.errors import ArgumentError, MergeError
from tvfast.methods import span

SPREADS = (1.0, 0.1, 1e-3)  # of the models about their mean: orthogonal, apart, near


def family(spread: float, n: int, *shape: int) -> tuple[Tensor, list[Tensor]]:
    """A base and models with a common part of length 1 and their own of `spread`."""
    base, common = normal(*shape), normal(*shape, seed=1)
    return base, [base + common + spread * normal(*shape, seed=10 + k) for k in range(n)]


def close(out: Tensor, expected: Tensor, base: Tensor, models: Sequence[Tensor], more: float = 0.0) -> bool:
    """Within the roundings of a sum of float32 products, whose coefficients are rounded too, plus `more`."""
    return bool(((out.double() - expected).abs() <= 2 * bound(base, models, out) + more).all())


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 1.7], [1.0, -0.25], [0.5, -0.5]])
@pytest.mark.parametrize("task_vectors", [True, False])
def test_nuslerp(spread: float, weights: list[float], task_vectors: bool) -> None:
    base, models = family(spread, 2, 9, 11)
    out = tvfast.merge(base, models, method="nuslerp", weights=weights, task_vectors=task_vectors)
    t = 0.5 if sum(weights) == 0 else weights[1] / sum(weights)
    start = base.double() if task_vectors else torch.zeros_like(base, dtype=torch.float64)
    one, two = ((m - base).double() if task_vectors else m.double() for m in models)
    expected = start + spheres.slerp(t, one.reshape(-1), two.reshape(-1)).reshape(base.shape)
    assert close(out, expected, base, models)


@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("shape", [(9, 11), (30,), (4, 3, 5), (2, 3, 2, 2), (1, 7), (7, 1), ()])
@pytest.mark.parametrize("task_vectors", [True, False])
def test_nuslerp_of_rows(row_wise: bool, shape: tuple[int, ...], task_vectors: bool) -> None:
    base, models = family(0.5, 2, *shape)
    out = tvfast.merge(
        base,
        models,
        method="nuslerp",
        weights=[1, 3],
        task_vectors=task_vectors,
        nuslerp_flatten=False,
        nuslerp_row_wise=row_wise,
    )
    start = base.double() if task_vectors else torch.zeros_like(base, dtype=torch.float64)
    one, two = ((m - base).double() if task_vectors else m.double() for m in models)
    if shape == ():
        one, two = one.reshape(1), two.reshape(1)
    expected = start + spheres.slerp(0.75, one, two, dim=0 if row_wise else -1).reshape(shape)
    assert close(out, expected, base, models)


def test_nuslerp_of_parallel_models_is_a_line() -> None:
    base, model = normal(64), normal(64, seed=1)
    out = tvfast.merge(base, [model, 3 * model], method="nuslerp", task_vectors=False, weights=[1, 1])
    assert close(out, 2 * model.double(), base, [3 * model])
    out = tvfast.merge(base, [base, base], method="nuslerp")
    assert exact_bits(out, base)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("task_vectors", [True, False])
def test_multislerp(spread: float, n: int, task_vectors: bool) -> None:
    base, models = family(spread, n, 9, 11)
    weights = [1.0 + 0.5 * k for k in range(n)]
    out = tvfast.merge(base, models, method="multislerp", weights=weights, task_vectors=task_vectors)
    shares = [weight / sum(weights) for weight in weights]
    taus = [(m - base).double() if task_vectors else m.double() for m in models]
    found = taus[0] if n == 1 else spheres.multislerp(taus, shares)
    assert close(out, found + (base.double() if task_vectors else 0.0), base, models)


def test_multislerp_with_given_weights_and_eps() -> None:
    base, models = family(0.5, 3, 40)
    taus = [(m - base).double() for m in models]
    weights = [0.5, -0.25, 1.5]
    out = tvfast.merge(base, models, method="multislerp", weights=weights, normalize_weights=False, eps=0.125)
    assert close(out, base.double() + spheres.multislerp(taus, weights, 0.125), base, models)


def test_multislerp_of_directions_that_cancel() -> None:
    base, tau = normal(16), normal(16, seed=1)
    out = tvfast.merge(torch.zeros(16), [tau, -3 * tau], method="multislerp", weights=[1, 1])
    assert close(out, -tau.double(), base, [3 * tau])  # a line, as mergekit
    turned = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(MergeError, match=r"tensor 'w'.*cancel.*other weights"):
        tvfast.merge({"w": torch.zeros(2)}, [{"w": v} for v in turned], method="multislerp", eps=1e-6)
    assert exact_bits(tvfast.merge(base, [base] * 3, method="multislerp"), base)  # mergekit raises here


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("weights", [None, 0.5])
def test_karcher(spread: float, n: int, weights: float | None) -> None:
    base, models = family(spread, n, 9, 11)
    given = None if weights is None else [1 + weights * k for k in range(n)]
    out = tvfast.merge(base, models, method="karcher", weights=given)
    expected = models[0].double() if n == 1 else spheres.karcher(models, given or [1.0] * n)
    assert close(out, expected, base, models)


@pytest.mark.parametrize("max_iter", [0, 1, 2, 100])
def test_karcher_takes_the_steps_of_the_iteration(max_iter: int) -> None:
    models = [normal(50, seed=k) * (k + 1) for k in range(5)]
    out = tvfast.merge(models[0], models, method="karcher", max_iter=max_iter, tol=1e-9)
    expected = spheres.karcher(models, [1.0] * 5, max_iter, 1e-9)
    assert close(out, expected, models[0], models)


def test_karcher_without_directions() -> None:
    zero, model = torch.zeros(8), normal(8)
    assert tvfast.merge(zero, [zero, zero], method="karcher").tolist() == [0.0] * 8
    out = tvfast.merge(zero, [zero, model, model], method="karcher")
    assert close(out, 2 / 3 * model.double(), zero, [model])
    opposite = tvfast.merge(zero, [model, -model], method="karcher")  # no mean: the first direction
    assert close(opposite, model.double(), zero, [model])


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("n", [2, 3, 7])
def test_model_stock(spread: float, n: int) -> None:
    base, models = family(spread, n, 9, 11)
    out = tvfast.merge(base, models, method="model_stock")
    assert close(out, spheres.stock(base, models), base, models)


@pytest.mark.parametrize("shape", [(9, 11), (30,), (4, 3, 5), (2, 3, 2, 2), (1, 7), (7, 1), ()])
def test_model_stock_of_rows(shape: tuple[int, ...]) -> None:
    base, models = family(0.5, 3, *shape)
    out = tvfast.merge(base, models, method="model_stock", filter_wise=True)
    assert close(out, spheres.stock(base, models, rows=True), base, models)


def test_model_stock_keeps_the_base_where_models_oppose() -> None:
    base, tau = normal(12), normal(12, seed=1)
    models = [base + tau, base - tau]
    models[1] = base - (models[0] - base)
    assert exact_bits(tvfast.merge(base, models, method="model_stock"), base)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 0.25]])
def test_geometric_median(spread: float, weights: list[float] | None) -> None:
    base, models = family(spread, 4, 9, 11)
    models[3] = models[3] + 5.0
    out = tvfast.merge(base, models, method="geometric_median", weights=weights, max_iter=30)
    expected = spheres.geometric_median(models, weights or [1.0] * 4, 1e-6, 30)
    assert close(out, expected, base, models, 1e-7)


def test_geometric_median_of_equal_models_is_the_model() -> None:
    base, model = normal(33), normal(33, seed=1)
    out = tvfast.merge(base, [model] * 3, method="geometric_median")
    assert close(out, model.double(), base, [model])


@given(
    st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.floats(0.125, 4), min_size=5, max_size=5),
)
def test_a_karcher_mean_has_length_1_or_0(vectors: list[list[float]], weights: list[float]) -> None:
    x = torch.tensor(vectors, dtype=torch.float64)
    gram = (x @ x.T).tolist()
    point = span.karcher_mean(gram, weights[: len(vectors)], 10, 1e-5)
    length = span.norm(gram, point)
    assert length == pytest.approx(1.0, abs=1e-5) or not any(point)


@pytest.mark.parametrize(
    ("method", "n", "parameters", "message"),
    [
        ("karcher", 2, {"tol": 0.0}, "tol is 0.0; expected a number above 0"),
        ("karcher", 2, {"max_iter": 2.5}, "max_iter is 2.5; expected a whole number"),
        ("karcher", 2, {"weights": [1, -1]}, "sum to 0"),
        ("multislerp", 2, {"eps": -1.0}, "eps is -1.0"),
        ("multislerp", 2, {"weights": [1, -1]}, "sum to 0"),
        ("multislerp", 2, {"task_vectors": 1}, "task_vectors is 1; expected True or False"),
        ("model_stock", 1, {}, "got 1 models; expected at least 2"),
        ("model_stock", 2, {"weights": [1, 2]}, "does not take 'weights'"),
        ("nuslerp", 3, {}, "got 3 models; expected 2"),
        ("nuslerp", 2, {"nuslerp_flatten": 0.0}, "nuslerp_flatten is 0.0"),
        ("geometric_median", 2, {"weights": [1, -0.5]}, "numbers of 0 or more"),
        ("geometric_median", 2, {"eps": 0}, "eps is 0.0"),
    ],
)
def test_bad_numbers(method: str, n: int, parameters: dict[str, object], message: str) -> None:
    base = normal(4)
    with pytest.raises(ArgumentError, match=message):
        tvfast.merge(base, [base + k for k in range(n)], method=method, **parameters)
