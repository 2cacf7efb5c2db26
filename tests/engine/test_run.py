"""Whole merges: the bits of an in-memory merge, however the work is divided, killed and continued."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tvfast.engine import plan as planning
from tvfast.engine.shards import ShardFiles
from tvfast.errors import MergeError, OutputError

SHAPES = {
    "embed.weight": (701, 4099),
    "norm.weight": (4099,),
    "proj.weight": (300, 1000),
    "tail.weight": (3, 5),
}
MEMBERS = ("base", "ft1", "ft2", "ft3")


def members() -> dict[str, dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=drawn) * 0.02 for name, shape in SHAPES.items()}
    found = {"base": {name: tensor.bfloat16() for name, tensor in base.items()}}
    for member in MEMBERS[1:]:
        found[member] = {
            name: (tensor.float() + torch.randn(tensor.shape, generator=drawn) * 1e-3).bfloat16()
            for name, tensor in found["base"].items()
        }
    for tensors in found.values():
        tensors["steps"] = torch.tensor([1, 2, 3])
    return found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    for member, tensors in members().items():
        (root / member).mkdir()
        save_file(tensors, root / member / "model.safetensors", {"format": "pt"})
    return root


def recipe(family: Path, method: str, parameters: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(family / "base"),
        "models": [{"model": str(family / m), "parameters": {"weight": 1.0}} for m in MEMBERS[1:]],
        "parameters": parameters,
        "tvfast": own,
    }


METHODS = [
    ("task_arithmetic", {}, {}),
    ("ties", {"density": 0.3}, {}),
    ("ties", {"density": 0.3}, {"tie": "index"}),
    ("ties", {"density": 0.3}, {"dialect": "paper"}),
    ("ties", {"density": 0.3}, {"dialect": "fusion_bench_max"}),
    ("dare_ties", {"density": 0.5}, {}),
    ("della", {"density": 0.5, "epsilon": 0.1}, {}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, {}),
    ("sce", {"select_topk": 0.5}, {}),
]
IDS = [f"{name}-{'-'.join(own.values())}" for name, _, own in METHODS]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that cut and stream tensors of megabytes, as real ones do with gigabytes."""
    monkeypatch.setattr(planning, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(planning, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(planning, "RANK_BYTES", 0)
    monkeypatch.setattr(planning, "STREAM_BYTES", 0)
    monkeypatch.setattr(planning, "UNIT_BYTES", 2**20)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(("method", "parameters", "own"), METHODS, ids=IDS)
def test_memory_and_threads_change_no_bit_of_the_merge(
    family: Path, tmp_path: Path, method: str, parameters: dict[str, Any], own: dict[str, Any]
) -> None:
    config = recipe(family, method, parameters, **own)
    large = tvfast.merge_checkpoints(config, tmp_path / "large", threads=2)
    small = tvfast.merge_checkpoints(config, tmp_path / "small", threads=3, memory=5 * 2**20)
    whole = own.get("dialect") in ("paper", "fusion_bench_max")
    assert small.n_passes > 1 or method == "task_arithmetic"
    assert large.n_passes == (2 if whole else 1)
    merged = (tmp_path / "large" / "model.safetensors").read_bytes()
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == merged
    found = load_file(tmp_path / "large" / "model.safetensors")
    tensors = members()
    expected = tvfast.merge(tensors["base"], [tensors[m] for m in MEMBERS[1:]], method, **parameters, **own)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("memory", [None, 5 * 2**20])
def test_a_value_that_is_not_finite_is_named_and_may_go_through(
    family: Path, tmp_path: Path, memory: int | None
) -> None:
    broken = members()["ft2"]
    broken["embed.weight"].view(-1)[2_000_003] = float("nan")
    (tmp_path / "ft2").mkdir()
    save_file(broken, tmp_path / "ft2" / "model.safetensors")
    config = recipe(family, "ties", {"density": 0.3})
    config["models"][1]["model"] = str(tmp_path / "ft2")
    says = r"ft2/model.safetensors: tensor 'embed.weight' holds NaN or infinity at element 2000003"
    with pytest.raises(MergeError, match=says):
        tvfast.merge_checkpoints(config, tmp_path / "out", memory=memory)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    tvfast.merge_checkpoints(config, tmp_path / "out", memory=memory, nonfinite="propagate", resume=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")["embed.weight"].view(-1)
    assert merged.isnan().nonzero().tolist() == [[2_000_003]]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("memory", [None, 5 * 2**20])
def test_a_result_that_its_type_cannot_hold_is_named(
    family: Path, tmp_path: Path, memory: int | None
) -> None:
    config = recipe(family, "ties", {"density": 0.3, "lambda": 3e7}) | {"out_dtype": "float16"}
    says = r"tensor '(embed|norm|proj|tail).weight': element \d+ of the result .* too large for float16"
    with pytest.raises(MergeError, match=says):
        tvfast.merge_checkpoints(config, tmp_path / "out", memory=memory)
    tvfast.merge_checkpoints(config, tmp_path / "out", memory=memory, nonfinite="propagate", resume=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["embed.weight"].isinf().any()


def test_integers_that_differ_are_refused(family: Path, tmp_path: Path) -> None:
    other = members()["ft1"]
    other["steps"][1] = 5
    (tmp_path / "ft1").mkdir()
    save_file(other, tmp_path / "ft1" / "model.safetensors")
    config = recipe(family, "task_arithmetic", {})
    config["models"][0]["model"] = str(tmp_path / "ft1")
    with pytest.raises(MergeError, match=r"tensor 'steps' \(I64\) differs"):
        tvfast.merge_checkpoints(config, tmp_path / "out")


def test_an_input_that_changes_under_the_merge_is_refused(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ft1").mkdir()
    path = tmp_path / "ft1" / "model.safetensors"
    save_file(members()["ft1"], path)
    config = recipe(family, "task_arithmetic", {})
    config["models"][0]["model"] = str(tmp_path / "ft1")
    write = ShardFiles.write

    def touch_then_write(self: ShardFiles, *arguments: Any) -> None:
        os.utime(path, ns=(1, 1))
        write(self, *arguments)

    monkeypatch.setattr(ShardFiles, "write", touch_then_write)
    with pytest.raises(MergeError, match="was modified since the merge was planned"):
        tvfast.merge_checkpoints(config, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("own", [{}, {"dialect": "paper"}], ids=["tensor", "model"])
def test_no_space_left_at_any_write_and_resume_gives_the_same_bytes(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any]
) -> None:
    config = recipe(family, "ties", {"density": 0.3}, **own)
    tvfast.merge_checkpoints(config, tmp_path / "whole", memory=5 * 2**20)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    write = ShardFiles.write
    n_left = 0

    def fail_after(self: ShardFiles, *arguments: Any) -> None:
        nonlocal n_left
        if n_left == 0:
            raise OutputError("no space left")
        n_left -= 1
        write(self, *arguments)

    monkeypatch.setattr(ShardFiles, "write", fail_after)
    n_failures = 0
    drawn = random.Random(3)
    while n_failures < 50:
        n_left = drawn.choice([0, 1, 2])
        try:
            report = tvfast.merge_checkpoints(config, tmp_path / "out", memory=5 * 2**20, resume=True)
        except OutputError:
            n_failures += 1
            assert not (tmp_path / "out" / "model.safetensors").exists()
            continue
        break
    assert n_failures > 2
    assert report.resumed_bytes > 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def kill_and_resume(family: Path, out: Path, n_kills: int, seed: int) -> None:
    """Run the command, kill it at a random moment, and again, until it was killed so often; let it end."""
    config = family / "recipe.yml"
    config.write_text(
        "merge_method: ties\n"
        f"base_model: {family / 'base'}\n"
        "models:\n"
        + "".join(f"  - model: {family / m}\n    parameters: {{weight: 1.0}}\n" for m in MEMBERS[1:])
        + "parameters: {density: 0.3}\n"
    )
    command = [sys.executable, "-m", "tvfast", "merge", str(config), str(out), "--resume", "--threads", "1"]
    began = time.perf_counter()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    longest = time.perf_counter() - began
    drawn = random.Random(seed)
    killed = 0
    while killed < n_kills:
        if drawn.random() < 0.3 or (out / "model.safetensors").exists():
            shutil.rmtree(out, ignore_errors=True)  # a kill may have come before it was made
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(drawn.uniform(0.02, longest)) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("n_kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    family: Path, tmp_path: Path, n_kills: int
) -> None:
    tvfast.merge_checkpoints(recipe(family, "ties", {"density": 0.3}), tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    kill_and_resume(family, tmp_path / "out", n_kills, seed=n_kills)
    assert not (tmp_path / "out" / ".tvfast").exists()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
