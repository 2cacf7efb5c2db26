"""LATA on a device: what is ranked together stays together, and the bytes are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tvfast
from tests.conftest import load
from tests.engine.devices import merge_on, small_units, write_family
from tests.engine.double import HostDouble
from tests.engine.test_device import merged
from tests.engine.test_device_scored import LITTLE, ROOMY, SHAPES, SMALL_DEVICE

__all__ = ["small_units"]

pytestmark = pytest.mark.usefixtures("small_units")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"), SHAPES)


@pytest.mark.parametrize(
    ("own", "parameters"),
    [
        ({"drop": "linear", "outside": "whole"}, {"weight": 0.5}),
        ({"drop": "logarithmic", "granularity": "tensor", "outside": "ranked", "target": "base"}, {}),
        ({"direction": "forget"}, {"sigma": 0.01, "lambda": 0.5}),
    ],
    ids=str,
)
def test_a_device_changes_no_bit_of_the_merge(
    family: Path, tmp_path: Path, own: dict[str, str], parameters: dict[str, Any]
) -> None:
    config = {
        "merge_method": "lata",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / "ft1")}],
        "parameters": parameters,
        "tvfast": {"instruct": str(family / "ft2"), **own},
    }
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    for number, memories in enumerate((ROOMY, SMALL_DEVICE, LITTLE)):
        device = HostDouble(load("cpp-scalar"), seed=number, resumable=number == 1)
        report = merge_on(device, config, tmp_path / str(number), **memories)
        assert merged(tmp_path / str(number)) == merged(tmp_path / "cpu"), memories
        assert 0 < report.device_peak_bytes <= report.planned_device_peak_bytes
