"""`tvfast demo`: the main job on data that ships in a package."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_NEEDS = {"torch": "torch", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "demo",
        help="fine-tune on three tasks, merge by several methods, compare",
        description=(
            "Train a small network on scikit-learn's digits, fine-tune it on three tasks, merge the three "
            "experts by several methods, and compare all of them on all tasks. Takes a few seconds."
        ),
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("build/demo"),
        metavar="DIR",
        help="folder for the picture and the numbers (%(default)s)",
    )
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="random seed (%(default)s)")
    command.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the experiment, print its table, write its files.

    Raises:
        ImportError: a package that the demonstration needs is not installed.
    """
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}, which is not installed; run pip install 'tvfast[demo]'."
        )
    from tvfast.demo import experiment, report

    results = experiment.run(options.seed)
    picture, numbers = report.write(results, options.out)
    if options.json:
        print(json.dumps(report.as_json(results), indent=2))
        return 0
    print(report.table(results))
    print()
    print(report.summary(results))
    print(f"Picture: {picture}\nNumbers: {numbers}")
    return 0


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2^62)")
    return value
