"""The penalty against explicit Kronecker products and finite differences, and how tasks are added up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.curvature.networks import features, network, tokens
from tvfast.curvature import Curvature, Gaussian, KroneckerPenalty, Statistics, Tasks, collect
from tvfast.errors import ArgumentError, ShapeError, StatisticsError

ALL = ("linear", "norm", "embedding")
SIZES = (6, 9, 12)


def statistics(**settings: Any) -> list[Statistics]:
    """Of three tasks with different numbers of samples."""
    found: dict[str, Any] = {"storage": "F64", "vectors": ["cls"], "kinds": ALL, **settings}
    return [collect(network(), Gaussian(features, seed=n), [tokens(n)], **found) for n in SIZES]


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                parameter.dtype
            )
    return other


def deltas(base: nn.Module, model: nn.Module, curvature: Curvature) -> Tensor:
    """X of a parameter, [o, i (+ 1)]; of a vector [1, n]."""
    old, new = dict(base.named_parameters()), dict(model.named_parameters())
    x = curvature.matrix((new[curvature.parameter] - old[curvature.parameter]).detach())
    if curvature.bias is not None:
        x = torch.cat([x, (new[curvature.bias] - old[curvature.bias]).detach()[:, None]], 1)
    return x


def explicit(base: nn.Module, model: nn.Module, terms: list[tuple[float, Curvature]]) -> float:
    """Σ weight · vec(X)ᵀ (B (x) A) vec(X), with the Kronecker product written out."""
    total = 0.0
    for weight, one in terms:
        x = deltas(base, model, one).reshape(-1)
        if one.block is not None:
            total += weight * float(x @ one.block.dense() @ x)
        else:
            assert one.a is not None
            assert one.b is not None
            total += weight * float(x @ torch.kron(one.b.dense(), one.a.dense()) @ x)
    return total


def read(found: Statistics, name: str) -> Curvature:
    return found.read(name, torch.float64)


@pytest.mark.parametrize("form", ["dense", "block", "root"])
@pytest.mark.parametrize("convention", ["tak", "mats"])
def test_value_is_the_explicit_kronecker_form(form: str, convention: str) -> None:
    """Odd sides, bias columns, blocks of 4 that do not divide 5, 6 and 7."""
    found = statistics(form=form, block=4, rank=100, convention=convention)[0]
    base = network()
    model = moved(base)
    penalty = KroneckerPenalty(found, base, scale=2.5, dtype=torch.float64)
    expected = explicit(base, model, [(2.5, read(found, name)) for name in found])
    assert float(penalty.value(model)) == pytest.approx(expected, rel=1e-10)
    assert float(penalty.value(base)) == 0.0


@pytest.mark.parametrize("form", ["dense", "block", "root"])
@pytest.mark.parametrize("accumulate", ["paper", "weighted", "ideal"])
@pytest.mark.parametrize("without", [None, 1])
def test_gradient_is_that_of_finite_differences(form: str, accumulate: str, without: int | None) -> None:
    base = network()
    model = moved(base)
    scales = {"norm.*": 10.0, "cls": 10.0, "out.*": 0.1}
    penalty = KroneckerPenalty(
        statistics(form=form, block=4, rank=100), base, scale=3.0, scales=scales, accumulate=accumulate,
        without=without, dtype=torch.float64,
    )  # fmt: skip
    value = penalty.add_gradients(model)
    torch.testing.assert_close(value, penalty.value(model), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn_like(parameter)

        def at(step: float, name: str = name, direction: Tensor = direction) -> Tensor:
            here = {n: p.detach() for n, p in model.named_parameters()}
            return penalty.value({**here, name: here[name] + step * direction})

        numerical = float(at(1e-4) - at(-1e-4)) / 2e-4  # exact for a quadratic, but for rounding
        assert float((parameter.grad * direction).sum()) == pytest.approx(numerical, rel=1e-6, abs=1e-9)


class Conv1D(nn.Module):
    """As in GPT-2: the weight is [i, o]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("form", ["dense", "block", "root"])
