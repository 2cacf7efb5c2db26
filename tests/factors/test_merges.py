"""RegMean and MaTS of one layer against explicit Kronecker systems, and what singular factors lead to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.factors.inputs import explicit, factor, moment
from tvfast.errors import ArgumentError, ShapeError, SolveError
from tvfast.factors import Dense, Diagonal
from tvfast.factors.conjugate import KroneckerSum, conjugate_gradients
from tvfast.factors.merges import mats, mats_batch, regmean, vector
from tvfast.factors.solving import solve

WEIGHTS = (1.0, 2.0, 0.5)
SHAPES = [(1, 1), (5, 7), (8, 3), (3, 11)]


def models(o: int, i: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(o * 100 + i)
    return [torch.randn(o, i, generator=generator, dtype=torch.float64) for _ in WEIGHTS]


def shrunk(matrix: Tensor, share: float) -> Tensor:
    return share * matrix + (1 - share) * torch.diag(matrix.diagonal())


@pytest.mark.parametrize("form", ["dense", "block", "diagonal", "root"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_regmean_is_the_closed_form(form: str, shape: tuple[int, int], share: float) -> None:
    o, i = shape
    found = models(o, i)
    hats = [shrunk(explicit(form, i, k), share) for k in range(3)]
    expected = torch.linalg.solve(
        sum(c * g for c, g in zip(WEIGHTS, hats, strict=True)),
        sum(c * g @ w.T for c, g, w in zip(WEIGHTS, hats, found, strict=True)),
    ).T
    grams = [factor(form, i, k) for k in range(3)]
    start = torch.zeros(o, i, dtype=torch.float64)
    solved = regmean(found, grams, start=start, coefficients=WEIGHTS, shrink=share)
    torch.testing.assert_close(solved.x, expected, rtol=1e-9, atol=1e-9)
    assert solved.note == ""
    residual = sum(c * (solved.x - w) @ g for c, w, g in zip(WEIGHTS, found, hats, strict=True))
    scale = sum(c * w @ g for c, w, g in zip(WEIGHTS, found, hats, strict=True))
    assert float(residual.norm()) < 1e-6 * float(scale.norm())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "forms", [("dense", "dense"), ("block", "dense"), ("diagonal", "block"), ("root", "root")]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_mats_solves_the_explicit_system(
    forms: tuple[str, str], shape: tuple[int, int], share: float
) -> None:
    o, i = shape
    found = models(o, i)
    big = [
        torch.kron(shrunk(explicit(forms[1], o, 10 + k), share), shrunk(explicit(forms[0], i, k), share))
        for k in range(3)
    ]
    rhs = sum(c * m @ w.reshape(-1) for c, m, w in zip(WEIGHTS, big, found, strict=True))
    expected = torch.linalg.solve(sum(c * m for c, m in zip(WEIGHTS, big, strict=True)), rhs).reshape(o, i)
    a = [factor(forms[0], i, k) for k in range(3)]
    b = [factor(forms[1], o, 10 + k) for k in range(3)]
    solved = mats(found, a, b, start=found[0], coefficients=WEIGHTS, shrink=share, iterations=500)
    torch.testing.assert_close(solved.x, expected, rtol=1e-6, atol=1e-6)
    residual = sum(c * m @ (solved.x - w).reshape(-1) for c, m, w in zip(WEIGHTS, big, found, strict=True))
    assert float(residual.norm()) < 1e-6 * float(rhs.norm())  # type: ignore[union-attr]


def test_regmean_is_mats_with_identities() -> None:
    found = models(5, 7)
    a = [factor("dense", 7, k) for k in range(3)]
    start = sum(found) / 3
    left = regmean(found, a, start=start, coefficients=WEIGHTS)
    for b in (
        [None] * 3,
        [Dense(torch.eye(5, dtype=torch.float64))] * 3,
        [Diagonal(torch.ones(5).double())] * 3,
    ):
        right = mats(found, a, b, start=start, coefficients=WEIGHTS)  # type: ignore[arg-type]
        torch.testing.assert_close(right.x, left.x, rtol=1e-8, atol=1e-8)


def test_one_model_and_equal_models_are_themselves() -> None:
    one = models(4, 6)[0]
    a, b = factor("dense", 6, 1), factor("dense", 4, 2)
    start = torch.zeros_like(one)
    for solved in (
        regmean([one], [a], start=start, coefficients=[3.0]),
        mats([one], [a], [b], start=start, coefficients=[3.0]),
        mats([one, one], [a, factor("dense", 6, 3)], [b, b], start=start, coefficients=[1.0, 1.0]),
    ):
        torch.testing.assert_close(solved.x, one, rtol=1e-8, atol=1e-8)


def test_ridge_pulls_to_the_start() -> None:
    found = models(4, 6)
    a = [factor("dense", 6, k) for k in range(3)]
    b = [factor("dense", 4, k + 9) for k in range(3)]
    start = torch.ones(4, 6, dtype=torch.float64)
    whole = sum(c * torch.kron(y.dense(), x.dense()) for c, x, y in zip(WEIGHTS, a, b, strict=True))
    rhs = sum(
        c * torch.kron(y.dense(), x.dense()) @ (w - start).reshape(-1)
        for c, x, y, w in zip(WEIGHTS, a, b, found, strict=True)
    )
    rho = 0.5 * whole.trace() / 24  # type: ignore[union-attr]
    expected = start + torch.linalg.solve(whole + rho * torch.eye(24).double(), rhs).reshape(4, 6)
    solved = mats(found, a, b, start=start, coefficients=WEIGHTS, ridge=0.5)
    torch.testing.assert_close(solved.x, expected, rtol=1e-8, atol=1e-8)
    far = mats(found, a, b, start=start, coefficients=WEIGHTS, ridge=1e9)
    torch.testing.assert_close(far.x, start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_a_batch_is_its_layers(ridge: float) -> None:
    layers = [models(4, 6), models(4, 6)[::-1], [m * 100 for m in models(4, 6)]]
    a = [[factor("dense", 6, 10 * n + k) for k in range(3)] for n in range(3)]
    b = [[factor("dense", 4, 50 + 10 * n + k) for k in range(3)] for n in range(3)]
    starts = [weights[0] for weights in layers]
    batch = mats_batch(layers, a, b, starts=starts, coefficients=WEIGHTS, ridge=ridge)
    for n, weights in enumerate(layers):
        alone = mats(weights, a[n], b[n], start=starts[n], coefficients=WEIGHTS, ridge=ridge)
        torch.testing.assert_close(batch.x[n], alone.x, rtol=1e-7, atol=1e-7)


def test_vector_with_full_blocks() -> None:
    found = [w[:1] for w in models(2, 7)]
    blocks = [factor("dense", 7, k) for k in range(3)]
    solved = vector(found, blocks, start=found[0], coefficients=WEIGHTS)
    residual = sum(c * (solved.x - w) @ f.dense() for c, w, f in zip(WEIGHTS, found, blocks, strict=True))
    assert float(residual.norm()) < 1e-10  # type: ignore[union-attr]


# -- what singular factors lead to -------------------------------------------------------------------


def test_dead_inputs_keep_the_start() -> None:
    """Columns that no input reaches take the start's, and nothing else changes."""
    found = models(3, 5)
    alive = [0, 2, 3]
    grams = []
    for k in range(3):
        gram = torch.zeros(5, 5, dtype=torch.float64)
        gram[[[r] for r in alive], alive] = moment(3, k)
        grams.append(Dense(gram))
    start = torch.full((3, 5), 7.0, dtype=torch.float64)
    solved = regmean(found, grams, start=start, coefficients=WEIGHTS)
    assert solved.note == ""
    assert torch.equal(solved.x[:, [1, 4]], start[:, [1, 4]])
    small = regmean(
        [w[:, alive] for w in found],
        [Dense(moment(3, k)) for k in range(3)],
        start=start[:, alive],
        coefficients=WEIGHTS,
    )
    torch.testing.assert_close(solved.x[:, alive], small.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_few_tokens_take_a_ridge_and_say_so(dtype: torch.dtype) -> None:
    found = [w.to(dtype) for w in models(3, 20)]
    grams = [Dense(moment(20, k, rank=4).to(dtype)) for k in range(3)]
    start = torch.zeros(3, 20, dtype=dtype)
    solved = regmean(found, grams, start=start, coefficients=WEIGHTS)
    assert "singular" in solved.note
    assert "ridge of" in solved.note
    residual = sum(c * (solved.x - w) @ g.matrix for c, w, g in zip(WEIGHTS, found, grams, strict=True))
    scale = sum(c * w @ g.matrix for c, w, g in zip(WEIGHTS, found, grams, strict=True))
    assert float(residual.norm() / scale.norm()) < 1e-4  # type: ignore[union-attr]
    # what no input sees is the start's: no null direction is filled with noise
    basis = torch.linalg.svd(sum(g.matrix.double() for g in grams))[2][12:]  # type: ignore[arg-type]
    # (but for the rounding of float32 sums, divided by the ridge)
    assert float((solved.x.double() @ basis.T).norm()) < (1e-2 if dtype is torch.float64 else 0.2)
    assert regmean(found, grams, start=start, coefficients=WEIGHTS, shrink=0.5).note == ""


def test_float32_falls_back_to_float64() -> None:
    scales = torch.logspace(0, -3.2, 16, dtype=torch.float64)
    gram = moment(16, 1) * scales * scales[:, None]
    solved = solve(Dense(gram), torch.randn(2, 16), "layer")
    assert solved.note == "solved in float64"
    assert solved.residual < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_factors_are_named(bad: float) -> None:
    gram = moment(4, 1)
    gram[0, 0] = bad
    weight = torch.zeros(2, 4).double()
    with pytest.raises(SolveError, match=r"encoder\.3: the factors hold NaN or infinity"):
        regmean([weight], [Dense(gram)], start=weight, coefficients=[1.0], where="encoder.3")
    with pytest.raises(SolveError, match="the factors hold NaN or infinity"):
        mats([weight], [Dense(gram)], [None], start=weight, coefficients=[1.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_models_are_not_blamed_on_factors(bad: float) -> None:
    gram, start = Dense(moment(4, 1)), torch.zeros(2, 4).double()
    weight = torch.full((2, 4), bad).double()
    with pytest.raises(SolveError, match=r"encoder\.3: a model's weights hold NaN or infinity"):
        regmean([weight], [gram], start=start, coefficients=[1.0], where="encoder.3")
    with pytest.raises(SolveError, match="a model's weights hold NaN or infinity"):
        mats([weight], [gram], [Dense(moment(2, 1))], start=start, coefficients=[1.0])


def test_zero_and_indefinite_factors_are_named() -> None:
    weight = torch.ones(2, 4).double()
    for zero in (Dense(torch.zeros(4, 4).double()), Diagonal(torch.zeros(4).double())):
        with pytest.raises(SolveError, match="layer 7: the matrix is zero"):
            regmean([weight], [zero], start=weight, coefficients=[1.0], where="layer 7")
    indefinite = Dense(torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0])).double())
    with pytest.raises(SolveError, match=r"layer 7: .*side 4 is singular or indefinite"):
        regmean([weight], [indefinite], start=0 * weight, coefficients=[1.0], where="layer 7")
    with pytest.raises(SolveError, match="layer 7: A, of side 4, is indefinite"):
        mats([weight], [indefinite], [None], start=0 * weight, coefficients=[1.0], where="layer 7")


