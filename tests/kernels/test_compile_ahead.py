"""Kernels compile for GPUs that are not here, in a process of its own: this one may interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import missing

ROOT = Path(__file__).resolve().parents[2]

_LOADS_AND_FAULTS = """
from dataclasses import replace
from tvfast.kernels.compile_ahead import _faults, compile_one, specialisations
(ties,) = [one for one in specialisations() if one.label == "combine ties, 2 models"]
found = compile_one(ties, 90)
print(found.faults, "ld.global.v4.b32" in found.ptx, "st.global.v4.b32" in found.ptx)
print(list(_faults(ties, "add.ftz.f32 div.full.f32 fma.rn.f32", 1)))
squeezed = replace(ties, options={**ties.options, "maxnreg": 24})
print(*(compile_one(squeezed, architecture).faults for architecture in (80, 90)))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    probe = subprocess.run(
        [sys.executable, "-c", "import tvfast.kernels.compile_ahead"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        missing("triton", probe.stderr.strip().splitlines()[-1])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_loads_are_of_16_bytes_and_faults_are_named() -> None:
    done = python("-c", _LOADS_AND_FAULTS)
    assert done.returncode == 0, done.stderr
    code, faults, squeezed = done.stdout.splitlines()
    assert code == "() True True"
    assert squeezed == "('spills registers',) ('spills registers',)"
    for word in ("spills", "subnormals", "division", "contracts"):
        assert word in faults


@pytest.mark.parametrize(("only", "code"), [("pick", 0), ("no such kernel", 1)])
def test_the_command(only: str, code: int) -> None:
    done = python("-m", "tvfast.kernels.compile_ahead", "--only", only)
    assert done.returncode == code, done.stderr
    assert f"{2 if code == 0 else 0} kernels for 2 architectures, 0 with faults" in done.stdout
