"""Sweeps: the bits of merged files at every point, thresholds measured once, rows that survive."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tvfast
from tests.collection.models import bert, llama, saved
from tvfast.errors import CheckpointError, EvaluationError, OutputError, RecipeError
from tvfast.live.remembering import RememberingBackend
from tvfast.sweeping import preview, read_sweep, run
from tvfast.sweeping.loading import load_tensors

Configured = Callable[..., dict[str, Any]]
GRID = {"lambda": [0.5, 1.0], "density": [0.2, 0.6], "weight[1]": [0.3, 1.0]}


@pytest.fixture(autouse=True)
def fresh_functions() -> None:
    sys.modules.pop("_tvfast_sweep_functions", None)


def of_files(sweep: Any, row: Any, folder: Path) -> dict[str, torch.Tensor]:
    tvfast.merge_checkpoints(sweep.recipe_at(row.parameters), folder, overwrite=True, device="cpu")
    return load_tensors(str(folder), "cpu")


@pytest.mark.parametrize(
    ("method", "axes"),
    [
        ("ties", GRID),
        ("dare_ties", {"density": [0.5], "seed": [1, 2], "lambda": [0.5, 1.0]}),
        ("linear", {"weight[0]": [0.5, 2.0]}),
        ("task_arithmetic", {"weight": [-1.0, 1.0]}),
        ("sce", {"select_topk": [0.3, 0.9]}),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_live_merges_have_the_bits_of_files(
    configured: Configured, tmp_path: Path, method: str, axes: dict[str, Any], dtype: str
) -> None:
    recipe: dict[str, Any] = {"merge_method": method, "dtype": dtype}
    if method in ("linear", "task_arithmetic", "sce"):
        recipe["parameters"] = {}
    if method == "linear":
        recipe["base_model"] = None
    sweep = read_sweep(configured(axes, "digest", recipe=recipe))
    outcome = run(sweep, tmp_path / "out", device="cpu")
    assert len(outcome.rows) == sweep.n_points
    assert {row.measured for row in outcome.rows} <= {"new", "reused"}
    from tests.sweeping.conftest import FUNCTIONS

    names: dict[str, Any] = {}
    exec(FUNCTIONS, names)
    for row in outcome.rows:
        expected = names["digest"](of_files(sweep, row, tmp_path / "merged"))
        assert row.metrics == {"value": float(expected)}, row
    assert len({row.metrics["value"] for row in outcome.rows}) == sweep.n_points


def test_thresholds_are_measured_once_per_setting(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the backend is asked; two densities, eight points."""
    searches: list[int] = []
    ask = RememberingBackend.thresholds

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        before = len(self._answers)
        found = ask(self, *arguments, **named)
        searches.append(len(self._answers) - before)
        return found

    monkeypatch.setattr(RememberingBackend, "thresholds", counted)
    outcome = run(read_sweep(configured(GRID)), tmp_path / "out", device="cpu")
    assert [row.measured for row in outcome.rows] == ["new", *["reused"] * 3] * 2
    assert sum(searches) == 2
    assert outcome.as_json()["merges"] == {"new": 2, "reused": 6, "files": 0}


def test_tables_picture_and_best_recipe(configured: Configured, tmp_path: Path) -> None:
    sweep = read_sweep(configured(GRID, minimise="norm"))
    outcome = run(sweep, tmp_path / "out", device="cpu")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert list(lines[0]) == [
        *("point", "lambda", "density", "weight[1]", "norm", "first", "measured", "merge_s", "evaluate_s"),
        "error",
    ]
    assert [float(line["norm"]) for line in lines] == [row.metrics["norm"] for row in outcome.rows]
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert found["sweep"]["axes"] == GRID
    assert [row["metrics"] for row in found["rows"]] == [row.metrics for row in outcome.rows]
    least = min(range(8), key=lambda k: outcome.rows[k].metrics["norm"])
    assert outcome.best is outcome.rows[least]
    assert found["best"] == least
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
    recipe = tvfast.load_recipe(tmp_path / "out" / "best.yml")
    assert recipe.parameters["density"].values == {outcome.rows[least].parameters["density"]}
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("axes", "more"),
    [
        ({"lambda": [0.5, 1.0, 1.5]}, {}),
        ({"lambda": [0.5, 1.0], "density": [0.2, 0.5, 1.0]}, {"maximise": "norm"}),
        ({"lambda": {"from": 0, "to": 1}, "density": [0.2, 0.5]}, {"search": "random", "points": 4}),
        (
            {"lambda": {"from": 0.1, "to": 1, "log": True}, "weight[0]": {"from": 0, "to": 2}},
            {"search": "cma", "points": 8, "minimise": "norm", "seed": 3},
        ),
    ],
)
def test_searches(configured: Configured, tmp_path: Path, axes: Any, more: dict[str, Any]) -> None:
    if more.get("search") == "cma":
        pytest.importorskip("cma", reason="CMA-ES is the package cma's")
    sweep = read_sweep(configured(axes, **more))
    outcome = run(sweep, tmp_path / "out", device="cpu")
    assert len(outcome.rows) == sweep.n_points
    assert outcome.picture is not None
    assert outcome.picture.stat().st_size > 5000
    assert (outcome.best is None) == (sweep.objective is None)
    again = run(sweep, tmp_path / "again", device="cpu")
    assert [(r.parameters, r.metrics) for r in again.rows] == [
        (r.parameters, r.metrics) for r in outcome.rows
    ]


