"""Families for the recipes, and both programs run on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.checkpoints.family import PRESETS, TORCH_NAMES, Family
from tests.parity.recipe_comparison import peer_recipe
from tests.parity.recipe_sources import Source

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "TVFAST_MERGEKIT_PYTHON"


@dataclass(frozen=True)
class Kind:
    """How the inputs of a run are stored."""

    name: str
    dtype: str
    distinct: bool = False

    def preset(self, source: Source) -> str:
        """Recipes that fit any depth of 8 layers get, unless `distinct`, matrices of ordinary size."""
        return "60m" if source.preset == "8-layers" and not self.distinct else source.preset


DISTINCT = Kind("distinct", "f32", distinct=True)
BFLOAT16 = Kind("bf16", "bf16")
FLOAT32 = Kind("f32", "f32")


@dataclass(frozen=True)
class Run:
    """One recipe on one family: where it runs and where the outputs go."""

    source: Source
    family: Path
    stored: str  # torch's name of the inputs' type
    ours: Path
    theirs: Path


def planned(sources: Sequence[Source], kind: Kind, families: Path, work: Path) -> list[Run]:
    """One run per recipe; a family is made if it is not there."""
    runs = []
    for source in sources:
        preset = kind.preset(source)
        family = families / f"{preset}-{kind.name}"
        if not (family / "family.json").exists():
            Family(PRESETS[preset], dtype=kind.dtype, distinct=kind.distinct).write(family)
        out = work / family.name / source.name
        runs.append(Run(source, family, TORCH_NAMES[kind.dtype], out / "tvfast", out / "mergekit"))
    return runs


def run_tvfast(run: Run, *options: str) -> None:
    """`tvfast merge` in the family's folder, where the recipe's names lead to members.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "tvfast", "merge", str(run.source.file), str(run.ours), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=run.family, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{run.source.name}: tvfast merge ended with {done.returncode}: {done.stderr.strip()}"
        )


def run_mergekit(python: str, runs: Sequence[Run], work: Path) -> dict[str, Any]:
    """mergekit-yaml on every run, in float32 with our output type; versions, and seconds or error per run."""
    jobs = []
    for run in runs:
        recipe = yaml.safe_load(run.source.file.read_text())
        path = run.theirs.with_suffix(".yml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            yaml.safe_dump(peer_recipe(recipe, run.family, run.stored, run.source.computed), sort_keys=False)
        )
        jobs.append({"recipe": str(path), "out": str(run.theirs), "cwd": str(run.family)})
    listed = work / "jobs.json"
    listed.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("run_mergekit.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [python, str(script), str(listed)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{python} {script.name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