@pytest.mark.parametrize("layer", [nn.Linear(150, 200, bias=False), Conv1D(150, 200)])
def test_a_gradient_is_added_while_it_is_multiplied(form: str, layer: nn.Module) -> None:
    """Of a matrix without a bias; no second matrix of its size is there beside X."""
    x = torch.randn(30, 150, generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = torch.tanh(model(batch)).square().sum(1)
        return found

    found = collect(layer, loss, [x], form=form, block=64, rank=16, storage="F64")
    model = moved(layer)
    one = read(found, "weight")
    assert one.a is not None
    assert one.b is not None
    exact = deltas(copy.deepcopy(layer).double(), copy.deepcopy(model).double(), one)
    product = one.b.left(one.a.right(exact))
    weight = dict(model.named_parameters())["weight"]
    weight.grad = torch.ones_like(weight)
    penalty = KroneckerPenalty(found, layer, scale=3.0)
    with Largest() as made:
        value = penalty.add_gradients(model)
    expected = 1.0 + 6.0 * (product.T if one.transposed else product)
    assert float((weight.grad - expected).norm()) < 1e-6 * float(expected.norm())
    assert float(value) == pytest.approx(3.0 * float((exact * product).sum()), rel=1e-5)
    assert sum(torch.Size(shape).numel() == 150 * 200 for shape in made.shapes) <= 1


def test_autograd_gives_the_same_gradient() -> None:
    base = network()
    left, right = moved(base), moved(base)
    penalty = KroneckerPenalty(statistics(), base, scale=3.0, dtype=torch.float64)
    penalty.add_gradients(left)
    term = penalty(right)
    (2.0 * term).backward()
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(2.0 * one.grad, other.grad, rtol=1e-12, atol=1e-15)
    with pytest.raises(ArgumentError, match="differentiated twice"):
        term.backward()


def test_gradients_are_added_once_per_step() -> None:
    """Micro-batches accumulate in `.grad`; the penalty is added in place, where it is wanted."""
    base = network()
    model = moved(base)
    penalty = KroneckerPenalty(statistics(), base, dtype=torch.float64)
    alone = moved(base)
    penalty.add_gradients(alone)
    model.q.weight.requires_grad_(False)
    loss = [features(model, tokens(n)).square().mean() for n in SIZES]
    for one in loss:
        one.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    places = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.grad is not None}
    penalty.add_gradients(model, loss_scale=4.0)
    assert model.q.weight.grad is None
    for name, parameter in model.named_parameters():
        if name != "q.weight":
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == places[name]
            expected = before[name] + 4.0 * dict(alone.named_parameters())[name].grad
            torch.testing.assert_close(parameter.grad, expected)


def test_parameters_may_be_the_task_vector() -> None:
    """As where a linearised model is trained: θ is the task vector, and there is no base."""
    base = network()
    model = moved(base)
    found = statistics()[0]
    tau = {n: p.detach() - dict(base.named_parameters())[n].detach() for n, p in model.named_parameters()}
    one = KroneckerPenalty(found, None, dtype=torch.float64).value(tau)
    other = KroneckerPenalty(found, base, dtype=torch.float64).value(model)
    torch.testing.assert_close(one, other)


