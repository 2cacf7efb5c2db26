"""`tvfast collect`: importance or Fisher statistics of a model on data, into a statistics file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from tvfast.cli.quantities import bytes_as_text
from tvfast.errors import OutputError

if TYPE_CHECKING:
    from tvfast.importance import Progress

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "collect",
        help="importance and Fisher statistics of a model on data, for merges that read them",
        description="Run a transformers model on data and store importance or Fisher statistics, which a "
        "recipe names as stats of the model.",
    )
    command.add_argument("config", metavar="CONFIG", help="what to collect, YAML; see docs/statistics.md")
    command.add_argument("stats", metavar="STATS", help="the statistics file to write")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    group.add_argument("--overwrite", action="store_true", help="replace a finished file")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Collect, and print what was."""
    from tvfast.collection import read_configuration
    from tvfast.collection import run as collect

    configuration = read_configuration(options.config)
    if os.path.exists(options.stats) and not options.overwrite:
        raise OutputError(
            f"{options.stats}: is there already; expected a new file. Name another one, or pass --overwrite."
        )
    found = collect(configuration, options.stats, resume=options.resume, progress=_Line().show)
    count = next((entry.counts["samples"] for entry in found.entries.values()), 0)
    n_bytes = os.path.getsize(options.stats)
    if options.json:
        result = {
            "stats": options.stats,
            "kind": configuration.kind,
            "parameters": len(found.entries),
            "samples": count,
            "bytes": n_bytes,
        }
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{options.stats}: {configuration.kind} of {len(found.entries)} parameters on {count} samples, "
            f"{bytes_as_text(n_bytes)}"
        )
    return 0


class _Line:
    """One line on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def show(self, progress: Progress) -> None:
        if self._shown:
            done = f"pass {progress.group + 1} of {progress.n_groups}, {progress.n_samples} samples"
            sys.stderr.write(f"\r{done}")
            sys.stderr.flush()
