"""Recipes of several stages: the same bytes as one after the other, and nothing stays behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import tvfast
from tests.cli.families import Family, digest, make_family
from tests.engine import test_adapted, test_coded
from tvfast.errors import MergeError, OutputError, ShapeError, StateDictError
from tvfast.recipe import parse_recipe

FIRST = {
    "merge_method": "linear",
    "parameters": {"weight": 0.5},
    "models": [{"model": "ft1"}, {"model": "ft2"}],
}
SECOND = {
    "merge_method": "ties",
    "base_model": "base",
    "parameters": {"weight": 1, "density": 0.5},
    "models": [{"model": "first"}, {"model": "ft3"}],
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(autouse=True)
def inside(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family.root)


def staged(*documents: dict[str, Any]) -> tvfast.checkpoints.Recipe:
    return parse_recipe("\n---\n".join(json.dumps(document) for document in documents), "r.yml")


BOTH = ({**FIRST, "name": "first"}, SECOND)


def weights(out: Path) -> dict[str, str]:
    """Checksums of everything but what states the recipe."""
    return {k: v for k, v in digest(out).items() if k.endswith((".safetensors", "index.json", "config.json"))}


@pytest.fixture(scope="module")
def expected(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One merge after the other."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(family.root)
        tvfast.merge_checkpoints(FIRST, folder / "first", device="cpu")
        second = {**SECOND, "models": [{"model": str(folder / "first")}, {"model": "ft3"}]}
        tvfast.merge_checkpoints(second, folder / "out", device="cpu")
    return weights(folder / "out")


def test_two_stages(expected: dict[str, str], tmp_path: Path) -> None:
    report = tvfast.merge_checkpoints(staged(*BOTH), tmp_path / "out", device="cpu")
    assert weights(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]
    plan = tvfast.plan(staged(*BOTH), device="cpu")
    assert [name for name, _ in plan.stages] == ["first"]
    assert report.read_bytes == plan.read_bytes + plan.stages[0][1].read_bytes


def test_a_finished_merge_is_known_again(tmp_path: Path) -> None:
    tvfast.merge_checkpoints(staged(*BOTH), tmp_path / "out", device="cpu")
    again = tvfast.merge_checkpoints(staged(*BOTH), tmp_path / "out", device="cpu", resume=True)
    assert again.finished_before
    assert (again.read_bytes, again.written_bytes) == (0, 0)


def test_a_run_that_failed_goes_on(
    family: Family, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage fails: what the first made is kept, taken, and removed in the end."""
    calls = []
    execute = tvfast.checkpoints.Run.execute

    def failing(self: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise MergeError("the disk is gone")
        return execute(self)

    monkeypatch.setattr(tvfast.checkpoints.Run, "execute", failing)
    with pytest.raises(MergeError, match="the disk is gone"):
        tvfast.merge_checkpoints(staged(*BOTH), tmp_path / "out", device="cpu")
    assert (tmp_path / ".out.stages" / "1" / "config.json").exists()
    report = tvfast.merge_checkpoints(staged(*BOTH), tmp_path / "out", device="cpu", resume=True)
    assert len(calls) == 3, "the first stage was merged again"
    assert not report.finished_before
    assert weights(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = tvfast.merge_checkpoints(staged(*BOTH), tmp_path / "out", device="cpu", dry_run=True)
    assert report.n_tensors > 0
    assert os.listdir(tmp_path) == []


def test_a_later_stage_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    """Layers of a result that is not there yet are known."""
    first = {
        "name": "first",
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "ft1", "layer_range": [0, 2]}]}],
    }
    with pytest.raises((StateDictError, ShapeError), match="first"):
        tvfast.merge_checkpoints(staged(first, SECOND), tmp_path / "out", device="cpu")
    assert os.listdir(tmp_path) == []


def test_types_and_layers_of_a_stage_are_those_of_its_recipe(tmp_path: Path) -> None:
    first = {
        "name": "first",
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [{"sources": [{"model": "ft1", "layer_range": [0, 3]}]}] * 2,
    }
    last = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": "first"}]}
    tvfast.merge_checkpoints(staged(first, last), tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["torch_dtype"]) == (6, "float32")


def test_a_stage_of_codes(tmp_path: Path) -> None:
    """What it writes is known with its scales."""
    for member, tensors in test_coded.numbers().items():
        config = {"quantization_config": test_coded.DEEPSEEK}
        test_coded.write(tmp_path / member, tensors, block=(128, 128), config=config)
    base, one, other = (str(tmp_path / member) for member in test_coded.MEMBERS)
    first = {**FIRST, "models": [{"model": base}, {"model": one}]}
    second = {**FIRST, "models": [{"model": "first"}, {"model": other}]}
    tvfast.merge_checkpoints(staged({**first, "name": "first"}, second), tmp_path / "out", device="cpu")
    tvfast.merge_checkpoints(first, tmp_path / "first", device="cpu")
    stepwise = {**second, "models": [{"model": str(tmp_path / "first")}, {"model": other}]}
    tvfast.merge_checkpoints(stepwise, tmp_path / "expected", device="cpu")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_an_adapter_is_added_to_a_stage(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    save_file(test_adapted.base_tensors(), base / "model.safetensors", {"format": "pt"})
    test_adapted.write_adapter(adapter, {test_adapted.UP: 8})
    first = {"name": "first", "merge_method": "passthrough", "models": [{"model": str(base)}]}
    last = {"merge_method": "passthrough", "models": [{"model": f"first+{adapter}"}]}
    recipe = staged(first, last)
    tvfast.merge_checkpoints(recipe, tmp_path / "out", device="cpu")
    assert tvfast.merge_checkpoints(recipe, tmp_path / "out", device="cpu", resume=True).finished_before
    alone = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    tvfast.merge_checkpoints(alone, tmp_path / "expected", device="cpu")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 17}))
    with pytest.raises(OutputError):
        tvfast.merge_checkpoints(recipe, tmp_path / "out", device="cpu", resume=True)


def test_the_template_of_a_stage_is_found(tmp_path: Path) -> None:
    first = {**FIRST, "name": "first", "chat_template": "{{ messages }}"}
    last = {"merge_method": "passthrough", "models": [{"model": "first"}], "chat_template": "auto"}
    tvfast.merge_checkpoints(staged(first, last), tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
