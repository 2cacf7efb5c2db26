"""Which device a merge runs on, and what says so."""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tvfast
from tests.conftest import load
from tests.engine.devices import recipe, small_units, using, write_family
from tests.engine.double import HostDouble
from tests.engine.test_plan import SUM, TIES, plan_of, tasks_of
from tvfast.cli.main import main
from tvfast.engine import device as devices
from tvfast.engine.device import NOMINAL, choose, no_driver
from tvfast.engine.plan import MiB
from tvfast.errors import ArgumentError, BackendError

__all__ = ["small_units"]

GB = 10**9


def test_ranks_of_a_machine_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no number is given; `cuda:1` is one for all."""
    asked = []

    def find(name: str) -> SimpleNamespace:
        asked.append(name)
        if name == "cuda:2":
            raise BackendError("device 'cuda:2' does not exist; found 2 GPU(s).")
        return SimpleNamespace(traits=SimpleNamespace(description="a card"))

    monkeypatch.setattr(devices, "no_driver", lambda: None)
    monkeypatch.setattr(devices, "find", find)
    for name, rank in (("auto", 0), ("auto", 1), ("cuda", 1), ("cuda:1", 0)):
        assert choose(name, rank).device is not None
    assert asked == ["cuda:0", "cuda:1", "cuda:1", "cuda:1"]
    assert choose("auto", 2).device is None
    with pytest.raises(BackendError, match="does not exist"):
        choose("cuda", 2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = write_family(tmp_path_factory.mktemp("family"), {"a": (30, 40), "b": (7,)})
    return recipe(root, "ties", {"density": 0.3})


# -- the driver -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "count", "says"),
    [
        (0, 2, None),
        (0, 0, "shows no GPU to this process"),
        (100, 0, "shows no GPU to this process"),
        (803, 0, r"does not start \(error 803\)"),
    ],
)
def test_the_driver_says_whether_there_is_a_gpu(
    code: int, count: int, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_count(found: Any) -> int:
        found._obj.value = count
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: code, cuDeviceGetCount=get_count)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(devices.os.path, "exists", lambda path: False)  # type: ignore[attr-defined]
    found = no_driver()
    assert found is None if says is None else re.search(says, str(found))


def test_without_a_driver_the_cpu_is_chosen_and_a_named_device_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "no_driver", lambda: "this machine has no NVIDIA driver (libcuda.so.1)")
    monkeypatch.setattr(devices, "find", lambda name: pytest.fail("torch was asked"))
    assert choose("cpu").why == "as asked"
    chosen = choose("auto")
    assert chosen.device is None
    assert chosen.why == "this machine has no NVIDIA driver (libcuda.so.1)"
    with pytest.raises(
        BackendError, match=r"^device 'cuda:1': this machine has no NVIDIA driver .*--device cpu"
    ):
        choose("cuda:1")


def test_a_gpu_that_no_backend_serves_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        raise BackendError("device 'cuda:0': no backend can run there (triton: old). Pass --device cpu.")

    monkeypatch.setattr(devices, "no_driver", lambda: None)
    monkeypatch.setattr(devices, "find", find)
    assert choose("auto").why == "device 'cuda:0': no backend can run there (triton: old)"
    with pytest.raises(BackendError, match="no backend can run there"):
        choose("cuda")


# -- merges ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_units")
def test_auto_takes_the_gpu_and_says_so(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(config))
    with using(HostDouble(load("cpp-scalar"))):
        report = tvfast.merge_checkpoints(config, tmp_path / "api")
        assert (report.device, report.device_why) == ("cuda:0", "a double")
        assert main(["merge", str(path), str(tmp_path / "out")]) == 0
        merged = capsys.readouterr().out
        assert main(["merge", str(path), str(tmp_path / "dry"), "--dry-run"]) == 0
        dry = capsys.readouterr().out
        assert main(["plan", str(path)]) == 0
        planned = capsys.readouterr().out
        assert main(["plan", str(path), "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert main(["merge", str(path), str(tmp_path / "cpu"), "--device", "cpu"]) == 0
        assert "Merged on cpu: as asked." in capsys.readouterr().out
    assert "Merged on cuda:0: a double." in merged
    assert " on cuda:0.\n" in merged, "the peak there"
    assert "To be merged on cuda:0: a double." in dry
    assert " of cuda:0.\n" in dry
    assert "device    cuda:0: a double" in planned
    assert f"({plan['device']['peak_bytes']} bytes), of which" in planned
    assert "backend cpp" in planned
    assert set(plan["estimate"]["terms_s"]) == {"disk", "cuda:0", "cpu"}
    assert plan["estimate"]["limited_by"] in plan["estimate"]["terms_s"]
    assert plan["device"]["ring_bytes"] + plan["device"]["scratch_bytes"] == plan["device"]["peak_bytes"]


@pytest.mark.usefixtures("small_units")
def test_auto_takes_the_cpu_where_the_gpu_has_too_little(config: dict[str, Any], tmp_path: Path) -> None:
    small = HostDouble(load("cpp-scalar"), total_bytes=1000)
    with using(small):
        report = tvfast.merge_checkpoints(config, tmp_path / "out")
        assert report.device == "cpu"
        assert report.device_why.startswith("cuda:0: a device memory of 900 bytes, which is what is free, is")
        assert "Pass" not in report.device_why
        with pytest.raises(ArgumentError, match="needs at least"):
            tvfast.merge_checkpoints(config, tmp_path / "other", device="cuda")
    assert not any(small.counts.values())


@pytest.mark.usefixtures("small_units")
def test_what_the_device_takes_of_the_host_counts(config: dict[str, Any], tmp_path: Path) -> None:
    device = HostDouble(load("cpp-scalar"))
    device.traits = replace(device.traits, host_bytes=400 * MiB)
    with using(device):
        with pytest.raises(ArgumentError, match=r"too little for this merge on cuda:0; it needs at least"):
            tvfast.plan(config, device="cuda", memory=300 * MiB)
        assert tvfast.plan(config, device="auto", memory=300 * MiB).device is None
        plan = tvfast.plan(config, device="cuda", memory=500 * MiB)
        assert 400 * MiB < plan.peak_bytes <= 500 * MiB


# -- plans of large models ------------------------------------------------------------------------------


def test_a_large_tensor_is_whole_on_the_device_only() -> None:
    """70 B in three models: little host memory is pinned, and everything is read once."""
    tasks = tasks_of([(128256, 8192), (28672, 8192), (8192, 8192), (8192,)] * 2, TIES)
    plan = plan_of(tasks, n_threads=16, device=NOMINAL["h100"])
    assert plan.n_passes == 1
    assert plan.device is not None
    assert plan.arena_bytes < 1300 * MiB
    largest = 5 * 2 * 128256 * 8192
    assert 2 * largest < plan.device.ring_bytes < 3 * largest
    assert plan.device.peak_bytes <= 0.9 * NOMINAL["h100"].free_bytes
    assert [unit.resident for unit in plan.units] == [True] * len(plan.units)
    little = plan_of(tasks, n_threads=16, device=NOMINAL["h100"], device_memory=4 * GB, memory=6 * GB)
    assert little.device is not None
    assert little.device.peak_bytes <= 4 * GB
    assert little.peak_bytes <= 6 * GB
    (note,) = little.device.notes
    assert note.startswith("2 tensors: measured on the CPU, combined on h100 in pieces; at once 't0' would")


def test_a_model_that_the_device_holds_is_ranked_there_in_one_pass() -> None:
    method = tvfast.methods.make_method("ties", density=0.2, dialect="paper")
    tasks = tasks_of([(3000, 3000)] * 5, method)
    assert plan_of(tasks, n_threads=4).n_passes == 2
    plan = plan_of(tasks, n_threads=4, device=NOMINAL["h100"])
    assert (plan.n_passes, [unit.resident for unit in plan.units]) == (1, [True])
    assert not plan.reasons


def test_small_models_take_what_they_need() -> None:
    plan = plan_of(tasks_of([(100, 100)], SUM), n_threads=4, device=NOMINAL["h100"])
    assert plan.device is not None
    assert plan.device.ring_bytes < MiB
    assert plan.arena_bytes < MiB