@pytest.mark.parametrize("search", ["grid", "cma"])
@pytest.mark.parametrize("cut", [0, 5])
def test_a_run_that_was_cut_off_goes_on(
    configured: Configured, tmp_path: Path, search: str, cut: int
) -> None:
    """Killed within a write: the row that is not whole is made again."""
    axes: dict[str, Any] = {"lambda": {"from": 0.2, "to": 1.0, "number": 9}}
    more: dict[str, Any] = {"minimise": "norm"}
    if search == "cma":
        pytest.importorskip("cma", reason="CMA-ES is the package cma's")
        axes = {"lambda": {"from": 0.2, "to": 1.0}, "weight": {"from": 0, "to": 1}}
        more |= {"search": "cma", "points": 9}
    sweep = read_sweep(configured(axes, **more))
    whole = run(sweep, tmp_path / "whole", device="cpu")
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "rows.jsonl").write_text("".join(lines[:5]) + lines[5][:cut])
    seen: list[int] = []
    again = run(
        sweep, tmp_path / "cut", resume=True, device="cpu", progress=lambda row, n: seen.append(row.point)
    )
    assert seen == [4, 5, 6, 7, 8]
    assert again.n_before == 4
    assert [(r.parameters, r.metrics) for r in again.rows] == [(r.parameters, r.metrics) for r in whole.rows]
    assert json.loads((tmp_path / "cut" / "table.json").read_text())["best"] == whole.best.point  # type: ignore[union-attr]
    finished = run(sweep, tmp_path / "cut", resume=True, device="cpu")
    assert finished.n_before == 9


@pytest.mark.parametrize("written", [0, 7, 40])
def test_a_run_that_was_stopped_within_its_first_write_goes_on(
    configured: Configured, tmp_path: Path, written: int
) -> None:
    sweep = read_sweep(configured({"lambda": [1.0]}))
    run(sweep, tmp_path, device="cpu")
    before = (tmp_path / "rows.jsonl").read_bytes()
    for path in tmp_path.glob("table.*"):
        path.unlink()
    (tmp_path / "rows.jsonl").write_bytes(before[:written])
    assert run(sweep, tmp_path, resume=True, device="cpu").n_before == 0


@pytest.mark.parametrize("name", ["table.csv", "table.json", "table.png", "best.yml"])
def test_files_of_others_are_not_touched(configured: Configured, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match=f"{name}: is there already; .* Pass --overwrite"):
            run(read_sweep(configured({"lambda": [1.0]})), tmp_path, resume=resume, device="cpu")
    assert (tmp_path / name).read_text() == "mine"


def test_another_sweeps_table_is_not_touched(configured: Configured, tmp_path: Path) -> None:
    run(read_sweep(configured({"lambda": [1.0]})), tmp_path, device="cpu")
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(
        OutputError, match=r"rows.jsonl: is there already; expected a new folder. Pass --resume"
    ):
        run(read_sweep(configured({"lambda": [1.0]})), tmp_path, device="cpu")
    with pytest.raises(OutputError, match=r"was made with another axes; expected the same sweep"):
        run(read_sweep(configured({"lambda": [2.0]})), tmp_path, resume=True, device="cpu")
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    (tmp_path / "rows.jsonl").write_text("not a table\n")
    with pytest.raises(OutputError, match="is no table of a sweep"):
        run(read_sweep(configured({"lambda": [2.0]})), tmp_path, resume=True, device="cpu")
    (tmp_path / "best.yml").write_text("of another sweep")
    outcome = run(read_sweep(configured({"lambda": [2.0]})), tmp_path, overwrite=True, device="cpu")
    assert len(outcome.rows) == 1
    assert not (tmp_path / "best.yml").exists()


