"""Functions as merge methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast
from tests.methods.inputs import exact_bits, normal
from tvfast import methods
from tvfast.errors import ArgumentError, MergeError, ShapeError
from tvfast.methods import METHODS, custom_method, make_method
from tvfast.methods.base import PerModel
from tvfast.recipe.keys import method_keys


@pytest.fixture(autouse=True)
def forgets() -> Iterator[None]:
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


def softened(models: list[Tensor], base: Tensor, *, weights: PerModel = 1.0, power: float = 0.5) -> Tensor:
    """θ = θ₀ + λ Σ_k w_k sign(τ_k) |τ_k|^power."""
    assert isinstance(weights, tuple)
    total = torch.zeros_like(base)
    for weight, model in zip(weights, models, strict=True):
        total += weight * (model - base).sign() * (model - base).abs() ** power
    return base + total


def test_a_function_is_a_method() -> None:
    custom_method("softened", source="this test")(softened)
    base, models = normal(5, 6), [normal(5, 6, seed=1), normal(5, 6, seed=2)]
    out = tvfast.merge(base, models, method="softened", weights=[0.5, 2.0], power=2)
    assert exact_bits(out, softened(models, base, weights=(0.5, 2.0), power=2.0))
    half = tvfast.merge({"a": base}, [{"a": m} for m in models], method="softened", scale=0.5)["a"]
    full = softened(models, base, weights=(1.0, 1.0))
    assert torch.allclose(half, base + 0.5 * (full - base))
    info = methods.method_info("softened")
    assert (info.formula, info.source) == ("θ = θ₀ + λ Σ_k w_k sign(τ_k) |τ_k|^power.", "this test")
    assert [p.name for p in info.parameters] == ["weights", "scale", "seed", "tie", "dialect", "power"]


def test_it_gets_float32_and_its_result_is_rounded_once() -> None:
    seen: list[torch.dtype] = []

    @custom_method("mean", needs_base=False)
    def mean(models: list[Tensor], *, half: bool = False) -> Tensor:
        seen.extend(m.dtype for m in models)
        total = torch.stack(models).mean(dim=0)
        return total / 2 if half else total

    base = normal(9).bfloat16()
    models = [normal(9, seed=1).bfloat16(), normal(9, seed=2).half()]
    out = tvfast.merge(base, models, method="mean", half=True)
    assert set(seen) == {torch.float32}
    assert out.equal((torch.stack([m.float() for m in models]).mean(dim=0) / 2).bfloat16())
    merged = tvfast.merge(base.double(), [m.double() for m in models], method="mean")
    assert merged.dtype is torch.float64


def test_a_recipe_takes_its_parameters() -> None:
    custom_method("softened")(softened)
    keys = method_keys("softened", "mergekit")
    assert {(k.name, k.per_model, k.flag) for k in keys.values()} == {
        ("weight", True, False),
        ("lambda", False, False),
        ("power", False, False),
    }


def test_functions_that_do_not_fit() -> None:
    def plain(models: Any, base: Any) -> Any:
        return models

    def untyped(models: Any, base: Any, *, power=2) -> Any:  # type: ignore[no-untyped-def]
        return models

    def required(models: Any, base: Any, *, power: float) -> Any:
        return models

    with pytest.raises(ArgumentError, match="method 'ties' exists"):
        custom_method("ties")
    with pytest.raises(ArgumentError, match="2 positional parameters; expected models, and"):
        custom_method("plain", needs_base=False)(plain)
    for function in (untyped, required):
        with pytest.raises(ArgumentError, match=r"parameter 'power'.*expected a keyword with a default"):
            custom_method("odd")(function)
    assert "odd" not in METHODS


def test_bad_results_and_numbers() -> None:
    @custom_method("cut")
    def cut(models: list[Tensor], base: Tensor, *, n: int = 1, weights: PerModel = 1.0) -> Any:
        return base[:-1] if n == 1 else None

    base = normal(4)
    with pytest.raises(ShapeError, match=r"'cut' returned shape \[3\] for tensor 'w'; expected \[4\]"):
        tvfast.merge({"w": base}, [{"w": base}], method="cut")
    with pytest.raises(MergeError, match="'cut' returned NoneType for tensor 'tensor'"):
        tvfast.merge(base, [base], method="cut", n=2)
    with pytest.raises(ArgumentError, match=r"n is 1\.5; expected a whole number"):
        make_method("cut", n=1.5)
    with pytest.raises(ArgumentError, match="weights has 2 values for 1 models"):
        tvfast.merge(base, [base], method="cut", weights=[1, 2])
