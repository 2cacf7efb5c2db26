"""TIES over a whole model of 58 million parameters against a FusionBench that runs now."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.checkpoints.family import PRESETS, Family
from tests.parity.comparison import ulps
from tests.parity.fusion_bench import check_trim, merged, vector

pytestmark = pytest.mark.slow

VARIABLE = "TVFAST_FUSION_BENCH_PYTHON"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    Family(PRESETS["60m"]).write(folder)
    return folder


@pytest.fixture(scope="module")
def peers(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What generate_fusion_bench.py writes, made by the peer's interpreter."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"set {VARIABLE}; tests/parity/make_fusion_bench_env.sh makes an environment")
    out = tmp_path_factory.mktemp("fusion_bench")
    script = Path(__file__).with_name("generate_fusion_bench.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, script, family, out], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def record(peers: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((peers / "record.json").read_text())
    return found


def test_trim_keeps_what_fusion_bench_keeps(family: Path, record: dict[str, Any], tmp_path: Path) -> None:
    check_trim(family, tmp_path, record)


@pytest.mark.parametrize("function", ["sum", "mean", "max"])
def test_merge_equals_fusion_bench(
    family: Path, peers: Path, record: dict[str, Any], tmp_path: Path, function: str
) -> None:
    out = merged(family, tmp_path, record["members"], record, function, record["scale"])
    wanted = np.load(peers / f"vector-{function}.npy")
    # By value: where nothing is added to a base of -0, the peer's max adds -0 and ours +0.
    n_apart = np.count_nonzero(out != wanted)
    assert not n_apart, f"{n_apart} of {out.size} entries differ, by up to {ulps(out, wanted).max()} ulp"
    # Where something was added, its sign is the elected one.
    change = np.sign(wanted - vector(family / "base"))
    signs = np.load(peers / "signs.npy")
    assert np.array_equal(change[change != 0], signs[change != 0])
