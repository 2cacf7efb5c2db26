"""`tvfast demo`: the main job on data that ships in a package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tvfast.cli.quantities import seed

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_NEEDS = {
    "torch": "torch",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
}


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "demo",
        help="fine-tune on three tasks, merge by several methods, compare",
        description=(
            "Train a small network on scikit-learn's digits, fine-tune it on three tasks, write base and "
            "experts as sharded safetensors, merge them by several methods as `tvfast merge` does, and "
            "compare all of them on all tasks. Takes a few seconds."
        ),
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("build/demo"),
        metavar="DIR",
        help="folder for the checkpoints, the recipes, the picture and the numbers (%(default)s)",
    )
    command.add_argument("--seed", type=seed, default=0, metavar="N", help="random seed (%(default)s)")
    command.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the experiment, print its table, write its files.

    Raises:
        ImportError: a package that the demonstration needs is not installed.
    """
    import importlib.util

    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}, which is not installed; run pip install 'tvfast[demo]'."
        )
    from tvfast.demo import experiment, report

    results = experiment.run(options.seed, options.out)
    picture, numbers = report.write(results, options.out)
    if options.json:
        print(json.dumps(report.as_json(results), indent=2))
        return 0
    print(report.table(results))
    print()
    print(report.summary(results))
    print(f"Checkpoints and recipes: {options.out}\nPicture: {picture}\nNumbers: {numbers}")
    return 0
