"""`tvfast collect` and then `tvfast merge`, on tiny transformers models, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tvfast
from tests.collection.models import (
    bert,
    labelled_file,
    llama,
    saved,
    text_file,
    token_file,
    tokenizer,
    transformers,
)
from tvfast.cli.main import main
from tvfast.collection import read_configuration, run
from tvfast.errors import CheckpointError, RecipeError, StatisticsError, TvfastError
from tvfast.importance import collecting
from tvfast.statistics import StatisticsFile, open_statistics
from tvfast.statistics.tensors import read_mean


def config_file(folder: Path, name: str, **entries: Any) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(entries))
    return str(path)


def classifier() -> Any:
    return bert("BertForSequenceClassification", num_labels=3)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Path], dict[str, Any]]]] = {
    "llama": (llama, lambda folder: {"text": str(text_file(folder))}),
    "tied-llama": (
        lambda: llama(tie_word_embeddings=True),
        lambda folder: {"tokens": str(token_file(folder))},
    ),
    "bert": (bert, lambda folder: {"text": str(text_file(folder))}),
    "classifier": (classifier, lambda folder: {"jsonl": str(labelled_file(folder))}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_collect_then_merge(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[dict[str, Any]] = []
    found = collecting._Run.unsplit
    monkeypatch.setattr(collecting._Run, "unsplit", lambda *args: alone.append(found(*args)) or alone[-1])
    make, data = FAMILIES[family]
    torch.manual_seed(0)
    start = make()
    start.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    models = [saved(tmp_path, name, make, seed, start) for seed, name in enumerate(["a", "b"], start=1)]
    for kind in ("delta", "fisher"):
        for path in models:
            entries: dict[str, Any] = {
                "model": str(path),
                "data": data(tmp_path),
                "kind": kind,
                "batch_size": 3,
            }
            if kind == "delta":
                entries["base"] = str(tmp_path / "base")
            stats = tmp_path / f"{path.name}.{kind}"
            assert main(["collect", config_file(tmp_path, "config", **entries), str(stats), "--json"]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["kind"] == kind
            assert report["parameters"] == len(open_statistics(stats).entries)
            assert report["samples"] == (3 if family == "tied-llama" else 5)
    assert not any(alone), f"{alone[0]} need a pass of their own"
    for method, kind, own in (
        ("sta", "delta", {"importance": "delta", "scope": "model", "cross": "winner"}),
        ("fisher", "fisher", {"dialect": "mats"}),
    ):
        recipe: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(p), "stats": str(tmp_path / f"{p.name}.{kind}")} for p in models],
            "tvfast": own,
        }
        if method == "sta":
            recipe["base_model"] = str(tmp_path / "base")
            recipe["parameters"] = {"density": 0.5}
        out = tmp_path / f"out-{method}-{kind}"
        assert main(["merge", config_file(tmp_path, "recipe", **recipe), str(out)]) == 0, (
            capsys.readouterr().err
        )
        merged = type(start).from_pretrained(out).state_dict()  # transformers takes it
        base, *originals = [load_file(path / "model.safetensors") for path in (tmp_path / "base", *models)]
        scores = [tmp_path / f"{path.name}.{kind}" for path in models]
        options = {**recipe.get("parameters", {}), **own}
        expected = tvfast.merge(base, originals, method=method, stats=scores, **options)
        for name, tensor in expected.items():
            assert torch.equal(merged[name], tensor), name
        assert any(not torch.equal(tensor, base[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "mats"), ("bert", "regmean"), ("classifier", "kfac")]
)
def test_collect_then_merge_by_curvature(
    family: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, data = FAMILIES[family]
    torch.manual_seed(0)
    start = make()
    start.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    models = [saved(tmp_path, name, make, seed, start) for seed, name in enumerate(["a", "b"], start=1)]
    convention = "regmean" if method == "regmean" else "mats"
    for path in models:
        entries = {"model": str(path), "data": data(tmp_path), "kind": "kfac", "convention": convention}
        config = config_file(tmp_path, "config", **entries, batch_size=3, checkpoint_every=1)
        assert main(["collect", config, str(tmp_path / f"{path.name}.stats"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["kind"] == "kfac"
        assert report["parameters"] == len(open_statistics(tmp_path / f"{path.name}.stats").entries) > 4
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(p), "stats": str(tmp_path / f"{p.name}.stats")} for p in models],
    }
    if method == "kfac":
        recipe["base_model"] = str(tmp_path / "base")
    out = tmp_path / "out"
    assert main(["merge", config_file(tmp_path, "recipe", **recipe), str(out)]) == 0, capsys.readouterr().err
    merged = type(start).from_pretrained(out).state_dict()  # transformers takes it
    base, *originals = [load_file(path / "model.safetensors") for path in (tmp_path / "base", *models)]
    stats = [tmp_path / f"{path.name}.stats" for path in models]
    torch.set_num_threads(1)
    expected = tvfast.merge(base, originals, method, stats=stats, report=[])
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
    name = next(iter(open_statistics(stats[0]).entries))[0]
    assert not torch.allclose(merged[name], (originals[0][name] + originals[1][name]) / 2, atol=1e-4)


def quick(folder: Path, make: Callable[[], Any] = llama, **entries: Any) -> StatisticsFile:
    path = folder / "model"
    if not path.exists():
        saved(folder, "model", make, 0)
    entries.setdefault("data", {"text": str(text_file(folder))})
    entries.setdefault("kind", "weight")
    return run(read_configuration({"model": str(path), **entries}), folder / "stats")


def test_scores_do_not_depend_on_batches(tmp_path: Path) -> None:
    first = quick(tmp_path, batch_size=1)
    means = {name: read_mean(first, name, "weight", "sum") for name in first.parameters("weight")}
    assert first.entry("lm_head.weight", "weight").counts == {"samples": 5}
    second = quick(tmp_path, batch_size=4)
    for name, mean in means.items():
        found = read_mean(second, name, "weight", "sum")
        assert float((found - mean).norm()) <= 1e-6 * float(mean.norm()), name


def test_scores_are_those_of_the_loss_of_transformers(tmp_path: Path) -> None:
    stats = quick(tmp_path, max_samples=1, loss="mean")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokenizer()("the cat sat on the mat", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        expected = (parameter.grad * parameter).abs()
        torch.testing.assert_close(read_mean(stats, name, "weight", "sum"), expected, rtol=1e-3, atol=1e-9)


def test_choices_reach_the_file(tmp_path: Path) -> None:
    blocks = {"text": str(text_file(tmp_path)), "split": "blocks"}
    stats = quick(
        tmp_path, data=blocks, parameters=["mlp.", "norm"], layers_at_a_time=2, max_samples=3, max_length=6,
        dtype="bfloat16", stored_dtype="bfloat16", name="tiny", content=True, seed=3, micro_batch=2,
    )  # fmt: skip
    names = stats.parameters("weight")
    assert len(names) == 2 * (3 + 2) + 1
    assert all("mlp." in name or "norm" in name for name in names)
    assert stats.place(names[0], "weight", "sum").dtype == "BF16"
    assert stats.entry(names[0], "weight").counts == {"samples": 3}
    assert stats.document.model.name == "tiny"
    assert stats.document.model.content
    assert stats.document.collection["samples_per_gradient"] == 2
    (data,) = stats.document.data
    assert (data["task"], data["split"], data["max_length"]) == ("causal_lm", "blocks", 6)


@pytest.mark.parametrize("fisher", ["mats", "mats_true", "matena_raffel", "mergelm"])
def test_readings_of_the_fisher(tmp_path: Path, fisher: str) -> None:
    data = {"jsonl": str(labelled_file(tmp_path))}
    stats = quick(tmp_path, classifier, data=data, kind="fisher", fisher=fisher)
    assert stats.document.collection["fisher"] == fisher
    assert float(read_mean(stats, "classifier.weight", "fisher", "sum").max()) > 0


def test_masks_depend_on_the_seed_and_the_sample(tmp_path: Path) -> None:
    first = quick(tmp_path, bert, batch_size=1)
    one = read_mean(first, "bert.embeddings.position_embeddings.weight", "weight", "sum")
    second = quick(tmp_path, bert, batch_size=5)
    two = read_mean(second, "bert.embeddings.position_embeddings.weight", "weight", "sum")
    assert float((one - two).norm()) <= 1e-6 * float(one.norm())
    third = quick(tmp_path, bert, seed=9)
    assert not torch.allclose(
        read_mean(third, "bert.embeddings.position_embeddings.weight", "weight", "sum"), one
    )


REFUSED: dict[str, tuple[dict[str, Any], type[TvfastError], str]] = {
    "kind": ({"kind": "weights"}, RecipeError, "expected one of weight, delta, fisher"),
    "key": ({"batch": 3}, RecipeError, "no such key.*batch_size"),
    "no base": ({"kind": "delta"}, RecipeError, "base is missing"),
    "fisher": ({"fisher": "mats"}, RecipeError, "expected kind: fisher"),
    "data": ({"data": {"text": "x", "jsonl": "y"}}, RecipeError, "text and jsonl"),
    "no file": ({"data": {"text": "nowhere"}}, CheckpointError, "nowhere: cannot be read"),
    "batch_size": ({"batch_size": 0}, RecipeError, "at least 1"),
    "labels": ({"fisher": "matena_raffel", "kind": "fisher"}, RecipeError, "all labels of a sample"),
    "model": ({"model": "nowhere"}, CheckpointError, "transformers cannot read it"),
    "parameters": ({"parameters": ["nothing"]}, TvfastError, "no parameter is chosen"),
    "device": ({"device": "cuda:9"}, TvfastError, "cannot be used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    entries, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        quick(tmp_path, **entries)


def test_refused_samples(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    for line, words in (
        ("{", "line 1: is no JSON"),
        ("[]", "list of token ids"),
        ("[1, 999]", "token 999"),
        ('{"input_ids": [1], "labels": "x"}', "'labels' is no integer"),
    ):
        data.write_text(line + "\n")
        with pytest.raises(CheckpointError, match=words):
            quick(tmp_path, data={"tokens": str(data)})
    data.write_text("\n")
    with pytest.raises(StatisticsError, match="no sample came"):
        quick(tmp_path, data={"tokens": str(data)})
    data.write_text('{"text": 3}\n')
    with pytest.raises(CheckpointError, match="no text 'text'"):
        quick(tmp_path, data={"jsonl": str(data)})


def test_the_command_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "model", llama, 0)
    config = config_file(
        tmp_path, "c", model=str(tmp_path / "model"), data={"text": str(text_file(tmp_path))}, kind="weight"
    )
    stats = str(tmp_path / "stats")
    assert main(["collect", config, stats]) == 0
    assert "weight of 21 parameters on 5 samples" in capsys.readouterr().out
    assert main(["collect", config, stats]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["collect", config, stats, "--overwrite"]) == 0
    assert main(["collect", str(tmp_path / "no.yaml"), stats, "--overwrite"]) == 2
