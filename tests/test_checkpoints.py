"""The Python API of merges on disk: what it refuses, and that it has then written nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import tvfast
from tests.cli.families import Family, digest, make_family, recipe
from tvfast.errors import ArgumentError, BackendError, OutputError, RecipeError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def config(family: Family) -> dict[str, Any]:
    """The mapping that a YAML file would hold."""
    found: dict[str, Any] = json.loads(recipe(family, "ties", parameters={"density": 0.5}))
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("threads", value) for value in (None, "4", 1.5, -1, True)),
        *(("memory", value) for value in ("8G", 0, -1, 1e9, True)),
        *(("device", value) for value in (None, 3, "gpu", "cuda:x")),
        *(("device_memory", value) for value in ("1G", 0, 1.5)),
        *(("seed", value) for value in ("1", 1.5, True, 2**64, -(2**63) - 1)),
        *(("nonfinite", value) for value in (True, "maybe")),
        *(("report", value) for value in (3, b"r", "r\0")),
        *(("progress", value) for value in (3, print)),
        *(("out", value) for value in (None, 3, b"out", "o\0t")),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(
    name: str, value: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=f"^{name} is .*expected"):
        tvfast.merge_checkpoints(config, **{"out": "out", name: value})
    if name in ("threads", "memory", "seed", "device", "device_memory"):
        with pytest.raises(ArgumentError, match=f"^{name} is .*expected"):
            tvfast.plan(config, **{name: value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("config", [None, 3, ["recipe.yml"], b"recipe.yml"])
def test_a_recipe_of_a_wrong_kind_is_named(config: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected the path of a YAML file, or a mapping"):
        tvfast.plan(config)
    with pytest.raises(RecipeError, match="expected the path of a YAML file, or a mapping"):
        tvfast.merge_checkpoints(config, tmp_path / "out")


def test_a_device_that_exists_elsewhere_is_no_wrong_argument(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cuda:1"):
        tvfast.merge_checkpoints(config, tmp_path / "out", device="cuda:1")


def test_the_seed_that_a_recipe_implies_may_be_given(config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    tvfast.merge_checkpoints(config, out)
    assert tvfast.merge_checkpoints(config, out, seed=0, resume=True).finished_before
    with pytest.raises(OutputError, match="seed was 0, is 1"):
        tvfast.merge_checkpoints(config, out, seed=1, resume=True)


def test_a_report_is_refused_before_the_merge(config: dict[str, Any], family: Family, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = digest(family.root)
    for report, message in (
        (family.path("ft1"), "is the input"),
        (family.path("ft1") / "report", "lies inside the input"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "report", "Not a directory"),
    ):
        with pytest.raises(OutputError, match=message):
            tvfast.merge_checkpoints(config, tmp_path / "out", report=report)
    assert digest(family.root) == before
    assert os.listdir(tmp_path) == ["file"]


def test_a_dry_run_checks_the_output(config: dict[str, Any], family: Family, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("mine")
    before = digest(family.root)
    for out, options, message in (
        (full, {}, "is not empty"),
        (full / "precious", {}, "is a file"),
        (family.path("ft1"), {"overwrite": True}, "is the input"),
        (family.path("base") / "out", {}, "lies inside the input"),
    ):
        with pytest.raises(OutputError, match=message):
            tvfast.merge_checkpoints(config, out, dry_run=True, **options)
    assert tvfast.merge_checkpoints(config, full, dry_run=True, overwrite=True).dry_run
    assert digest(family.root) == before
    assert os.listdir(full) == ["precious"]


def test_the_tokenizers_directory_is_an_input(tmp_path: Path) -> None:
    """It need not be one of the models."""
    own = make_family(tmp_path / "family")
    source = tmp_path / "tokenizer"
    source.mkdir()
    for folder in (source, *(own.path(name) for name in own.tensors)):
        (folder / "tokenizer.json").write_text(VOCABULARY)
    config = {**json.loads(recipe(own, "ties")), "tokenizer_source": str(source)}
    with pytest.raises(OutputError, match="is the input"):
        tvfast.merge_checkpoints(config, source, overwrite=True)
    assert os.listdir(source) == ["tokenizer.json"]


VOCABULARY = json.dumps({"model": {"vocab": {"a": 0, "b": 1}}})
