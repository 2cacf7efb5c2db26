"""`tvfast mergekit-yaml`: mergekit's command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tvfast
from tests.cli.families import Family, digest, make_family, recipe
from tvfast.cli.main import main
from tvfast.cli.mergekit_flags import WITHOUT_EFFECT
from tvfast.errors import ArgumentError
from tvfast.recipe import Recipe

# Every option of mergekit-yaml 0.1.5 that is a switch, and those with a value.
SWITCHES = (
    *("allow-crimes", "cuda", "low-cpu-memory", "copy-tokenizer", "clone-tensors", "trust-remote-code"),
    *("lazy-unpickle", "write-model-card", "safe-serialization", "quiet", "read-to-gpu", "multi-gpu"),
    *("async-write", "unsafe-truncate-embeddings"),
)
VALUES = {
    "transformers-cache": "cache",
    "lora-merge-cache": "cache",
    "lora-merge-dtype": "float32",
    "device": "cpu",
    "out-shard-size": "5B",
    "random-seed": "3",
    "num-threads": "2",
    "write-threads": "2",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def config(family: Family, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(recipe(family, "dare_ties", parameters={"density": 0.5}))
    return path


def test_it_merges_as_merge_does(config: Path, tmp_path: Path) -> None:
    assert main(["merge", str(config), str(tmp_path / "one"), "--seed", "3", "--device", "cpu"]) == 0
    assert main(["mergekit-yaml", str(config), str(tmp_path / "two"), "--random-seed", "3", "-v"]) == 0
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_the_notebook_line(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The options that most merges are run with; each that does nothing is named once."""
    arguments = ["--copy-tokenizer", "--allow-crimes", "--out-shard-size", "1B", "--lazy-unpickle"]
    assert main(["mergekit-yaml", str(config), str(tmp_path / "out"), *arguments]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert len(notes) == 2
    assert notes[0].startswith("tvfast: note: --allow-crimes has no effect: ")
    assert notes[1].startswith("tvfast: note: --lazy-unpickle has no effect: ")


def test_every_option_is_known(config: Path, tmp_path: Path) -> None:
    taken = {"cuda", "multi-gpu", "safe-serialization", "unsafe-truncate-embeddings"}
    arguments = [f"--{'no-' if name in taken - {'safe-serialization'} else ''}{name}" for name in SWITCHES]
    arguments += [word for name, value in VALUES.items() for word in (f"--{name}", value)]
    assert main(["mergekit-yaml", str(config), str(tmp_path / "out"), *arguments]) == 0
    assert {flag.name.removeprefix("--") for flag in WITHOUT_EFFECT} <= {*SWITCHES, *VALUES}


def test_what_is_there_is_replaced(config: Path, family: Family, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main(["mergekit-yaml", str(config), out, "--random-seed", "1"]) == 0
    before = digest(tmp_path / "out")
    assert main(["mergekit-yaml", str(config), out, "--random-seed", "2", "--out-shard-size", "4k"]) == 0
    after = digest(tmp_path / "out")
    assert "model.safetensors" in before
    assert "model.safetensors" not in after
    assert "model.safetensors.index.json" in after


def test_files_that_are_not_wanted(config: Path, tmp_path: Path) -> None:
    arguments = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    assert main(["mergekit-yaml", str(config), str(tmp_path / "out"), *arguments]) == 0
    found = set(digest(tmp_path / "out"))
    assert not {"tokenizer.json", "tokenizer_config.json", "README.md", "mergekit_config.yml"} & found
    assert "config.json" in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-safe-serialization"], "expected safetensors"),
        (["--unsafe-truncate-embeddings"], "`tokenizer: {source: base}`"),
    ],
)
def test_what_would_change_the_result_is_refused(
    arguments: list[str], words: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mergekit-yaml", str(config), str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_sums_with_adapters_are_rounded_to(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def merge(recipe: Recipe, *_: Any, **__: Any) -> None:
        seen.append(recipe)
        raise ArgumentError("enough")

    monkeypatch.setattr(tvfast, "merge_checkpoints", merge)
    arguments = ["mergekit-yaml", str(config), str(tmp_path / "out")]
    assert main(arguments) == main([*arguments, "--lora-merge-dtype", "torch.float16"]) == 2
    assert [recipe.lora_merge_dtype for recipe in seen] == [None, "F16"]
    with pytest.raises(SystemExit):
        main([*arguments, "--lora-merge-dtype", "int8"])


@pytest.mark.parametrize("size", ["0", "x", "5GB", "-1", "1.5B", ""])
def test_sizes_are_mergekits(
    size: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["mergekit-yaml", str(config), str(tmp_path / "out"), f"--out-shard-size={size}"])
    assert caught.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_a_cache_that_is_named_is_looked_into(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    repository = tmp_path / "cache" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(family.path("ft1"))
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": "org/name"}]}))
    cache = ["--transformers-cache", str(tmp_path / "cache")]
    assert main(["mergekit-yaml", str(path), str(tmp_path / "out"), *cache]) == 0
