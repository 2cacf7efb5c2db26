"""Masks of tasks: consensus, and one model per task."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tvfast
from tests.methods.inputs import exact_bits, grid, normal
from tvfast.errors import ArgumentError, ShapeError, StateDictError, UnknownNameError


def family(n: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = {"a": grid(13, 17), "b": 4 * grid(41, seed=1), "steps": torch.tensor([3])}
    models = [
        {
            "a": base["a"] + grid(13, 17, seed=5 + k),
            "b": base["b"] + grid(41, seed=9 + k),
            "steps": base["steps"],
        }
        for k in range(n)
    ]
    return base, models


def taus_of(base: dict[str, Tensor], models: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([(model[name] - base[name]).double() for model in models])


@pytest.mark.parametrize("agree", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.4, [0.2, 0.5, 1.0]])
def test_consensus(agree: int, threshold: float | list[float]) -> None:
    base, models = family()
    out = tvfast.merge(base, models, method="consensus", agree=agree, threshold=threshold, scale=0.5)
    for name in ("a", "b"):
        taus = taus_of(base, models, name)
        total = taus.sum(dim=0)
        limits = torch.tensor(threshold).double().expand(3).reshape(3, *[1] * base[name].dim())
        needed = (taus.abs() > limits * (total - taus).abs()).sum(dim=0) >= agree
        assert torch.equal(out[name].double(), base[name] + 0.5 * total * needed)


def test_consensus_of_all_is_task_arithmetic() -> None:
    base, models = normal(20), [normal(20, seed=k + 1) for k in range(3)]
    out = tvfast.merge(base, models, method="consensus", threshold=0.0, agree=1)
    assert exact_bits(out, tvfast.merge(base, models, method="task_arithmetic"))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_pcb(ratio: float) -> None:
    base, weights = normal(40, 25), [1.0, 0.5, 2.0]
    models = [base + normal(40, 25, seed=k + 1) for k in range(3)]
    out = tvfast.merge(base, models, method="pcb", ratio=ratio, outliers=0.01, weights=weights, scale=1.2)
    taus = torch.stack([(m - base).double().reshape(-1) for m in models])
    clamped = torch.empty_like(taus)
    for row, tau in zip(clamped, taus, strict=True):
        ranked = tau.abs().sort().values
        row[:] = tau.sign() * tau.abs().clamp(ranked[10], ranked[989])

    def unit(x: Tensor) -> Tensor:
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        return (x - low) / (high - low)

    scores = torch.exp(3 * unit(clamped.abs()) ** 2) * torch.tanh(clamped * clamped.sum(dim=0))
    least = scores.sort(dim=1).values[:, [min(999, int(1000 * (1 - ratio)))]]
    shares = unit(torch.maximum(scores, least))
    by = torch.tensor(weights).double()[:, None]
    change = (by * clamped * shares).sum(dim=0) / shares.sum(dim=0).clamp(min=1e-12)
    expected = base.double() + 1.2 * change.view(40, 25)
    assert torch.allclose(out.double(), expected, atol=1e-4)  # a share of 1e-7 / 1e-7 is nearly open
    assert bool((expected != base).any())


@pytest.mark.parametrize("rescale", ["tensors", "entries"])
@pytest.mark.parametrize("wide", [False, True])
def test_emr(rescale: str, wide: bool) -> None:
    base, models = family()
    if wide:
        base["a"] = base["a"].double()
    found = tvfast.localize(base, models, "emr", rescale=rescale)
    own, shared = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    masked = {}
    for name in ("a", "b"):
        taus = taus_of(base, models, name)
        sign = torch.where(taus.sum(dim=0) > 0, 1.0, -1.0).double()
        unified = sign * torch.where(taus * sign > 0, taus.abs(), 0.0).amax(dim=0)
        masks = taus * sign > 0
        assert torch.equal(found.task_vector[name].double(), unified)
        assert all(torch.equal(found.mask(name, t), masks[t]) for t in range(3))
        n = base[name].numel() if rescale == "tensors" else 1
        own += taus.abs().flatten(1).sum(dim=1) / n
        shared += (masks * unified.abs()).flatten(1).sum(dim=1) / n
        masked[name] = masks * unified
    assert found.factors == pytest.approx((own / shared).tolist(), rel=1e-12)
    model = found.model(base, 1)
    for name in ("a", "b"):
        expected = base[name] + float(own[1] / shared[1]) * masked[name][1]
        assert torch.allclose(model[name].double(), expected, atol=1e-6)
        assert model[name].dtype is base[name].dtype
    assert model["steps"] is base["steps"]


def test_tall_masks_give_tasks_back() -> None:
    base, models = family()
    found = tvfast.localize(base, models, "tall", threshold=[0.2, 0.4, 0.6])
    assert found.factors == (1.0, 1.0, 1.0)
    for name in ("a", "b"):
        taus = taus_of(base, models, name)
        total = taus.sum(dim=0)
        for t, threshold in enumerate((0.2, 0.4, 0.6)):
            mask = taus[t].abs() > torch.tensor(threshold) * (total - taus[t]).abs()
            assert torch.equal(found.mask(name, t), mask)
            assert torch.equal(found.model(base, t)[name].double(), base[name] + mask * total)
    alone = tvfast.localize(base, models[:1], "tall")
    assert torch.equal(alone.model(base, 0)["a"], models[0]["a"])


def test_masks_take_a_bit_per_entry() -> None:
    base, models = family()
    found = tvfast.localize(base, models)
    assert [words.numel() for words in found.masks["a"]] == [-(-13 * 17 // 64)] * 3


@pytest.mark.parametrize("kind", ["emr", "tall"])
def test_tied_tensors_stay_tied(kind: str) -> None:
    start, tuned = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    base, model = {"e": start, "h": start}, {"e": tuned, "h": tuned}
    found = tvfast.localize(base, [model], kind)
    for of in (base, {"e": start, "h": start.clone()}):
        merged = found.model(of, 0)
        assert torch.equal(merged["e"], tuned)
        assert merged["h"] is merged["e"]
    assert torch.equal(found.mask("h", 0), found.mask("e", 0))


def test_whatever_is_localized_has_models() -> None:
    """Bare tensors, lists, modules, names behind wrapper prefixes."""
    start, tuned = torch.zeros(3), torch.ones(3)
    assert torch.equal(tvfast.localize(start, [tuned]).model(start, 0)["tensor"], tuned)
    assert torch.equal(tvfast.localize([start], [[tuned]]).model([start], 0)["0"], tuned)
    wrapped = tvfast.localize({"module.a": start}, [{"a": tuned}])
    assert torch.equal(wrapped.model({"module.a": start}, 0)["a"], tuned)
    base, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    merged = tvfast.localize(base, [model]).model(base, 0)
    assert torch.allclose(merged["weight"], model.weight.detach())
    assert not merged["weight"].requires_grad


@pytest.mark.parametrize("rescale", ["tensors", "entries"])
def test_nan_stays_where_it_is(rescale: str) -> None:
    base = {"a": torch.zeros(3), "b": torch.zeros(2)}
    whole = {"a": torch.tensor([1.0, 2.0, 0.0]), "b": torch.ones(2)}
    holed = {"a": torch.tensor([float("nan"), 2.0, float("nan")]), "b": torch.ones(2)}
    found = tvfast.localize(base, [holed, whole], "emr", rescale=rescale)
    assert found.task_vector["a"].isnan().tolist() == [True, False, True]
    assert all(found.mask("a", t).tolist() == [False, True, False] for t in range(2))
    assert all(math.isfinite(factor) for factor in found.factors)
    assert not any(x.isnan().any() for x in found.model(base, 0).values())


def test_bases_that_do_not_fit_a_localized_model() -> None:
    found = tvfast.localize({"a": torch.zeros(3)}, [{"a": torch.ones(3)}])
    with pytest.raises(ShapeError, match=r"'a': base has shape \[1\], the task vector has \[3\]"):
        found.model({"a": torch.zeros(1)}, 0)
    with pytest.raises(StateDictError, match="base lacks the tensor 'a'"):
        found.model({"b": torch.zeros(3)}, 0)
    with pytest.raises(ArgumentError, match="models is empty"):
        tvfast.localize(torch.zeros(3), [])
    with pytest.raises(ArgumentError, match=r"task is 0\.5; expected 0 to 0"):
        found.mask("a", 0.5)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    base, models = family()
    with pytest.raises(UnknownNameError, match="kind 'emrr' does not exist; did you mean 'emr'"):
        tvfast.localize(base, models, "emrr")
    with pytest.raises(ArgumentError, match="threshold is -1 for 3 models"):
        tvfast.localize(base, models, "tall", threshold=-1)
    found = tvfast.localize(base, models)
    with pytest.raises(ArgumentError, match="task is 3; expected 0 to 2"):
        found.model(base, 3)
    with pytest.raises(ArgumentError, match="no tensor 'c'"):
        found.mask("c", 0)
    with pytest.raises(ArgumentError, match="agree is 0; expected 1 or more"):
        tvfast.merge(base, models, method="consensus", agree=0)
