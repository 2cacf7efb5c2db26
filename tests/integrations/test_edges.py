"""What our functions leave to the peers, and what is zero: without the peers, which are no dependency."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.test_edges import family, recipe
from tvfast.errors import UnknownNameError
from tvfast.integrations import _fusion_bench_arithmetic as arithmetic
from tvfast.integrations import _fusion_bench_masks as masks
from tvfast.integrations import _fusion_bench_models as models
from tvfast.integrations import _fusion_bench_statistics as statistics
from tvfast.integrations import _mergekit_0_1_5 as mergekit
from tvfast.integrations import mergekit as mergekit_module
from tvfast.integrations import peft
from tvfast.integrations._mergekit import karcher, model_stock
from tvfast.integrations._mergekit_engine import run_merge
from tvfast.integrations._patching import NotServed

X = torch.ones(2, 4)
HOLED = torch.tensor([math.nan, 1.0, 2.0])
TRACKED = torch.ones(3, 50, requires_grad=True)
INFINITE = [torch.tensor([math.inf]), torch.tensor([-1.0]), torch.tensor([-2.0])]


def linear(tensors: list[Tensor], weight: Tensor, normalize: bool = True) -> Tensor:
    return mergekit._linear(SimpleNamespace(tensors=tuple(tensors)), weight, normalize)


def fisher(coefficients: Tensor) -> Any:
    a, b = torch.ones(3), torch.ones(3)
    return statistics.merging_with_fisher_weights({"a": [a, b]}, [{"a": a}, {"a": b}], coefficients)


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "fewer weights than models": (lambda: linear([X] * 4, torch.ones(2, 2)), "another number of weights"),
    "fewer rows of weights": (lambda: linear([X] * 2, torch.ones(1, 2)), "another number of weights"),
    "more rows of weights": (lambda: linear([X] * 2, torch.ones(3, 2)), "another number of weights"),
    "stock of NaN": (lambda: model_stock(X[0][:3], [HOLED, X[0][:3]], guard_singular=True), "not finite"),
    "karcher": (lambda: karcher([X, X + 1], [0.5, 0.25]), "weights whose sum is not 1"),
    "ties of all": (lambda: peft.ties(INFINITE, torch.ones(3), 1.0), "values that are not finite"),
    "dare_ties of all": (lambda: peft.dare_ties(INFINITE, torch.ones(3), 1.0), "values that are not finite"),
    "tracked ties": (lambda: models.ties_merging(TRACKED, 20, "sum"), "gradients are recorded"),
    "tracked emr": (lambda: masks.emr_merge([{"a": TRACKED}, {"a": TRACKED}]), "gradients are recorded"),
    "tracked coefficients": (lambda: fisher(torch.ones(2, requires_grad=True)), "gradients are recorded"),
    "wide coefficients": (lambda: fisher(torch.ones(2).double()), "coefficients of float64"),
}


@pytest.mark.parametrize("name", LEFT)
def test_calls_that_are_left_to_the_peer(name: str) -> None:
    call, why = LEFT[name]
    with pytest.raises(NotServed, match=why):
        call()


def test_functions_without_gradients_are_served() -> None:
    with torch.no_grad():
        assert not models.ties_merging(TRACKED, 20, "sum").requires_grad
        masks.emr_merge([{"a": TRACKED}, {"a": TRACKED}])
    assert torch.equal(peft.task_arithmetic(INFINITE, torch.ones(3)), torch.tensor([math.inf]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [-0.5, -1.0], [0.5, -1.0], [1.0], [0.0, 1.0]])
def test_sums_of_zeros_have_the_sign_of_a_sum_from_zero(weights: list[float], normalize: bool) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0])
    tensors = [values[None, :], values.flip(0)[None, :]][: len(weights)]
    total = torch.zeros(1, 4)
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor
    if normalize:
        total = total / sum(weights)
    found = linear(tensors, torch.tensor([weights]), normalize)
    assert torch.equal(found, total)
    assert torch.equal(torch.signbit(found), torch.signbit(total))


def test_buffers_of_integers_get_the_weights_as_they_were_given() -> None:
    a, b = ({"w": torch.ones(2) * k, "n": torch.tensor(7 * k)} for k in (1, 2))
    given: list[Any] = []

    def original(rest: Any, weights: Any) -> dict[str, Tensor]:
        given.append(weights)
        return {"n": sum(weight * one["n"] for weight, one in zip(weights, rest, strict=True))}

    for name in ("state_dict_weighted_sum", "state_dict_interpolation"):
        found = arithmetic.MAKERS[name](original)([a, b], [2, -1])
        assert found["n"].dtype is torch.int64
        assert found["w"].tolist() == [0.0, 0.0]
    assert all(type(weight) is int for weights in given for weight in weights)


# -- mergekit's whole run ---------------------------------------------------------------------------------


def test_the_engine_merges_the_configuration_as_the_options_say(tmp_path: Path) -> None:
    family(tmp_path, {"a": (300, 20), "b": (5,)})
    wanted = recipe(tmp_path, "linear", {"normalize": True})
    shown = {**wanted, "merge_method": "passthrough", "models": wanted["models"][:1]}
    config = SimpleNamespace(to_yaml=lambda: json.dumps(wanted))
    options = SimpleNamespace(
        device="cpu", write_model_card=False, out_shard_size=11_000, copy_tokenizer=True, random_seed=None
    )
    integration = SimpleNamespace(options={"engine": True})
    run_merge(integration)(config, str(tmp_path / "out"), options, config_source=json.dumps(shown))  # type: ignore[arg-type]
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) == 2
    assert not (tmp_path / "out" / "README.md").exists()
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    first, second = (load_file(tmp_path / m / "model.safetensors") for m in ("ft1", "ft2"))
    expected = ((first["a"].double() + second["a"].double()) / 2).bfloat16()
    assert torch.equal(merged["a"], expected)
    for option, value in (("safe_serialization", False), ("transformers_cache", "/elsewhere")):
        changed = SimpleNamespace(**{**vars(options), option: value})
        with pytest.raises(NotServed, match=f"the option {option}"):
            run_merge(integration)(config, str(tmp_path / "out"), changed)  # type: ignore[arg-type]


def test_the_engine_is_off_after_an_install_that_fails() -> None:
    with pytest.raises(UnknownNameError):
        mergekit_module.install(rng="other", engine=True)
    assert not mergekit_module.INTEGRATION.options.get("engine")
    mergekit_module.INTEGRATION.options["engine"] = True
    mergekit_module.uninstall()
    assert not mergekit_module.INTEGRATION.options