def test_iterations_that_end_first_are_noted() -> None:
    a = [Dense(moment(12, k, rank=13)) for k in range(3)]
    b = [Dense(moment(10, k + 5, rank=11)) for k in range(3)]
    rhs = torch.randn(10, 12, dtype=torch.float64)
    system = KroneckerSum(a, b, WEIGHTS)
    short = conjugate_gradients(system, rhs, "layer", iterations=2)
    assert "after 2 iterations" in short.note
    whole = conjugate_gradients(system, rhs, "layer", iterations=2000)
    assert whole.note == ""
    torch.testing.assert_close(system.apply(whole.x), rhs, rtol=1e-6, atol=1e-6)


def test_preconditioned_iterations_are_fewer_than_plain_ones() -> None:
    """Badly scaled factors that are alike: the preconditioner is almost the inverse."""
    scale = torch.logspace(0, -2, 12, dtype=torch.float64)
    a = [Dense(moment(12, k, rank=400) * scale * scale[:, None]) for k in range(3)]
    b = [Dense(moment(12, k + 5, rank=400) * scale * scale[:, None]) for k in range(3)]
    rhs = torch.randn(12, 12, dtype=torch.float64)
    assert conjugate_gradients(KroneckerSum(a, b, WEIGHTS), rhs, "layer", iterations=40).residual < 1e-9


