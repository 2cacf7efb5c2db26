"""Every case with and without the integration in the peer's own interpreter: equal, counted, restored."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench.checkpoints.family import PRESETS, Family

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {
    "TVFAST_PEFT_PYTHON": "peft",
    "TVFAST_MERGEKIT_PYTHON": "mergekit",
    "TVFAST_MERGEKIT_0_1_4_PYTHON": "mergekit",
    "TVFAST_FUSION_BENCH_PYTHON": "fusion_bench",
    "TVFAST_SD_MECHA_PYTHON": "sd_mecha",
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_peer_gives_the_same_with_and_without(variable: str, tmp_path: Path) -> None:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"set {variable}; tests/integrations/make_env.sh makes an environment")
    name = VARIABLES[variable]
    record = tmp_path / "record.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = [python, str(Path(__file__).with_name("live.py")), name, str(record)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(record.read_text())
    assert len(results) >= 50
    wrong = [
        one
        for one in results
        if not (one["form"] and one["restored"] and one["served"] and 0 <= one["apart"] <= one["allowed"])
    ]
    assert not wrong, json.dumps(wrong[:10], indent=1)


def test_mergekits_whole_run_through_the_engine(tmp_path: Path) -> None:
    python = os.environ.get("TVFAST_MERGEKIT_PYTHON")
    if not python:
        pytest.skip("set TVFAST_MERGEKIT_PYTHON; tests/integrations/make_env.sh makes an environment")
    Family(PRESETS["8-layers"]).write(tmp_path / "family")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = [python, str(Path(__file__).with_name("engine.py")), str(tmp_path / "family"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record == {"names": True, "different": [], "stats": {"run_merge": 1}, "left": {}}
