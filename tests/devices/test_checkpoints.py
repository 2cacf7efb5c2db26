"""Checkpoints merged by kernels for GPUs on a double of a device: the CPU's bytes, within planned scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tvfast
from tests.engine.devices import (
    merge_on,
    recipe,
    scored_recipe,
    small_units,
    write_family,
    write_statistics,
)
from tests.engine.double import HostDouble
from tvfast.engine import device_plan
from tvfast.ops.raw import Backend

__all__ = ["small_units"]

SHAPES = {"a.weight": (5, 33), "b.weight": (7,), "c.weight": (2, 50)}


def merged_as_on_the_cpu(
    device: HostDouble, config: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> tvfast.checkpoints.Report:
    """The report of a merge on the device that gave the CPU's bytes, within the scratch that was planned."""
    with monkeypatch.context() as patch:
        patch.delenv("TVFAST_BACKEND")
        tvfast.merge_checkpoints(config, place / "cpu", device="cpu")
    report = merge_on(device, config, place / "out")
    expected = (place / "cpu" / "model.safetensors").read_bytes()
    assert (place / "out" / "model.safetensors").read_bytes() == expected
    assert device.n_drains == 1, "scratch was planned"
    return report


@pytest.mark.skipif(torch.cuda.is_available(), reason="a double is memory of the CPU")
@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    ("method", "parameters", "own"),
    [
        ("ties", {"density": 0.3}, {}),
        ("ties", {"density": 0.3}, {"tie": "ge"}),
        ("ties", {"density": 0.3}, {"dialect": "paper"}),
        ("della", {"density": 0.5, "epsilon": 0.1}, {}),
    ],
    ids=["ties", "ties-ge", "ties-paper", "della"],
)
def test_kernels_merge_checkpoints_on_a_device(
    tmp_path: Path,
    gpu: Backend,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    parameters: dict[str, Any],
    own: dict[str, Any],
) -> None:
    monkeypatch.setattr(device_plan, "SCRATCH_BYTES", 0)  # what is planned is what the tensors need
    config = recipe(write_family(tmp_path / "family", SHAPES), method, parameters, **own)
    device = HostDouble(gpu, limit_scratch=True)
    report = merged_as_on_the_cpu(device, config, tmp_path, monkeypatch)
    assert device.peak_scratch > 0
    assert report.device_peak_bytes <= report.planned_device_peak_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="a double is memory of the CPU")
@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    ("method", "parameters", "own"),
    [
        ("sta", {"density": 0.3}, {"cross": "winner", "tie": "index"}),
        ("sta", {"density": 0.2}, {"scope": "model", "normalization": "minmax"}),
        ("sta_forget", {"density": 0.3}, {"source": "model"}),
        ("fisher", {}, {}),
    ],
    ids=["sta", "sta-model", "sta_forget", "fisher"],
)
def test_scores_are_read_on_a_device(
    tmp_path: Path,
    gpu: Backend,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    parameters: dict[str, Any],
    own: dict[str, Any],
) -> None:
    monkeypatch.setattr(device_plan, "SCRATCH_BYTES", 0)
    root = write_family(tmp_path / "family", SHAPES)
    write_statistics(root, SHAPES)
    config = scored_recipe(root, method, parameters, **own)
    device = HostDouble(gpu, limit_scratch=True)
    report = merged_as_on_the_cpu(device, config, tmp_path, monkeypatch)
    assert report.device_peak_bytes <= report.planned_device_peak_bytes
