"""Merges by scores on a device: STA and Fisher merging, however a tensor or a layer meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tvfast
from tests.conftest import load
from tests.engine.devices import (
    merge_on,
    scored_recipe,
    small_units,
    using,
    write_family,
    write_statistics,
)
from tests.engine.double import HostDouble
from tests.engine.test_device import kinds, merged
from tvfast.engine import device_plan
from tvfast.engine.device import OutOfDeviceMemory

__all__ = ["small_units"]

pytestmark = pytest.mark.usefixtures("small_units")

MiB = 2**20
SHAPES = {
    "embed.weight": (460, 700),
    "layers.0.norm.weight": (701,),
    "layers.0.up.weight": (450, 701),
    "layers.1.norm.weight": (701,),
    "layers.1.up.weight": (450, 701),
    "none.weight": (0, 7),
    "scalar": (),
}
"""The first, and a layer, are between four and five times 65536 elements, the smallest piece."""

METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sta", {"density": 0.3}, {"cross": "winner"}),
    ("sta", {"density": 0.3}, {"scope": "layer", "normalization": "l1", "tie": "index"}),
    ("sta", {"density": 0.2}, {"scope": "model", "normalization": "minmax", "cross": "exclude_others"}),
    ("sta_forget", {"density": 0.3, "lambda": 0.5}, {"source": "model"}),
    ("fisher", {}, {"dialect": "mergelm"}),
]
IDS = ["-".join([name, *own.values()]) for name, _, own in METHODS]
LAYERS, MODEL = METHODS[1], METHODS[2]

ROOMY: dict[str, int] = {}
SMALL_DEVICE = {"device_memory": 5 * MiB}
LITTLE = {"device_memory": 5 * MiB, "memory": 13 * MiB // 2}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_family(tmp_path_factory.mktemp("family"), SHAPES)
    write_statistics(root, SHAPES)
    return root


def config_of(root: Path, case: tuple[str, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    method, parameters, own = case
    return scored_recipe(root, method, parameters, **own)


@pytest.mark.parametrize(("method", "parameters", "own"), METHODS, ids=IDS)
def test_a_device_changes_no_bit_of_the_merge(
    family: Path, tmp_path: Path, method: str, parameters: dict[str, Any], own: dict[str, Any]
) -> None:
    config = scored_recipe(family, method, parameters, **own)
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    for number, memories in enumerate((ROOMY, SMALL_DEVICE, LITTLE)):
        device = HostDouble(load("cpp-scalar"), seed=number, resumable=number == 1)
        report = merge_on(device, config, tmp_path / str(number), **memories)
        assert merged(tmp_path / str(number)) == merged(tmp_path / "cpu"), memories
        assert report.device == "cuda:0"
        allowed = memories.get("device_memory", 10**9)
        assert 0 < report.device_peak_bytes <= report.planned_device_peak_bytes <= allowed
        assert all(device.counts.values())


@pytest.mark.parametrize(
    ("case", "memories", "expected"),
    [
        (METHODS[0], ROOMY, {"together", "through"}),
        (METHODS[0], SMALL_DEVICE, {"together", "in pieces"}),
        (LAYERS, ROOMY, {"together", "through"}),
        (LAYERS, SMALL_DEVICE, {"together", "in pieces"}),
        (LAYERS, LITTLE, {"together", "streamed"}),
        (MODEL, ROOMY, {"together", "through"}),
        (MODEL, LITTLE, {"together", "streamed"}),
    ],
)
def test_memory_decides_how_scores_meet_the_device(
    family: Path, case: Any, memories: dict[str, int], expected: set[str]
) -> None:
    config = config_of(family, case)
    with using(HostDouble(load("cpp-scalar"), resumable=False)):
        plan = tvfast.plan(config, device="cuda", **memories)
    assert kinds(plan) == expected
    assert plan.device is not None
    assert plan.device_why == "a double"
    assert plan.device.peak_bytes <= memories.get("device_memory", 10**9)
    assert plan.peak_bytes <= memories.get("memory", 10**9)
    assert bool(plan.device.notes) == ("through" not in expected)


@pytest.mark.parametrize("case", [METHODS[0], LAYERS, MODEL], ids=IDS[:3])
def test_a_computation_without_memory_keeps_a_group_together(family: Path, tmp_path: Path, case: Any) -> None:
    """What is ranked together is never halved: it is measured on the host, and combined in pieces."""
    config = config_of(family, case)
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")

    faults = [OutOfDeviceMemory("cuda:0: none left")]

    def fault(queue: str, number: int) -> None:
        if queue == "compute" and number == 1 and faults:
            raise faults.pop()

    device = HostDouble(load("cpp-scalar"), seed=3, fault=fault, resumable=False)
    merge_on(device, config, tmp_path / "out")
    assert (device.n_drains, faults) == (2, [])
    assert merged(tmp_path / "out") == merged(tmp_path / "cpu")


def test_what_is_an_operand_twice_is_uploaded_once(family: Path, tmp_path: Path) -> None:
    config = config_of(family, METHODS[3])
    uploaded = 0

    class Counting(HostDouble):
        def upload(self, transfers: Any) -> Any:
            nonlocal uploaded
            uploaded += sum(one.n_bytes for one in transfers)
            return super().upload(transfers)

    report = merge_on(Counting(load("cpp-scalar")), config, tmp_path / "out")
    n_copied = 2 * 3  # a tensor of three bytes in both models
    assert uploaded == report.read_bytes - n_copied


def test_scratch_of_scores_is_planned(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes more than kernels do, and the limit holds."""
    monkeypatch.setattr(device_plan, "SCRATCH_BYTES", 9 * MiB)
    config = config_of(family, LAYERS)
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    device = HostDouble(load("reference"), limit_scratch=True)
    report = merge_on(device, config, tmp_path / "out", device_memory=18 * MiB)
    assert merged(tmp_path / "out") == merged(tmp_path / "cpu")
    assert report.device_peak_bytes <= report.planned_device_peak_bytes <= 18 * MiB
