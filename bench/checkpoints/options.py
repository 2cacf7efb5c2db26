"""What the commands that time merges of a family take, and how their results begin."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.checkpoints.rows import ROWS
from bench.checkpoints.running import ROOT
from bench.environment import environment, load_average


def family_parser(program: str, about: str | None, *, rounds: bool = True) -> argparse.ArgumentParser:
    """`--family`, `--method`, `--out` and, where asked for, `--rounds`; `about` is the module's docstring."""
    parser = argparse.ArgumentParser(prog=program, description=(about or "").splitlines()[0])
    parser.add_argument("--family", type=Path, required=True)
    parser.add_argument("--method", action="append", choices=[row.method for row in ROWS], help="repeatable")
    if rounds:
        parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, the family as an absolute path; ends the process with status 2 if they are wrong."""
    options = parser.parse_args(arguments)
    options.family = options.family.resolve()
    if not (options.family / "family.json").exists():
        parser.error(f"--family {options.family}: no family.json there; bench.checkpoints.family writes one")
    if getattr(options, "rounds", 1) < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    return options


def beginning(what: str, family: Path) -> dict[str, Any]:
    """What a result says before its rows."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "what": what,
        "environment": environment(),
        "family": json.loads((family / "family.json").read_text()),
        "load_before": load_average(),
    }