def test_a_function_that_fails_stops_and_leaves_its_rows(configured: Configured, tmp_path: Path) -> None:
    sweep = read_sweep(configured({"lambda": [1.0, 2.0, 3.0, 4.0]}, "fails"))
    message = r"point 2 \(lambda 3\): .*functions.py:fails raised KeyError in functions.py, line \d+: 'mine'"
    with pytest.raises(EvaluationError, match=message):
        run(sweep, tmp_path / "out", device="cpu")
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 3


def test_a_function_that_exits_fails(configured: Configured, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"exits raised SystemExit in functions.py, line \d+: 0"):
        run(read_sweep(configured({"lambda": [1.0]}, "exits")), tmp_path / "out", device="cpu")


def test_numbers_that_json_has_not_are_texts(configured: Configured, tmp_path: Path) -> None:
    outcome = run(read_sweep(configured({"lambda": [1.0]}, "odd", maximise="good")), tmp_path, device="cpu")
    found = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert found["best"]["metrics"] == {"good": 1.0, "bad": "nan", "large": "inf"}


def test_failures_can_be_recorded(configured: Configured, tmp_path: Path) -> None:
    sweep = read_sweep(configured({"lambda": [1.0, 2.0, 3.0]}, "fails", on_error="record", maximise="value"))
    outcome = run(sweep, tmp_path / "out", device="cpu")
    assert [row.error is None for row in outcome.rows] == [True, True, False]
    assert "raised KeyError" in str(outcome.rows[2].error)
    assert outcome.best is outcome.rows[0]
    assert outcome.as_json()["failed"] == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "returned a NoneType; expected a number, or a mapping"),
        ("words", "'good', returned a str; expected a number"),
        ("changing", "returned metric 2, and metric 1 before"),
        ("taken", "the metric 'lambda' has the name of another column"),
    ],
)
def test_what_a_function_must_not_return(
    configured: Configured, tmp_path: Path, function: str, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        run(read_sweep(configured({"lambda": [1.0, 2.0]}, function)), tmp_path / "out", device="cpu")


def test_an_objective_that_is_not_returned(configured: Configured, tmp_path: Path) -> None:
    sweep = read_sweep(configured({"lambda": [1.0]}, maximise="accuracy"))
    with pytest.raises(EvaluationError, match="returned norm, first; expected 'accuracy', the objective"):
        run(sweep, tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}/none.py:f", "none.py cannot be imported .FileNotFoundError"),
        ("{}/functions.py:norms", "has no function 'norms'; it has .*norm"),
        ("{}/bad.py:f", "bad.py cannot be imported .ZeroDivisionError"),
        ("no_such_module_of_mine:f", "no_such_module_of_mine cannot be imported .ModuleNotFoundError"),
    ],
)
def test_functions_that_are_not_there(
    configured: Configured, tmp_path: Path, reference: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    sweep = read_sweep(configured({"lambda": [1.0]}, evaluate=reference.format(tmp_path)))
    with pytest.raises(RecipeError, match=message):
        preview(sweep, device="cpu")


def test_a_function_of_a_module_in_the_working_directory(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_scores_of_merges.py").write_text("def score(tensors):\n    return len(tensors)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sweep = read_sweep(configured({"lambda": [1.0]}, evaluate="my_scores_of_merges:score"))
    outcome = run(sweep, "out", device="cpu")
    assert outcome.rows[0].metrics == {"value": 18.0}


@pytest.mark.parametrize(
    ("recipe", "axes", "why"),
    [
        ({"merge_method": "slerp", "models": 1, "parameters": {}}, {"t": [0.2, 0.8]}, "has no weights"),
        ({"parameters": {"density": [0.2, 0.8]}}, {"lambda": [0.5, 1.0]}, "numbers differ between layers"),
        ({"tvfast": {"on_missing": "base"}}, {"lambda": [0.5, 1.0]}, "models may lack tensors"),
        (
            {"merge_method": "lata", "tvfast": {"instruct": "ft3"}, "parameters": {}, "models": 2},
            {"lambda": [0.5, 1.0]},
            "compares with an instruct model",
        ),
    ],
)
def test_what_is_not_merged_live_goes_through_files(
    configured: Configured, family: Any, tmp_path: Path, recipe: dict[str, Any], axes: Any, why: str
) -> None:
    if recipe.get("models") == 2:
        models = [{"model": str(family.path(name)), "parameters": {"weight": 1.0}} for name in ("ft1", "ft2")]
        recipe = {**recipe, "models": models, "tvfast": {"instruct": str(family.path("ft3"))}}
    if recipe.get("models") == 1:
        recipe = {
            **recipe,
            "models": [{"model": str(family.path("base"))}, {"model": str(family.path("ft1"))}],
        }
    sweep = read_sweep(configured(axes, "digest", recipe=recipe))
    assert why in str(preview(sweep, device="cpu").why_files)
    mine = tmp_path / "out" / "merged" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("of another merge")
    outcome = run(sweep, tmp_path / "out", device="cpu")
    assert {row.measured for row in outcome.rows} == {"files"}
    assert len({row.metrics["value"] for row in outcome.rows}) == 2
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["merged"]
    assert mine.read_text() == "of another merge"


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes that transformers reads, with tied weights."""
    folder = tmp_path_factory.mktemp("modules")
    base = llama(tie_word_embeddings=True)
    return [saved(folder, f"llama{k}", lambda: llama(tie_word_embeddings=True), k, base) for k in range(3)]


def test_modules_tensors_and_folders_agree(
    configured: Configured, modules: list[Path], tmp_path: Path
) -> None:
    recipe = {
        "base_model": str(modules[0]),
        "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in modules[1:]],
        "dtype": "float32",
    }
    digests = {}
    for receives, function in (("state_dict", "digest"), ("folder", "of_folder")):
        sweep = read_sweep(configured({"density": [0.3, 1.0]}, function, recipe=recipe, receives=receives))
        digests[receives] = [r.metrics for r in run(sweep, tmp_path / receives, device="cpu").rows]
    assert digests["state_dict"] == digests["folder"]
    sweep = read_sweep(configured({"density": [0.3, 1.0]}, "of_module", recipe=recipe, receives=None))
    seen = preview(sweep, device="cpu")
    assert (seen.receives, seen.why_files, seen.n_measured) == ("model", None, 2)
    live = [row.metrics for row in run(sweep, tmp_path / "live", device="cpu").rows]
    by_files = {**recipe, "tvfast": {"on_missing": "base"}}
    sweep = read_sweep(configured({"density": [0.3, 1.0]}, "of_module", recipe=by_files, receives="model"))
    assert live == [row.metrics for row in run(sweep, tmp_path / "loaded", device="cpu").rows]


def test_what_cannot_be_loaded_as_a_module(configured: Configured, tmp_path: Path) -> None:
    folder, other = (saved(tmp_path, name, bert, 1) for name in ("bert", "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    recipe = {"base_model": str(folder), "models": [{"model": str(other), "parameters": {"weight": 1.0}}]}
    sweep = read_sweep(configured({"lambda": [1.0]}, recipe=recipe, receives=None))
    with pytest.raises(
        CheckpointError, match=r"names the architecture 'NoSuchModel'.*Set receives: state_dict"
    ):
        run(sweep, tmp_path / "out", device="cpu")


def test_nan_is_refused_as_in_files(configured: Configured, family: Any, tmp_path: Path) -> None:
    from tests.cli.families import write_checkpoint

    broken = {name: tensor.clone() for name, tensor in family.models[0].items()}
    broken["model.norm.weight"][3] = torch.nan
    write_checkpoint(tmp_path / "broken", broken)
    models = [{"model": str(tmp_path / "broken"), "parameters": {"weight": 1.0}}]
    with pytest.raises(CheckpointError, match=r"broken: tensor 'model.norm.weight' has a NaN or an infinity"):
        run(
            read_sweep(configured({"lambda": [1.0]}, recipe={"models": models})), tmp_path / "o", device="cpu"
        )
    recipe = {"models": models, "tvfast": {"nonfinite": "propagate"}}
    outcome = run(
        read_sweep(configured({"lambda": [1.0]}, "first", recipe=recipe)), tmp_path / "p", device="cpu"
    )
    assert outcome.rows[0].metrics["value"] == outcome.rows[0].metrics["value"]
