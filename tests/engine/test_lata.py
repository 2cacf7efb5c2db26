"""LATA of checkpoints: the bits of `tvfast.merge`, streamed too; what recipes say of the instruct model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tvfast.cli.main import main
from tvfast.engine.run import Run
from tvfast.engine.source import Loaded
from tvfast.errors import ArgumentError, MergeError, RecipeError, ShapeError
from tvfast.recipe import parse_recipe

State = dict[str, Tensor]
MEMBERS = ("base", "chat", "math", "code")
CASES = [
    ({}, {}),
    ({"lambda": 0.75}, {"drop": "logarithmic", "granularity": "module", "target": "base"}),
    ({}, {"drop": "linear", "granularity": "tensor", "outside": "ranked"}),
    ({"weight": 0.5}, {"outside": "whole"}),
    ({"lambda": 0.5, "sigma": 0.03}, {"direction": "forget"}),
    ({"sigma": 0.01}, {"drop": "threshold", "granularity": "tensor", "target": "base"}),
]


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed.weight": (width, 16)}
    for layer in range(12):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}attn.q.weight": (width, 16), f"{prefix}attn.q.bias": (width,)}
        found |= {f"{prefix}mlp.up.weight": (2 * width, 16)}
    return found | {"model.norm.weight": (16,), "lm_head.weight": (width, 16)}


def members(width: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, State]:
    drawn = torch.Generator().manual_seed(7)
    base = {n: (0.02 * torch.randn(s, generator=drawn)).to(dtype) for n, s in shapes(width).items()}
    found = {"base": base}
    for member in MEMBERS[1:]:
        found[member] = {
            name: (t.float() + 1e-3 * torch.randn(t.shape, generator=drawn)).to(dtype)
            for name, t in base.items()
        }
    return found


def write(folder: Path, found: dict[str, State]) -> Path:
    for member, tensors in found.items():
        (folder / member).mkdir(parents=True)
        save_file(tensors, folder / member / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "num_hidden_layers": 12, "member": member}
        (folder / member / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("family"), members(24))


def recipe(folder: Path, parameters: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {
        "merge_method": "lata",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / member)} for member in ("math", "code")],
        "parameters": parameters,
        "tvfast": {"instruct": str(folder / "chat"), **own},
    }


def expected(found: dict[str, State], parameters: dict[str, Any], own: dict[str, Any]) -> State:
    names = {"lambda": "scale", "weight": "weights"}
    given = {names.get(key, key): value for key, value in (parameters | own).items()}
    return tvfast.merge(
        found["base"], [found["math"], found["code"]], "lata", instruct=found["chat"], **given
    )


@pytest.mark.parametrize(("parameters", "own"), CASES, ids=lambda x: str(x).replace(" ", ""))
def test_checkpoints_merge_as_tensors_do(
    family: Path, tmp_path: Path, parameters: dict[str, Any], own: dict[str, Any]
) -> None:
    report = tvfast.merge_checkpoints(recipe(family, parameters, own), tmp_path / "out")
    assert report.n_passes == (1 if "sigma" in parameters else 2)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = expected(members(24), parameters, own)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["member"] == ("base" if own.get("target") == "base" else "chat")


@pytest.mark.parametrize("parameters", [{}, {"sigma": 0.003}], ids=str)
def test_little_memory_gives_the_same_bytes(tmp_path: Path, parameters: dict[str, Any]) -> None:
    found = members(12000, torch.float32)
    own = {"drop": "threshold"} if parameters else {}
    config = recipe(write(tmp_path, found), parameters, own)
    with pytest.raises(ArgumentError, match="it needs at least") as refused:
        tvfast.plan(config, memory=1)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    plan = tvfast.plan(config, memory=least)
    n_bytes = sum(t.nbytes for one in found.values() for t in one.values())
    assert plan.peak_bytes <= least
    assert plan.arena_bytes < n_bytes / 4
    assert tvfast.merge_checkpoints(config, tmp_path / "out", memory=least).n_passes == 2
    wanted = expected(found, parameters, own)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_and_may_go_through(
    tmp_path: Path, member: str, value: float
) -> None:
    """The norms tell that there is one, and only then is it looked for."""
    found = members(24)
    found[member]["model.layers.7.attn.q.weight"].view(-1)[37] = value
    config = recipe(write(tmp_path, found), {}, {})
    says = rf"{member}/model.safetensors: tensor 'model.layers.7.attn.q.weight' holds NaN .* at element 37"
    with pytest.raises(MergeError, match=says):
        tvfast.merge_checkpoints(config, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    tvfast.merge_checkpoints(config, tmp_path / "out", nonfinite="propagate", resume=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected(found, {}, {}).items():
        assert torch.equal(merged[name].view(torch.int16), tensor.view(torch.int16)), name


def test_inputs_are_not_searched_where_norms_tell_that_all_is_finite(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    check = Run._check_finite

    def spied(run: Run, loaded: Loaded, indices: Sequence[int]) -> None:
        searched.extend(loaded.parts[index].task.name for index in indices)
        check(run, loaded, indices)

    monkeypatch.setattr(Run, "_check_finite", spied)
    tvfast.merge_checkpoints(recipe(family, {}, {}), tmp_path / "out")
    assert sorted(searched) == sorted(name for name in shapes(24) if "layers" not in name)


def test_finite_inputs_that_are_too_far_apart_for_their_type_are_allowed(tmp_path: Path) -> None:
    """A difference beyond float32 makes norms infinite, and nothing that is searched for is found."""
    found = members(24)
    found["base"]["model.layers.7.attn.q.weight"].view(-1)[37] = 3e38
    found["chat"]["model.layers.7.attn.q.weight"].view(-1)[37] = -3e38
    config = recipe(write(tmp_path, found), {}, {})
    tvfast.merge_checkpoints(config, tmp_path / "out", nonfinite="propagate")
    with pytest.raises(MergeError, match="of the result"):
        tvfast.merge_checkpoints(config, tmp_path / "other")


def test_what_is_not_ranked_is_read_once(family: Path) -> None:
    """Embeddings, head and final norm are copies of one model's; nobody reads the others'."""
    plan = tvfast.plan(recipe(family, {}, {}))
    counts = {name: method for name, _, _, method in plan.tensors}
    assert [name for name, method in counts.items() if method == "copy"] == [
        name for name in counts if "layers" not in name
    ]
    found = members(24)
    ranked = sum(t.nbytes for one in found.values() for name, t in one.items() if "layers" in name)
    copied = sum(t.nbytes for name, t in found["chat"].items() if "layers" not in name)
    assert plan.read_bytes == 2 * ranked + copied


def test_the_instruct_model_is_no_task_wherever_it_is_listed(family: Path, tmp_path: Path) -> None:
    config = recipe(family, {}, {})
    config["models"].insert(1, {"model": str(family / "chat"), "parameters": {"weight": 3.0}})
    report = tvfast.merge_checkpoints(config, tmp_path / "out")
    assert any("'weight' of the instruct model has no effect" in warning for warning in report.warnings)
    wanted = expected(members(24), {}, {})
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())


def sliced(family: Path, names: tuple[str, ...]) -> dict[str, Any]:
    config = recipe(family, {}, {})
    del config["models"]
    config["slices"] = [
        {"sources": [{"model": str(family / name), "layer_range": layers} for name in names]}
        for layers in ([0, 7], [3, 12])
    ]
    return config


def test_layers_of_slices_are_those_of_the_output(family: Path, tmp_path: Path) -> None:
    tvfast.merge_checkpoints(sliced(family, ("chat", "math", "base", "code")), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    origin = [*range(7), *range(3, 12)]

    def stacked(one: State) -> State:
        inside = {
            f"model.layers.{new}.{name.split('.', 3)[3]}": tensor.clone()
            for new, old in enumerate(origin)
            for name, tensor in one.items()
            if name.startswith(f"model.layers.{old}.")
        }
        return {name: tensor for name, tensor in one.items() if "layers" not in name} | inside

    wanted = expected({member: stacked(one) for member, one in members(24).items()}, {}, {})
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())


def test_recipes_that_cannot_be_right(family: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        config = recipe(family, {}, {}) | changes
        with pytest.raises(RecipeError, match=words):
            tvfast.plan(config)

    chat = str(family / "chat")
    refused("'lata' compares with the instruct model of the base and is given none", tvfast={})
    refused("is the base; expected the model tuned from it", tvfast={"instruct": str(family / "base")})
    refused("instruct.*belongs to 'lata'; method 'ties' has no instruct", merge_method="ties")
    refused("got 0 models besides the base and the instruct model", models=[{"model": chat}])
    refused(r"drop.*expected one of linear, logarithmic, threshold", tvfast={"instruct": chat, "drop": "log"})
    refused("sigma is 2", parameters={"sigma": 2}, tvfast={"instruct": chat, "drop": "threshold"})
    refused("does not use", parameters={"sigma": 0.5})
    refused("ranks all tensors together, but its numbers differ", parameters={"weight": [0.1, 0.9]})
    with pytest.raises(RecipeError, match=r"the instruct model .* is not among the sources"):
        tvfast.plan(sliced(family, ("math", "base", "code")))
    text = json.dumps(recipe(Path("x"), {}, {"dialect": "mergekit"}))
    with pytest.raises(ValueError, match="has no dialect 'mergekit'"):
        parse_recipe(text, "r.yml")


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    found = members(24)
    found["chat"]["model.layers.3.mlp.up.weight"] = torch.zeros(3, 16, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"'model.layers.3.mlp.up.weight': tvfast.instruct .*chat"):
        tvfast.plan(recipe(write(tmp_path / "a", found), {}, {}))
    flat = {member: {"weight": one["lm_head.weight"]} for member, one in members(24).items()}
    with pytest.raises(RecipeError, match="no tensor is in a numbered layer"):
        tvfast.plan(recipe(write(tmp_path / "b", flat), {}, {}))


def test_the_documented_recipe_merges(family: Path, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    (text,) = re.findall(r"^```yaml\n(merge_method: lata\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, member in (
        ("org/base", "base"),
        ("org/instruct", "chat"),
        ("./math", "math"),
        ("./code", "code"),
    ):
        text = text.replace(name, str(family / member))
    (tmp_path / "lata.yml").write_text(text)
    assert main(["merge", str(tmp_path / "lata.yml"), str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    wanted = expected(members(24), {"weight": [1.0, 0.7], "lambda": 0.8}, {"drop": "logarithmic"})
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
