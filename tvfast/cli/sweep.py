"""`tvfast sweep`: a recipe at many points, the caller's function on each merge, a table and a picture."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvfast.cli.merge import device
from tvfast.cli.quantities import bytes_as_text, counted, seconds_as_text, whole_number
from tvfast.cli.signals import stoppable

if TYPE_CHECKING:
    from tvfast.sweeping import Row

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "sweep",
        help="merge at many points, call a function on each merge, write a table and a picture",
        description="Vary numbers of a recipe over a grid, at random or by CMA-ES, call a Python function "
        "on each merge, and write what it returns as CSV and JSON, with a picture. Rows are kept as they "
        "finish.",
    )
    command.add_argument(
        "config", metavar="CONFIG", help="recipe, axes and function, YAML; see docs/sweep.md"
    )
    command.add_argument(
        "--out", metavar="DIR", help="folder of the table (what CONFIG says, or CONFIG's name)"
    )
    command.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="auto|cpu|cuda[:i]",
        help="where models are (%(default)s)",
    )
    command.add_argument(
        "--threads", type=whole_number, default=0, metavar="N", help="of the merges; 0: all cores"
    )
    existing = command.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the rows that are in DIR")
    existing.add_argument("--overwrite", action="store_true", help="replace the table in DIR")
    command.add_argument("--dry-run", action="store_true", help="check everything, merge and write nothing")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Sweep, and print what was found."""
    from tvfast import sweeping

    sweep = sweeping.read_sweep(options.config)
    out = options.out or sweep.out or f"{Path(options.config).stem}-sweep"
    if options.dry_run:
        seen = sweeping.preview(sweep, device=options.device, threads=options.threads).as_json()
        print(json.dumps({"out": out, **seen}, indent=2) if options.json else _as_preview(out, seen))
        return 0
    line = _Line()
    with stoppable(f"to continue: {_resuming(options)}"):
        try:
            outcome = sweeping.run(
                sweep,
                out,
                device=options.device,
                threads=options.threads,
                resume=options.resume,
                overwrite=options.overwrite,
                progress=line.show,
            )
        finally:
            line.finish()
    for warning in outcome.warnings:
        print(f"tvfast: warning: {warning}", file=sys.stderr)
    found = outcome.as_json()
    print(
        json.dumps(found, indent=2)
        if options.json
        else as_text(found, has_objective=sweep.objective is not None)
    )
    return 0


def as_text(found: dict[str, Any], *, has_objective: bool) -> str:
    """An outcome as JSON gives it, in a few lines."""
    merges, before = found["merges"], found["points_before"]
    kinds = {
        "new": "live with thresholds measured anew",
        "reused": "live with those of an earlier point",
        "files": "as files",
    }
    lines = [
        f"{found['out']}: {counted(found['points'], 'point')}"
        + (f", {before} of them from before" if before else "")
        + (f", {found['failed']} failed" if found["failed"] else ""),
        f"merges    {seconds_as_text(found['merge_s'])}: "
        + ", ".join(f"{merges[kind]} {text}" for kind, text in kinds.items() if merges[kind]),
        f"function  {seconds_as_text(found['evaluate_s'])}",
    ]
    best = found["best"]
    if best is not None:
        point, metrics = (
            ", ".join(f"{n} {v:g}" for n, v in best[key].items()) for key in ("parameters", "metrics")
        )
        lines.append(f"best      {point}: {metrics} ({os.path.join(found['out'], 'best.yml')})")
    elif not has_objective:
        lines.append("best      not asked for; set maximise or minimise to the name of a metric")
    lines.append(
        f"files     {', '.join([*found['tables'], *([found['picture']] if found['picture'] else [])])}"
    )
    return "\n".join(lines)


def _as_preview(out: str, seen: dict[str, Any]) -> str:
    how = "into live weights" if seen["live"] else f"as files, because {seen['why_files']}"
    measured = ""
    if seen["n_measured"] is not None:
        measured = f"; thresholds are measured {counted(seen['n_measured'], 'time')}"
    plan = seen["plan"]
    return (
        f"{out}: nothing written; {counted(seen['n_points'], 'point')} would be, merged {how}{measured}.\n"
        f"The function is given a {seen['receives']}. The models are {bytes_as_text(plan['read_bytes'])}, "
        f"a merge {bytes_as_text(plan['write_bytes'])}."
    )


def _resuming(options: argparse.Namespace) -> str:
    out = f" --out {shlex.quote(options.out)}" if options.out else ""
    return f"tvfast sweep {shlex.quote(options.config)}{out} --resume"


class _Line:
    """One line on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._width = 0

    def show(self, row: Row, n_points: int) -> None:
        if self._shown:
            numbers = ", ".join(
                f"{name} {value:.4g}" for name, value in (*row.parameters.items(), *row.metrics.items())
            )
            text = f"{row.point + 1} of {n_points}: {numbers}"[:100]
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
            self._width = len(text)

    def finish(self) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
        self._width = 0
