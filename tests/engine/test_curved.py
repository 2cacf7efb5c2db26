"""Checkpoint merges by curvature: the bits of the merge in memory, whatever the threads and after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tvfast
from tests.conftest import load
from tests.engine.devices import using
from tests.engine.double import HostDouble
from tvfast.curvature import Gaussian, collect, merge
from tvfast.errors import ArgumentError, MergeError, RecipeError, SolveError, StatisticsError

METHODS = ("regmean", "mats", "kfac")
WEIGHTS = (1.0, 2.0, 0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 7)
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        found: Tensor = self.head(h).mean(1)
        return found


def collected(model: nn.Module, path: Path, data: Tensor, **settings: Any) -> None:
    chosen: dict[str, Any] = {"convention": "mats", "kinds": ("linear", "norm"), **settings}
    collect(model, Gaussian(lambda m, x: m(x)), [data], path, **chosen)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(8)
    root = tmp_path_factory.mktemp("curved")
    base = Net()
    for k in range(4):
        model = Net()
        model.load_state_dict(base.state_dict())
        if k:
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
            collected(model, root / f"m{k}.stats", torch.randint(0, 11, (40, 5)))
        (root / f"m{k}").mkdir()
        save_file(
            {n: t.bfloat16() for n, t in model.state_dict().items()}, root / f"m{k}" / "model.safetensors"
        )
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(family: Path, method: str, **changes: Any) -> dict[str, Any]:
    sources = [
        {"model": str(family / f"m{k}"), "stats": str(family / f"m{k}.stats"), "parameters": {"weight": w}}
        for k, w in enumerate(WEIGHTS, start=1)
    ]
    return {"merge_method": method, "base_model": str(family / "m0"), "models": sources, **changes}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_bits_of_the_merge_in_memory(family: Path, tmp_path: Path, method: str) -> None:
    config = recipe(family, method)
    if method != "kfac":
        del config["base_model"]
    report = tvfast.merge_checkpoints(config, tmp_path / "one", threads=1)
    tvfast.merge_checkpoints(config, tmp_path / "many", threads=5)
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "many")]
    assert files[0] == files[1]
    models = [weights(family / f"m{k}") for k in range(4)]
    stats = [family / f"m{k}.stats" for k in (1, 2, 3)]
    expected = merge(models[0], models[1:], stats, method, weights=WEIGHTS, report=[])
    found = weights(tmp_path / "one")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(
        f"{method}: averaged, no factors: 1 tensor (embed.weight)." in line for line in report.warnings
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_without_a_base_and_with_parameters(family: Path, tmp_path: Path, method: str) -> None:
    own = {"shrink": 0.5} if method == "regmean" else {"shrink": 0.5, "iterations": 7, "tolerance": 0.001}
    config = recipe(family, method, parameters=own, out_dtype="float32")
    tvfast.merge_checkpoints(config, tmp_path / "out")
    models = [weights(family / f"m{k}") for k in range(4)]
    stats = [family / f"m{k}.stats" for k in (1, 2, 3)]
    wide = {name: tensor.float() for name, tensor in models[0].items()}
    expected = merge(wide, models[1:], stats, method, weights=WEIGHTS, report=[], **own)
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_plan_touches_no_sums(family: Path) -> None:
    plan = tvfast.plan(recipe(family, "mats"))
    assert plan.n_passes == 1
    described = {name: method for name, _, _, method in plan.tensors}
    assert described["up.weight"].startswith("mats weights=(1.0, 2.0, 0.5)")
    assert described["embed.weight"].startswith("linear")
    assert any(
        "averaged, vectors without factors: 2 tensors (head.bias, up.bias)" in w for w in plan.warnings
    )
    small = tvfast.plan(recipe(family, "task_arithmetic"))
    assert plan.peak_bytes > small.peak_bytes + 200 * 2**20  # torch
    assert any("reads no statistics" in w for w in small.warnings)


def test_too_little_memory_is_named(family: Path) -> None:
    with pytest.raises(ArgumentError, match=r"a memory of \d+ bytes is too little .* at least"):
        tvfast.plan(recipe(family, "mats"), memory=200 * 2**20)


def test_memory_stays_within_the_plan(tmp_path: Path) -> None:
    """Of a process that imports torch only for the merge: layers whose factors are larger than themselves."""
    torch.manual_seed(3)
    layer = nn.Linear(1500, 300, bias=False)
    for k in (1, 2):
        collect(
            layer,
            Gaussian(lambda m, x: m(x)),
            [torch.randn(64, 1500)],
            tmp_path / f"{k}.stats",
            convention="mats",
        )
        (tmp_path / f"m{k}").mkdir()
        save_file({"weight": layer.weight.detach() + k}, tmp_path / f"m{k}" / "model.safetensors")
    config = {
        "merge_method": "regmean",
        "models": [{"model": str(tmp_path / f"m{k}"), "stats": str(tmp_path / f"{k}.stats")} for k in (1, 2)],
    }
    code = (
        "import sys, json, tvfast\n"
        "r = tvfast.merge_checkpoints(json.loads(sys.argv[1]), sys.argv[2], threads=2)\n"
        "print(r.peak_bytes, r.planned_peak_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, planned = map(int, done.stdout.split())
    assert peak < planned


def test_threads_of_torch_are_as_before(family: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    tvfast.merge_checkpoints(recipe(family, "regmean"), tmp_path / "out")
    assert torch.get_num_threads() == 2


def test_a_failed_merge_goes_on_after_the_cause_is_gone(family: Path, tmp_path: Path) -> None:
    """A Gram matrix of zeros stops the merge and is named; with other statistics it is another merge."""
    bad = tmp_path / "bad.stats"
    model = Net()
    with torch.no_grad():
        model.up.weight.zero_()
        model.up.bias.fill_(-1.0)
    collected(model, bad, torch.randint(0, 11, (8, 5)))
    config = recipe(family, "regmean")
    for source in config["models"]:
        source["stats"] = str(bad)
    with pytest.raises(SolveError, match=r"tensor 'down\.weight': the matrix is zero"):
        tvfast.merge_checkpoints(config, tmp_path / "out", threads=1)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(MergeError):
        tvfast.merge_checkpoints(recipe(family, "regmean"), tmp_path / "out", resume=True)
    tvfast.merge_checkpoints(recipe(family, "regmean"), tmp_path / "out", overwrite=True)
    tvfast.merge_checkpoints(recipe(family, "regmean"), tmp_path / "other")
    assert tvfast.merge_checkpoints(recipe(family, "regmean"), tmp_path / "out", resume=True).finished_before
    assert all(
        torch.equal(tensor, weights(tmp_path / "other")[name])
        for name, tensor in weights(tmp_path / "out").items()
    )


def test_bad_statistics_are_named_before_a_tensor_is_read(family: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, config: dict[str, Any]) -> None:
        with pytest.raises(error, match=match):
            tvfast.plan(config)

    config = recipe(family, "mats")
    del config["models"][1]["stats"]
    refused(RecipeError, r"models\[1\].* has no stats; method 'mats' needs a statistics file", config)
    config = recipe(family, "mats")
    config["models"][1]["stats"] = str(tmp_path / "nowhere")
    refused(StatisticsError, "nowhere", config)
    other = nn.Sequential(nn.Linear(3, 2))
    collect(other, Gaussian(lambda m, x: m(x)), [torch.randn(4, 3)], tmp_path / "other.stats")
    config["models"][1]["stats"] = str(tmp_path / "other.stats")
    refused(StatisticsError, r"is of parameter '0.weight', which .*m2 has not \(1 of 1\)", config)
    narrow = Net()
    narrow.head = nn.Linear(24, 6)
    collected(narrow, tmp_path / "narrow.stats", torch.randint(0, 11, (8, 5)))
    config["models"][1]["stats"] = str(tmp_path / "narrow.stats")
    refused(StatisticsError, r"'head.weight' has shape \[6, 24\], the model's has \[7, 24\]", config)
    refused(RecipeError, "iterations", recipe(family, "mats", parameters={"iterations": 0.5}))


def test_stats_of_a_slice(family: Path, tmp_path: Path) -> None:
    """A method parameter per tensor, by filters, reaches the tensors that it names."""
    parameters = {"shrink": [{"filter": "up", "value": 0.1}, {"value": 1.0}]}
    tvfast.merge_checkpoints(recipe(family, "regmean", parameters=parameters), tmp_path / "out")
    models = [weights(family / f"m{k}") for k in range(4)]
    stats = [family / f"m{k}.stats" for k in (1, 2, 3)]
    for name, shrink in (("up.weight", 0.1), ("down.weight", 1.0)):
        expected = merge(models[0], models[1:], stats, "regmean", weights=WEIGHTS, shrink=shrink, report=[])
        assert torch.equal(weights(tmp_path / "out")[name], expected[name])


def test_a_device_that_is_named_is_refused_and_one_that_is_found_is_left_alone(
    family: Path, tmp_path: Path
) -> None:
    config = recipe(family, "mats")
    with using(HostDouble(load("cpp-scalar"))) as device:
        with pytest.raises(ArgumentError, match=r"cuda:0: method 'mats' solves equations on the CPU only"):
            tvfast.merge_checkpoints(config, tmp_path / "out", device="cuda")
        assert not (tmp_path / "out").exists()
        report = tvfast.merge_checkpoints(config, tmp_path / "out", device="auto")
    assert report.device == "cpu"
    assert report.device_why.startswith("cuda:0: method 'mats' solves equations on the CPU only: ")
    assert "Pass" not in report.device_why
    assert not any(device.counts.values())