def test_the_base_is_a_copy() -> None:
    """A penalty on the very module that is trained does not follow it."""
    model = network()
    penalty = KroneckerPenalty(statistics()[0], model.state_dict(), dtype=torch.float64)
    with torch.no_grad():
        model.q.weight += 1.0
    assert float(penalty.value(model)) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_rounded_once(dtype: torch.dtype) -> None:
    base = network().to(dtype)
    model = moved(base)
    exact = moved(base).double()
    found = statistics()[0]
    KroneckerPenalty(found, base, dtype=torch.float64).add_gradients(exact)
    for name, parameter in exact.named_parameters():
        dict(model.named_parameters())[name].grad = torch.ones_like(parameter, dtype=dtype)
    value = KroneckerPenalty(found, base).add_gradients(model)
    assert value.dtype == torch.float64
    for name, parameter in model.named_parameters():
        expected = (dict(exact.named_parameters())[name].grad + 1.0).to(dtype)
        torch.testing.assert_close(parameter.grad, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_factors_may_be_bfloat16() -> None:
    base = network().float()
    model = moved(base)
    found = statistics()[0]
    exact = float(KroneckerPenalty(found, base).value(model))
    assert float(KroneckerPenalty(found, base, dtype=torch.bfloat16).value(model)) == pytest.approx(
        exact, rel=0.02
    )


def test_wrappers_do_not_hide_parameters() -> None:
    base = network()
    model = moved(base)
    wrapped = nn.Module()
    wrapped.module = model
    penalty = KroneckerPenalty(statistics()[0], base, dtype=torch.float64)
    torch.testing.assert_close(penalty.value(wrapped), penalty.value(model))
    penalty.add_gradients(wrapped)
    assert model.q.weight.grad is not None


# -- tasks -------------------------------------------------------------------------------------------


def test_modes_are_their_formulas() -> None:
    """λ_s = n_s / N: the paper weighs A only, so its B is a sum; "ideal" is a sum of Kronecker products."""
    found = statistics()
    base = network()
    model = moved(base)
    share = [n / sum(SIZES) for n in SIZES]
    for accumulate in ("paper", "weighted", "ideal"):
        terms: list[tuple[float, Curvature]] = []
        for name in found[0]:
            ones = [read(one, name) for one in found]
            if accumulate == "ideal":
                terms += list(zip(share, ones, strict=True))
                continue

            def added(role: str, weights: list[float], ones: list[Curvature] = ones) -> Any:
                factors = [getattr(one, role) for one in ones]
                if factors[0] is None:
                    return None
                scaled = [f.scaled(w) for f, w in zip(factors, weights, strict=True)]
                return scaled[0].plus(scaled[1]).plus(scaled[2])

            b = added("b", [1.0] * 3 if accumulate == "paper" else share)
            both = ones[0].replaced(a=added("a", share), b=b, block=added("block", share))
            terms.append((1.0, both))
        penalty = KroneckerPenalty(found, base, accumulate=accumulate, dtype=torch.float64)
        assert float(penalty.value(model)) == pytest.approx(explicit(base, model, terms), rel=1e-9)


def test_the_scale_does_not_carry_over_between_modes() -> None:
    """The paper's sum of T equal tasks is T times the ideal one for matrices, and equal to it for vectors."""
    one = statistics()[0]
    base = network()
    model = moved(base)

    def value(accumulate: str, layers: str) -> float:
        scales = {layers: 1.0, "*": 0.0}
        penalty = KroneckerPenalty([one] * 4, base, accumulate=accumulate, scales=scales, dtype=torch.float64)
        return float(penalty.value(model))

    assert value("paper", "q.weight") == pytest.approx(4 * value("ideal", "q.weight"))
    assert value("weighted", "q.weight") == pytest.approx(value("ideal", "q.weight"))
    assert value("paper", "norm.weight") == pytest.approx(value("ideal", "norm.weight"))


def test_error_of_the_weighted_surrogate_is_the_covariance() -> None:
    """Σ λ_s B_s (x) A_s - B̄ (x) Ā = Σ λ_s (B_s - B̄) (x) (A_s - Ā)."""
    found = statistics()
    share = [n / sum(SIZES) for n in SIZES]
    (mean,) = Tasks(found, "weighted").terms("q.weight")
    assert mean.a is not None
    assert mean.b is not None
    ideal = torch.zeros(49, 49, dtype=torch.float64)
    covariance = torch.zeros(49, 49, dtype=torch.float64)
    for weight, one in zip(share, [read(f, "q.weight") for f in found], strict=True):
        a, b = (f.dense() for f in one.factors)
        ideal += weight * torch.kron(b, a)
        covariance += weight * torch.kron(b - mean.b.dense(), a - mean.a.dense())
    torch.testing.assert_close(
        ideal - torch.kron(mean.b.dense(), mean.a.dense()), covariance, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("form", ["dense", "block", "root"])
@pytest.mark.parametrize("accumulate", ["paper", "weighted", "ideal"])
def test_leaving_one_out_is_the_sum_of_the_others(form: str, accumulate: str) -> None:
    found = statistics(form=form, block=4, rank=100)
    tasks = Tasks(found, accumulate)
    for k in range(3):
        others = Tasks([one for j, one in enumerate(found) if j != k], accumulate)
        for name in tasks.names():
            for left, right in zip(tasks.terms(name, k), others.terms(name), strict=True):
                assert left.n_samples == right.n_samples
                for one, other in zip(left.factors, right.factors, strict=True):
                    torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-10, atol=1e-13)


def test_leaving_out_reads_each_task_twice_whatever_their_number() -> None:
    """Constant cost: with the sums kept, each of T leave-one-outs reads one task more."""
    reads: list[int] = []

    class Counted(dict[str, Curvature]):
        def __getitem__(self, name: str) -> Curvature:
            reads.append(1)
            return super().__getitem__(name)

    one = statistics()[0]
    tasks = Tasks([Counted({"q.weight": read(one, "q.weight")}) for _ in range(8)], "weighted")
    for k in range(8):
        tasks.terms("q.weight", k)
    assert len(reads) == 16


# -- memory and errors -------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Shapes of everything that is made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(one.shape))
        return out


@pytest.mark.parametrize("form", ["dense", "block", "root"])
def test_nothing_of_the_size_of_a_factor_is_made(form: str) -> None:
    """A layer of 40 outputs and 3 inputs: nothing [40, 40], nothing larger than X."""
    layer = nn.Linear(3, 40)
    x = torch.randn(20, 3)
    found = collect(layer, lambda m, b: m(b).square().sum(1), [x], form=form, block=16, rank=4)
    penalty = KroneckerPenalty(found, layer, scale=1.0)
    model = moved(layer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Largest() as made:
        penalty.add_gradients(model)
    assert all(torch.Size(shape).numel() <= 40 * 4 for shape in made.shapes), made.shapes


def test_bad_input_is_named(tmp_path: Path) -> None:
    base = network()
    found = statistics()
    for error, match, call in (
        (ArgumentError, "accumulate is 'x'", lambda: KroneckerPenalty(found, base, accumulate="x")),
        (ArgumentError, "stats is empty", lambda: KroneckerPenalty([], base)),
        (ArgumentError, "without is 3", lambda: KroneckerPenalty(found, base, without=3)),
        (ArgumentError, "leaves no task", lambda: KroneckerPenalty(found[:1], base, without=0)),
        (ArgumentError, "dtype is torch.int8", lambda: KroneckerPenalty(found, base, dtype=torch.int8)),
        (ArgumentError, "scale is -1", lambda: KroneckerPenalty(found, base, scale=-1.0)),
        (ArgumentError, "stats\\[0\\] is a int", lambda: KroneckerPenalty([3], base)),  # type: ignore[list-item]
        (StatisticsError, "no-such", lambda: KroneckerPenalty(tmp_path / "no-such", base)),
        (
            StatisticsError,
            "'embed.weight' has curvature, and base has no",
            lambda: KroneckerPenalty(found, {}),
        ),
    ):
        with pytest.raises(error, match=match):
            call()  # type: ignore[no-untyped-call]
    fewer = collect(network(), Gaussian(features), [tokens(3)], layers=["q.weight"])
    with pytest.raises(StatisticsError, match="tasks have different parameters"):
        KroneckerPenalty([found[0], fewer], base)
    grams = collect(network(), lambda m, b: m(b), [tokens(3)], convention="regmean")
    with pytest.raises(StatisticsError, match=r"has no B: .* convention 'regmean'"):
        KroneckerPenalty(grams, base)
    other = network()
    other.q = nn.Linear(6, 8).double()
    with pytest.raises(
        ShapeError, match=r"'q.weight': base has shape \[8, 6\], the statistics have \[7, 6\]"
    ):
        KroneckerPenalty(fewer, other)
    penalty = KroneckerPenalty(fewer, base)
    with pytest.raises(StatisticsError, match="the model has no such parameter"):
        penalty.value({})
    with pytest.raises(ShapeError, match="the model has shape"):
        penalty.add_gradients(other)
    assert penalty.parameters == ("q.weight", "q.bias")
