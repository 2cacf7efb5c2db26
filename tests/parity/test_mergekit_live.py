"""The same comparisons against a mergekit that runs now, in its own environment (make_env.sh)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.parity import random_draws
from tests.parity.comparison import check_arc, check_case, check_checkpoint, load

pytestmark = pytest.mark.slow

VARIABLE = "TVFAST_MERGEKIT_PYTHON"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of generate_mergekit.py, made by the peer's interpreter."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"set {VARIABLE} to a Python that has mergekit; tests/parity/make_env.sh makes one")
    out = tmp_path_factory.mktemp("mergekit")
    script = Path(__file__).with_name("generate_mergekit.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([python, script, out], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return out


def test_merge_equals_mergekit(generated: Path) -> None:
    golden = load(generated / "deterministic.npz")
    for case in golden.record["cases"]:
        check_case(golden, case)


def test_slerp_on_a_wide_arc_is_no_farther_from_the_formula_than_mergekit(generated: Path) -> None:
    golden = load(generated / "arcs.npz")
    for arc in golden.record["arcs"]:
        check_arc(golden, arc)


def test_merge_equals_mergekit_yaml(generated: Path) -> None:
    golden = load(generated / "checkpoint.npz")
    for method in golden.record["recipes"]:
        check_checkpoint(golden, method)


def test_draws_are_distributed_as_mergekits(generated: Path) -> None:
    golden = load(generated / "random.npz")
    for case in golden.record["cases"]:
        random_draws.check(golden, case)
