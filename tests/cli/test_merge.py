"""`tvfast merge` and `tvfast plan` end to end: the same bits as `tvfast.merge`, reports, status, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast as package
from tests.cli.families import (
    CONFIG,
    INDEX,
    Family,
    digest,
    load,
    make_family,
    recipe,
    shapes,
    tvfast,
)
from tvfast.cli.estimate import CPU_GB_S, HOST_GB_S, JOIN_S, LINK_GB_S, READ_GB_S, START_S, WRITE_GB_S
from tvfast.cli.main import main

WEIGHTS = {"ft1": {"weight": 1.0}, "ft2": {"weight": 0.5}, "ft3": {"weight": -0.25}}


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe, and the call on state dicts that it must equal. `lambda` of the recipe is `scale` there."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=lambda: WEIGHTS)
    base: str | None = "base"

    @property
    def arguments(self) -> dict[str, Any]:
        found = {"scale" if name == "lambda" else name: value for name, value in self.parameters.items()}
        weights = [numbers["weight"] for numbers in self.models.values() if "weight" in numbers]
        return {**found, **({"weights": weights} if weights else {})}


CASES = [
    Case("linear", base=None),
    Case("linear", {"normalize": False}, base=None),
    Case("task_arithmetic", {"lambda": 0.7}),
    Case("ties", {"density": 0.3, "lambda": 1.1}),
    Case("dare_linear", {"density": 0.6}),
    Case("dare_ties", {"density": 0.6}),
    Case("della_linear", {"density": 0.6, "epsilon": 0.2}),
    Case("della", {"density": 0.6, "epsilon": 0.2}),
    Case("breadcrumbs", {"density": 0.8, "gamma": 0.05}),
    Case("breadcrumbs_ties", {"density": 0.8, "gamma": 0.05}),
    Case("sce", {"select_topk": 0.4}, {"ft1": {}, "ft2": {}, "ft3": {}}),
    Case("slerp", {"t": 0.3}, {"base": {}, "ft1": {}}),
    Case("passthrough", {"scale": 0.5}, {"ft2": {}}, base=None),
]


def expected_of(case: Case, family: Family) -> dict[str, Tensor]:
    models = [family.tensors[name] for name in case.models if name != "base"]
    return package.merge(family.base, models, method=case.method, **case.arguments)


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def write(tmp_path: Path, text: str) -> Path:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    return config


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method} {case.parameters}")
def test_files_merge_to_the_bits_of_state_dicts(
    case: Case, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe(family, case.method, base=case.base, models=case.models, parameters=case.parameters)
    before = digest(family.root)
    out = tmp_path / "out"
    assert main(["merge", str(write(tmp_path, text)), str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith(f"{out}: {len(shapes())} tensors in 1 shard, ")
    assert_same_bits(load(out), expected_of(case, family))
    assert digest(family.root) == before
    assert not (out / ".tvfast").exists()


def test_out_dtype_is_rounded_once(family: Family, tmp_path: Path) -> None:
    text = recipe(family, "ties", models=WEIGHTS, parameters={"density": 0.3}, out_dtype="float32")
    assert main(["merge", str(write(tmp_path, text)), str(tmp_path / "out")]) == 0
    wide = {name: tensor.float() for name, tensor in family.base.items()}
    expected = package.merge(wide, family.models, method="ties", density=0.3, weights=[1.0, 0.5, -0.25])
    assert_same_bits(load(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "float32" in (config.get("dtype"), config.get("torch_dtype"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_storage_types(dtype: torch.dtype, tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", dtype)
    word = str(dtype).removeprefix("torch.")
    text = recipe(family, "della", models=WEIGHTS, parameters={"density": 0.5}, dtype=word)
    assert main(["merge", str(write(tmp_path, text)), str(tmp_path / "out")]) == 0
    expected = package.merge(
        family.base, family.models, method="della", density=0.5, weights=[1.0, 0.5, -0.25]
    )
    assert_same_bits(load(tmp_path / "out"), expected)


def test_pytorch_files_merge_to_the_same_bits(family: Family, tmp_path: Path) -> None:
    """Every member as `pytorch_model.bin`; its output is safetensors all the same."""
    for name, tensors in family.tensors.items():
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
    text = recipe(Family(tmp_path, family.tensors), "ties", models=WEIGHTS, parameters={"density": 0.3})
    assert main(["merge", str(write(tmp_path, text)), str(tmp_path / "out")]) == 0
    expected = package.merge(family.base, family.models, "ties", density=0.3, weights=[1.0, 0.5, -0.25])
    assert_same_bits(load(tmp_path / "out"), expected)


def test_layers_can_be_stacked(family: Family, tmp_path: Path) -> None:
    parts = [("ft1", [0, 2]), ("ft2", [1, 3])]
    slices = [{"sources": [{"model": str(family.path(m)), "layer_range": span}]} for m, span in parts]
    text = json.dumps({"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"})
    assert main(["merge", str(write(tmp_path, text)), str(tmp_path / "out")]) == 0
    merged = load(tmp_path / "out")
    layers = [("ft1", 0), ("ft1", 1), ("ft2", 1), ("ft2", 2)]
    for new, (member, old) in enumerate(layers):
        for name, tensor in family.tensors[member].items():
            if name.startswith(f"model.layers.{old}."):
                assert torch.equal(merged[name.replace(f"layers.{old}.", f"layers.{new}.")], tensor)
    assert torch.equal(merged["model.embed_tokens.weight"], family.models[0]["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], family.models[1]["lm_head.weight"])
    assert len(merged) == 3 + 5 * len(layers)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == len(layers)


def test_the_seed_of_the_command_is_the_seed_of_the_merge(family: Family, tmp_path: Path) -> None:
    config = write(tmp_path, recipe(family, "dare_ties", models=WEIGHTS, parameters={"density": 0.5}))
    merged = {}
    for seed in (0, 5):
        assert main(["merge", str(config), str(tmp_path / f"{seed}"), "--seed", str(seed)]) == 0
        merged[seed] = load(tmp_path / f"{seed}")
        expected = package.merge(
            family.base,
            family.models,
            method="dare_ties",
            density=0.5,
            weights=[1.0, 0.5, -0.25],
            seed=seed,
        )
        assert_same_bits(merged[seed], expected)
    assert not torch.equal(merged[0]["lm_head.weight"], merged[5]["lm_head.weight"])


def test_threads_and_memory_change_no_byte(family: Family, tmp_path: Path) -> None:
    config = write(tmp_path, recipe(family, "della", models=WEIGHTS, parameters={"density": 0.5}))
    found = []
    for number, extra in enumerate((["--threads", "1"], ["--threads", "3"], ["--memory", "1G"])):
        assert main(["merge", str(config), str(tmp_path / f"{number}"), *extra]) == 0
        found.append(digest(tmp_path / f"{number}"))
    assert found[0] == found[1] == found[2]


def test_the_output_is_a_model_directory(family: Family, tmp_path: Path) -> None:
    text = recipe(family, "ties", models=WEIGHTS, parameters={"density": 0.3})
    out = tmp_path / "out"
    assert main(["merge", str(write(tmp_path, text)), str(out)]) == 0
    base = family.path("base")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (
        json.loads((out / "config.json").read_text()).items()
        >= {key: value for key, value in CONFIG.items() if "dtype" not in key}.items()
    )
    assert (out / "mergekit_config.yml").read_text() == text
    assert text.strip() in (out / "README.md").read_text()
    # equal inputs give equal bytes, card and index included
    assert main(["merge", str(tmp_path / "config.yaml"), str(tmp_path / "again")]) == 0
    assert digest(tmp_path / "again") == digest(out)


def test_shards_and_their_index(family: Family, tmp_path: Path) -> None:
    text = recipe(family, "ties", models=WEIGHTS, parameters={"density": 0.3}, out_shard_size="3KB")
    out = tmp_path / "out"
    assert main(["merge", str(write(tmp_path, text)), str(out)]) == 0
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((out / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in load(out).values())
    assert_same_bits(
        load(out), package.merge(family.base, family.models, "ties", density=0.3, weights=[1.0, 0.5, -0.25])
    )


def test_json_is_one_object_that_agrees_with_the_files(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, recipe(family, "ties", models=WEIGHTS))
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "--json", "--report", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    n_bytes = sum(t.numel() * t.element_size() for t in family.base.values())
    assert found["out"] == str(out)
    assert found["n_tensors"] == len(shapes())
    assert found["read_bytes"] == 4 * n_bytes
    assert found["n_passes"] == 1
    assert found["shards"] == sorted(path.name for path in out.glob("*.safetensors"))
    assert found["finished_before"] is False
    assert found["resumed_bytes"] == 0
    assert n_bytes <= found["written_bytes"] <= sum(path.stat().st_size for path in out.iterdir())
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == found


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, recipe(family, "ties", models=WEIGHTS))
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] is True
    assert found["plan"]["tensors"] == len(shapes())
    assert main(["merge", str(config), str(out), "--dry-run"]) == 0
    assert f"nothing written; {len(shapes())} tensors in 1 shard" in capsys.readouterr().out
    assert not out.exists()


def test_resume_on_nothing_and_on_a_finished_directory(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, recipe(family, "ties", models=WEIGHTS))
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "--resume"]) == 0
    first = digest(out)
    capsys.readouterr()
    assert main(["merge", str(config), str(out), "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert digest(out) == first


def test_overwrite_replaces_and_nothing_else_does(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(write(tmp_path, recipe(family, "ties", models=WEIGHTS))), str(out)]) == 0
    first = digest(out)
    config = write(tmp_path, recipe(family, "task_arithmetic", models=WEIGHTS))
    assert main(["merge", str(config), str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert digest(out) == first
    assert main(["merge", str(config), str(out), "--overwrite"]) == 0
    assert_same_bits(
        load(out), package.merge(family.base, family.models, "task_arithmetic", weights=[1.0, 0.5, -0.25])
    )


def test_a_foreign_key_is_one_warning(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that another method of mergekit takes, and this one does not."""
    text = recipe(family, "slerp", models={"base": {}, "ft1": {}}, parameters={"t": 0.5, "int8_mask": True})
    assert main(["merge", str(write(tmp_path, text)), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tvfast: warning: ")
    assert "int8_mask" in lines[0]


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "CONFIG", "OUT"],
        ["merge", "CONFIG", "OUT", "--device", "cpu"],
        ["plan", "CONFIG"],
        ["plan", "CONFIG", "--device", "h100"],
    ],
)
def test_the_command_imports_no_framework(command: list[str], family: Family, tmp_path: Path) -> None:
    config = write(tmp_path, recipe(family, "dare_ties", models=WEIGHTS, parameters={"density": 0.5}))
    names = {"CONFIG": str(config), "OUT": str(tmp_path / "out")}
    arguments = [names.get(word, word) for word in command]
    code = (
        f"import sys\nfrom tvfast.cli.main import main\nassert main({arguments!r}) == 0\n"
        "print([name for name in ('torch', 'numpy', 'safetensors', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert done.stderr == ""


def test_help_gives_every_option_of_merge() -> None:
    done = tvfast("merge", "--help")
    assert done.returncode == 0
    for option in (
        *("--device", "--threads", "--memory", "--device-memory", "--resume", "--overwrite", "--dry-run"),
        *("--seed", "--nonfinite", "--report", "--json"),
    ):
        assert option in done.stdout


def test_plan_estimates_time_from_the_disk(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, recipe(family, "ties", models=WEIGHTS))

    def plan(*arguments: str) -> dict[str, Any]:
        assert main(["plan", str(config), "--json", *arguments]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = plan("--disk", "0.5")
    n_bytes = found["read_bytes"] + found["write_bytes"]
    assert found["read_bytes"] == 4 * sum(t.numel() * t.element_size() for t in family.base.values())
    assert found["estimate"]["seconds"] == pytest.approx(START_S + n_bytes / 0.5e9)
    assert found["estimate"]["limited_by"] == "disk"
    several = plan("--disk", "0.5", "--ranks", "8", "--network", "0.1")
    shared = several["estimate"]
    moved = sum(rank["read_bytes"] + rank["write_bytes"] for rank in several["ranks"])
    assert (shared["limited_by"], shared["seconds"]) == (
        "network",
        pytest.approx(START_S + JOIN_S + moved / 0.1e9),
    )
    slow = plan("--disk", "1000", "--threads", "1")["estimate"]
    beside = found["read_bytes"] / READ_GB_S + found["write_bytes"] / WRITE_GB_S
    assert (slow["limited_by"], slow["seconds"]) == (
        "cpu",
        pytest.approx(START_S + (found["ranks"][0]["by_method"]["ties"] / CPU_GB_S["ties"] + beside) / 1e9),
    )
    linked = plan("--disk", "1000", "--device", "h100", "--threads", "16")["estimate"]
    assert (linked["limited_by"], linked["seconds"]) == (
        "h100",
        pytest.approx(START_S + n_bytes / 1e9 / LINK_GB_S["h100"]),
    )
    assert linked["terms_s"] == pytest.approx(
        {
            "disk": n_bytes / 1e12,
            "h100": n_bytes / 1e9 / LINK_GB_S["h100"],
            "cpu": n_bytes / 1e9 / HOST_GB_S / 16,
        }
    )
    checked = plan("--disk", "1000", "--device", "h100", "--threads", "1")["estimate"]
    assert (checked["limited_by"], checked["seconds"]) == (
        "cpu",
        pytest.approx(START_S + n_bytes / 1e9 / HOST_GB_S),
    )
    assumed = plan()["estimate"]
    assert any("2 GB/s" in one and "--disk" in one for one in assumed["assumed"])
    assert {row["name"] for row in found["tensor_methods"]} == set(shapes())
    assert all(row["method"].startswith("ties") for row in found["tensor_methods"])
    assert main(["plan", str(config)]) == 0
    text = capsys.readouterr().out
    assert f"({found['peak_bytes']} bytes)" in text
    assert "assuming disk 2 GB/s" in text


def test_plan_takes_its_rate_from_a_report(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write(tmp_path, recipe(family, "ties", models=WEIGHTS)))
    report = tmp_path / "report.json"
    assert main(["merge", config, str(tmp_path / "out"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)

    def plan(*arguments: str) -> tuple[int, Any]:
        status = main(["plan", config, "--like", str(report), "--json", "--device", "cpu", *arguments])
        said = capsys.readouterr()
        return status, said.err if status else json.loads(said.out)["estimate"]

    report.write_text(json.dumps(made))
    status, rates = plan()
    assert (status, rates["limited_by"], rates["disk_gb_s"]) == (0, "machine", None)
    planned = package.plan(config).as_json()
    moved = planned["read_bytes"] + planned["write_bytes"]  # headers too, which the report does not count
    gb_per_s = (made["read_bytes"] + made["written_bytes"]) / 1e9 / made["seconds"]
    assert rates["seconds"] == pytest.approx(START_S + moved / 1e9 / gb_per_s)
    assert any(str(report) in one for one in rates["assumed"])
    ranks = [{"read_bytes": 10**9, "written_bytes": 0}, {"read_bytes": 10**9, "written_bytes": 10**9}]
    report.write_text(json.dumps({**made, "ranks": ranks, "seconds": 1.0}))
    works = package.plan(config, ranks=2).as_json()["ranks"]
    longest = max(work["read_bytes"] + work["write_bytes"] for work in works)
    assert plan("--ranks", "2")[1]["seconds"] == pytest.approx(START_S + JOIN_S + longest / 2e9)
    slow_disk = plan("--disk", "0.00001")[1]
    assert slow_disk["limited_by"] == "disk"
    assert set(slow_disk["terms_s"]) == {"disk", "machine"}
    for wrong, named in (
        ({**made, "resumed_bytes": 1}, "did not make all"),
        ({**made, "dry_run": True}, "did not make all"),
        ({**made, "device": "cuda:0"}, "merged on cuda:0"),
        ({key: value for key, value in made.items() if key != "seconds"}, "'seconds'"),
        ([], "is not what"),
    ):
        report.write_text(json.dumps(wrong))
        status, said = plan()
        assert status == 2
        assert str(report) in said
        assert named in said
    report.write_text("merged")
    assert "is not what" in plan()[1]
    report.unlink()
    assert "No such file" in plan()[1]


def test_plan_tells_of_every_rank(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write(tmp_path, recipe(family, "ties", models=WEIGHTS)))
    assert main(["plan", config, "--json", "--ranks", "2", "--disk", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    ranks, rates = found["ranks"], found["estimate"]
    assert sum(rank["read_bytes"] for rank in ranks) == found["read_bytes"]
    assert sum(rank["write_bytes"] for rank in ranks) == package.plan(config).layout.n_bytes - len(
        package.plan(config).layout.shards[0].header
    )
    longest = max(rank["read_bytes"] + rank["write_bytes"] for rank in ranks)
    assert rates["seconds"] == pytest.approx(START_S + JOIN_S + longest / 0.5e9)
    assert rates["tensor_collectives"] == 0
    assert all(rank["peak_bytes"] > found["peak_bytes"] for rank in ranks)  # torch comes with ranks
    assert main(["plan", config, "--ranks", "2"]) == 0
    assert "ranks     2, each reads" in capsys.readouterr().out
    assert main(["plan", config, "--ranks", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"][0]["read_bytes"] == found["read_bytes"]


def test_every_method_has_a_rate() -> None:
    assert set(CPU_GB_S) == {*package.methods.METHODS, "copy"}


def test_a_run_is_within_the_memory_that_plan_printed(family: Family, tmp_path: Path) -> None:
    config = write(tmp_path, recipe(family, "della", models=WEIGHTS, parameters={"density": 0.5}))
    planned = json.loads(tvfast("plan", config, "--json").stdout)
    done = json.loads(tvfast("merge", config, tmp_path / "out", "--json").stdout)
    assert done["peak_bytes"] <= planned["peak_bytes"]


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_stopped_run_says_how_to_continue(number: signal.Signals, word: str, tmp_path: Path) -> None:
    """Stopped in the middle, by a progress display that waits; then `--resume` gives the same bytes."""
    family = make_family(tmp_path / "family")
    config = write(tmp_path, recipe(family, "ties", models=WEIGHTS))
    out, started = tmp_path / "out", tmp_path / "started"
    code = (
        "import signal, sys, time, pathlib\nfrom tvfast.cli import main, progress\n"
        # a shell's background jobs ignore it
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(self, n_bytes):\n"
        f"    pathlib.Path({str(started)!r}).touch()\n"
        "    time.sleep(0.5)\n"
        "progress.TerminalProgress.read = wait\n"
        f"sys.exit(main.main(['merge', {str(config)!r}, {str(out)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not started.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err == f"tvfast: error: {word}; to continue: tvfast merge {config} {out} --resume\n"
    assert not list(out.glob("*.safetensors"))
    assert main(["merge", str(config), str(out), "--resume"]) == 0
    assert main(["merge", str(config), str(tmp_path / "whole")]) == 0
    assert digest(out) == digest(tmp_path / "whole")
