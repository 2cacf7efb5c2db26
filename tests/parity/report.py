"""Run every recipe through mergekit-yaml and `tvfast merge`, and write what was found.

    TVFAST_MERGEKIT_PYTHON=PEER/bin/python python -m tests.parity.report --work FOLDER

FOLDER keeps the families. Writes bench/results/parity.json, and docs/parity.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from bench.environment import environment
from tests.parity.page import page
from tests.parity.recipe_comparison import compare
from tests.parity.recipe_runs import (
    BFLOAT16,
    DISTINCT,
    FLOAT32,
    ROOT,
    VARIABLE,
    Kind,
    planned,
    run_mergekit,
    run_tvfast,
)
from tests.parity.recipe_sources import RANDOM, SOURCES, Source

RESULT = ROOT / "bench" / "results" / "parity.json"
PAGE = ROOT / "docs" / "parity.md"


def ordinary(source: Source) -> Kind:
    """bfloat16, where magnitudes tie; float32 where the choice among the tied entries moves others too.

    That is the case of sce's weights, and of the gains of random methods: with few values of |tau|, the
    roundings of a whole tensor flip together.
    """
    method = yaml.safe_load(source.file.read_text())["merge_method"]
    return FLOAT32 if method in ("sce", *RANDOM) else BFLOAT16


def compared(
    sources: Sequence[Source], kind: Kind, python: str, work: Path
) -> tuple[list[dict[str, Any]], Any]:
    """One record per recipe, and the peer's versions."""
    runs = planned(sources, kind, work / "families", work / "out")
    for run in runs:
        for out in (run.ours, run.theirs):
            shutil.rmtree(out, ignore_errors=True)
    peer = run_mergekit(python, runs, work)
    records = []
    for run, done in zip(runs, peer["runs"], strict=True):
        record: dict[str, Any] = {"recipe": run.source.name, "family": run.family.name}
        if "error" in done:
            records.append(record | {"differences": [f"mergekit-yaml failed: {done['error']}"]})
            continue
        try:
            run_tvfast(run)
            name = run.source.name
            records.append(compare(name, run.source.file, run.family, run.ours, run.theirs).record())
        except RuntimeError as error:
            records.append(record | {"differences": [str(error)]})
        shutil.rmtree(run.ours.parent)
    return records, {key: peer[key] for key in ("version", "torch")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 as the page promises, 1 something differs, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="tests.parity.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", action="append", choices=[source.name for source in SOURCES])
    options = parser.parse_args(arguments)
    python = os.environ.get(VARIABLE)
    if not python:
        parser.error(f"{VARIABLE} is not set; tests/parity/make_env.sh makes an environment")
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = [source for source in SOURCES if not options.recipe or source.name in options.recipe]
    records: list[dict[str, Any]] = []
    versions: Any = {}
    for kind in (DISTINCT, BFLOAT16, FLOAT32):
        mine = [source for source in chosen if kind in (DISTINCT, ordinary(source))]
        if mine:
            found, versions = compared(mine, kind, python, work)
            records += found
    for record in records:
        for difference in record["differences"]:
            print(f"{record['recipe']} on {record['family']}: {difference}", file=sys.stderr)
    if not options.recipe:
        result = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "peer": {"name": "mergekit", **versions},
            "environment": environment(),
            "comparisons": records,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(page(result))
        print(f"{RESULT}\n{PAGE}")
    return int(any(record["differences"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