@pytest.mark.parametrize("forms", [("dense", "dense"), ("block", "dense"), ("diagonal", "root")])
def test_two_models_take_a_few_iterations(forms: tuple[str, str]) -> None:
    """However different they are: both are diagonal in one basis, but for the damping."""
    a = [factor(forms[0], 11, k) for k in range(2)]
    b = [factor(forms[1], 9, k + 5) for k in range(2)]
    rhs = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for coefficients in ((1.0, 1.0), (1.0, 0.01)):
        solved = conjugate_gradients(KroneckerSum(a, b, coefficients), rhs, "layer", iterations=6)
        assert solved.residual < 1e-9
        assert solved.note == ""


def test_plain_iterations_leave_small_curvature_at_the_start() -> None:
    """As MaTS of its authors does; with the preconditioner the equations are solved there, too."""
    found = [w[:1] for w in models(2, 8)[:2]]
    small = 1e-6 * torch.arange(1.0, 8.0, dtype=torch.float64)
    large = torch.ones(1, dtype=torch.float64)
    a = [Dense(torch.diag(torch.cat(one))) for one in ((large, small), (3.0 * large, small.flip(0)))]
    start = (found[0] + found[1]) / 2
    exact = (found[0] @ a[0].matrix + found[1] @ a[1].matrix) / (a[0].diagonal() + a[1].diagonal())
    common: dict[str, Any] = {"start": start, "coefficients": (1.0, 1.0), "iterations": 6, "tolerance": 1e-9}
    plain = mats(found, a, [None, None], preconditioned=False, **(common | {"tolerance": 1e-5}))
    torch.testing.assert_close(plain.x[:, :1], exact[:, :1])
    moved, far = (float((x - start)[:, 1:].norm()) for x in (plain.x, exact))
    assert moved < 1e-3 * far
    assert plain.note == ""
    torch.testing.assert_close(mats(found, a, [None, None], **common).x, exact, rtol=1e-3, atol=1e-3)


def test_factors_of_another_model_are_refused() -> None:
    weight = torch.zeros(2, 4)
    with pytest.raises(
        ShapeError, match=r"models\[0\] has a weight of shape \[2, 4\] and a factor of side 3"
    ):
        regmean([weight], [Dense(torch.eye(3))], start=weight, coefficients=[1.0])
    with pytest.raises(ShapeError, match="expected 2"):
        mats([weight], [Dense(torch.eye(4))], [Dense(torch.eye(4))], start=weight, coefficients=[1.0])
    with pytest.raises(ArgumentError, match="1 factors for 2 models"):
        regmean([weight, weight], [Dense(torch.eye(4))], start=weight, coefficients=[1.0, 1.0])
