"""What the engine plans for the kernels' workspace is what they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices.test_checkpoints import merged_as_on_the_cpu
from tests.engine.devices import recipe, small_units, write_family
from tests.engine.double import HostDouble
from tvfast.engine import device_plan
from tvfast.engine.device_plan import MOST_SORT_BYTES, QUERY_BYTES, SORT_ITEM_BYTES, selected
from tvfast.program import Keep

__all__ = ["small_units"]


def table(module: Any, n: int, row: int = 0) -> Any:
    """One tensor of n entries, of which nothing is in memory."""
    native = module.Table(1)
    native.add((0, 0), [(0, 1)], (0, 0), [], [], [], n, row, 0, 0, 0, 0, 0, False)
    return native


@pytest.mark.parametrize("n", [1, 16_384, 16_385, 50_000, 65_536, 10**6, 13_000_001, 10**8, 10**9, 10**12])
def test_keys_of_a_query(emulated: Any, n: int) -> None:
    module = emulated._module
    asked = module.ResidentQueries(table(module, n), int(Keep.BAND), [(0, 0, (n + 1) // 2)], module.LIMITS)
    planned = 4 * sum(selected(n)) + 16384 + QUERY_BYTES
    assert planned - QUERY_BYTES < asked.n_workspace <= planned


@pytest.mark.parametrize("row", [0, 1000, 28_672, 2**24, 2**28])
def test_rows_that_are_sorted(emulated: Any, row: int) -> None:
    n = 2**28
    ranks = emulated._module.ResidentRanks(table(emulated._module, n, row), 0, 0)
    assert 0 < ranks.n_workspace <= max(MOST_SORT_BYTES, SORT_ITEM_BYTES * (row or n))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a double is memory of the CPU")
@pytest.mark.usefixtures("small_units")
def test_a_large_tensor_is_measured_within_planned_scratch(
    emulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are collected there, which take more than its bins."""
    monkeypatch.setattr(device_plan, "SCRATCH_BYTES", 0)
    root = write_family(tmp_path / "family", {"a.weight": (300, 1000)})
    device = HostDouble(emulated, limit_scratch=True)
    report = merged_as_on_the_cpu(device, recipe(root, "ties", {"density": 0.3}), tmp_path, monkeypatch)
    assert report.device_peak_bytes <= report.planned_device_peak_bytes
