"""`tvfast doctor`: every backend, and the reason for each "no"."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import TYPE_CHECKING, Any

import tvfast

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_VARIABLES = ("TVFAST_BACKEND", "TVFAST_ISA", "TVFAST_SIMT", "TRITON_INTERPRET")


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "doctor",
        help="which backends can run here, and why the others cannot",
        description="Print every backend, the instruction set it uses, and why the others cannot run.",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the diagnosis."""
    found = diagnosis()
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0


def diagnosis() -> dict[str, Any]:
    """Versions, variables that steer tvfast, and every backend, in order of preference."""
    backends = [
        {"name": status.name, "usable": status.usable, "detail": status.detail}
        for status in tvfast.ops.backend_statuses()
    ]
    return {
        "tvfast": tvfast.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "backends": backends,
    }


def as_text(found: dict[str, Any]) -> str:
    """A diagnosis as lines."""
    versions = [f"{name:10}{found[name]}" for name in ("tvfast", "python", "platform", "torch", "numpy")]
    variables = [f"{name}={value}" for name, value in found["variables"].items()]
    backends = [
        f"  {one['name']:10}{'yes' if one['usable'] else 'no':5}{one['detail']}".rstrip()
        for one in found["backends"]
    ]
    return "\n".join([*versions, *variables, "", "backends, first choice first", *backends])


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
