"""Where and with what a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

import tvfast
from bench.limit import ROOT, LimitError, compiler
from tvfast.ops.raw import backend_statuses


def environment() -> dict[str, Any]:
    """Hardware, versions, instruction set and commit. None where something cannot be found out."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "huge_pages": _text(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pytest_benchmark": _version("pytest-benchmark"),
        "tvfast": tvfast.__version__,
        "compiler_of_limit": _compiler_version(),
        "backend": {status.name: status.detail for status in backend_statuses()},
        "isa": _isa(),
        "forced_isa": os.environ.get("TVFAST_ISA"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
    }


def load_average() -> list[float]:
    """Over 1, 5 and 15 minutes: near 0 before a run that can be trusted."""
    return list(os.getloadavg())


def _isa() -> str | None:
    try:
        from tvfast import _C_cpu
    except ImportError:
        return None
    return str(_C_cpu.default_isa())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _compiler_version() -> str | None:
    try:
        shown = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    except LimitError:
        return None
    return shown.partition("\n")[0] or None


def _text(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def _field(path: Path, name: str) -> str | None:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty() -> bool | None:
    changes = _git("status", "--porcelain")
    return None if changes is None else bool(changes)
