"""The demonstration: its table, its files, and that merging does what the text says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tvfast
from tvfast.cli.main import main
from tvfast.demo import digits, experiment, files, report
from tvfast.demo.digits import TASKS
from tvfast.demo.experiment import RECIPES, Results, run
from tvfast.demo.network import network

SHORT = {"expert_steps": 40, "scales": (0.3, 0.5, 1.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return run(1, folder, **SHORT)


def test_rows_are_base_experts_and_every_merge(results: Results) -> None:
    assert [row.kind for row in results.rows] == ["base"] + ["expert"] * 3 + ["merge"] * len(RECIPES)
    assert [row.name for row in results.of_kind("merge")] == [recipe.method for recipe in RECIPES]
    for row in results.rows:
        assert len(row.tasks) == len(TASKS)
        assert all(0.0 <= accuracy <= 100.0 for accuracy in row.tasks)
    scaled = [recipe for recipe in RECIPES if recipe.scaled]
    assert list(results.chosen) == [recipe.method for recipe in scaled]
    assert results.n_searched == len(scaled) * 3
    assert results.n_merges == len(RECIPES)


def test_each_expert_is_best_at_its_own_task(results: Results) -> None:
    for index, expert in enumerate(results.of_kind("expert")):
        assert expert.tasks[index] == max(row.tasks[index] for row in results.rows)


def test_merging_keeps_all_tasks(results: Results) -> None:
    base = results.of_kind("base")[0]
    experts = results.of_kind("expert")
    for merged in results.of_kind("merge"):
        if merged.name == "slerp":  # of two experts: the third task is not in it
            continue
        assert merged.average > base.average + 3.0
        assert merged.average > max(expert.average for expert in experts)
        # an expert forgets the other tasks further than any merge does
        assert min(merged.tasks) > max(min(expert.tasks) for expert in experts)


def test_lambda_is_the_best_of_the_grid_on_validation(results: Results) -> None:
    for name, averages in results.validation.items():
        assert averages[results.scales.index(results.chosen[name])] == max(averages)


def test_checkpoints_are_sharded_and_merge_to_the_bits_of_merge(results: Results, folder: Path) -> None:
    base = files.load(folder / "base")
    experts = [files.load(folder / f"expert-{k}") for k in (1, 2, 3)]
    assert base.keys() == network(0).state_dict().keys()
    for recipe in RECIPES:
        out = folder / recipe.method
        assert len(list(out.glob("model-*.safetensors"))) > 1
        assert len(list((folder / "expert-1").glob("model-*.safetensors"))) > 1
        start, models = (experts[0], experts[1:2]) if recipe.method == "slerp" else (base, experts)
        scale = results.chosen.get(recipe.method, 1.0)
        expected = tvfast.merge(
            start, models, method=recipe.method, scale=scale, seed=results.seed, **recipe.parameters
        )
        found = files.load(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (recipe.method, name)
        assert f"merge_method: {recipe.method}\n" in (folder / f"{recipe.method}.yaml").read_text()


def test_the_same_seed_gives_the_same_numbers(results: Results, tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = run(1, tmp_path, **SHORT)
    assert again.rows == results.rows
    assert again.validation == results.validation
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_of_the_data_are_disjoint_and_tasks_differ_by_a_line() -> None:
    data = digits.load(0)
    parts = (data.train, data.validation, data.test)
    assert sum(len(part.digits) for part in parts) == 1797
    for task in TASKS:
        seen = data.test.of(task)
        changed = (seen.pixels != data.test.pixels).any(dim=0)
        assert int(changed.sum()) <= 8
        assert bool((seen.pixels[:, changed] == 1.0).all())
        assert torch.equal(seen.digits, data.test.digits)
    everything = torch.cat([part.pixels for part in parts])
    assert torch.equal(everything.sum(), torch.cat([part.pixels for part in parts[::-1]]).sum())
    assert not torch.equal(digits.load(1).test.digits, data.test.digits)
    assert torch.equal(digits.load(0).test.pixels, data.test.pixels)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, same, other = network(3), network(3), network(4)
    for a, b, c in zip(first.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_table_and_json_agree(results: Results) -> None:
    text = report.table(results)
    found = json.loads(json.dumps(report.as_json(results)))
    lines = [line for line in text.splitlines()[2:] if line]
    assert len(lines) == len(found["models"]) == len(results.rows)
    for line, model in zip(lines, found["models"], strict=True):
        assert line.startswith(model["name"])
        assert line.endswith(model["settings"])
        for accuracy in (*model["accuracy"].values(), model["average"]):
            assert f" {accuracy:.1f} " in line
    assert list(found["models"][0]["accuracy"]) == list(TASKS)
    assert found["validation"]["chosen"] == results.chosen


def test_summary_names_the_best_merge(results: Results) -> None:
    first = results.rows[-1]
    perfect = replace(first, tasks=(100.0, 100.0, 100.0))
    text = report.summary(replace(results, rows=(*results.rows[:-1], perfect)))
    assert f"Best merge: {first.name}, 100.0 %" in text


def test_the_command_prints_the_table_and_writes_its_files(
    results: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(experiment, "run", lambda seed, folder: replace(results, seed=seed))
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(out), "--seed", "5"]) == 0
    shown = capsys.readouterr()
    assert report.table(results) in shown.out
    assert shown.err == ""
    assert str(out / "demo.png") in shown.out
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "demo.png").stat().st_size > 20_000
    assert json.loads((out / "demo.json").read_text())["seed"] == 5
    assert main(["demo", "--out", str(out), "--seed", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "demo.json").read_text())


def test_a_folder_that_cannot_be_made_is_one_message(
    results: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(experiment, "run", lambda seed, folder: results)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["demo", "--out", str(blocked)]) == 1
    shown = capsys.readouterr()
    assert shown.err == f"tvfast: error: {blocked}: File exists\n"
    assert shown.out == ""
