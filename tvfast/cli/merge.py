"""`tvfast merge`: a recipe and checkpoints in, one checkpoint out."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

import tvfast
from tvfast.cli.progress import TerminalProgress
from tvfast.cli.quantities import bytes_as_text, counted, seconds_as_text, seed, size, whole_number
from tvfast.cli.signals import stoppable

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "merge",
        help="merge checkpoints as a recipe says",
        description=(
            "Merge the checkpoints that CONFIG names, a recipe in mergekit's YAML, into the directory OUT. "
            "OUT looks complete only when it is."
        ),
        epilog="Sizes: 8G is 8·10⁹ bytes, 8GiB is 8·2³⁰, a plain number is bytes.",
    )
    command.add_argument("config", metavar="CONFIG", help="recipe, YAML")
    command.add_argument("out", metavar="OUT", help="directory of the result")
    command.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="auto|cpu|cuda[:i]",
        help="where to merge (%(default)s)",
    )
    command.add_argument(
        "--threads",
        type=whole_number,
        default=0,
        metavar="N",
        help="0: all cores of the process (%(default)s)",
    )
    command.add_argument("--memory", type=size, metavar="SIZE", help="bound of the whole resident memory")
    command.add_argument("--device-memory", type=size, metavar="SIZE", help="bound of the device's memory")
    existing = command.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="continue what is in OUT: nothing, a part, or all of it"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    command.add_argument("--seed", type=seed, metavar="N", help="of random methods (the recipe's, or 0)")
    command.add_argument(
        "--nonfinite",
        choices=("error", "propagate"),
        help="what a NaN or infinity in an input does (what the recipe says, or error)",
    )
    command.add_argument(
        "--report", metavar="DIR", help="write what was merged, and how, into this directory"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Merge, and print what was done."""
    progress = TerminalProgress()
    with stoppable(f"to continue: {_resuming(options)}"):
        try:
            recipe = tvfast.load_recipe(options.config)
            report = tvfast.merge_checkpoints(
                recipe,
                options.out,
                device=options.device,
                threads=options.threads,
                memory=options.memory,
                device_memory=options.device_memory,
                resume=options.resume,
                overwrite=options.overwrite,
                dry_run=options.dry_run,
                seed=options.seed,
                nonfinite=options.nonfinite,
                report=options.report,
                progress=progress,
                distributed=is_rank(),
            )
        finally:
            progress.finish()
    if is_rank() and os.environ["RANK"] != "0":
        return 0  # rank 0 tells of all
    for warning in report.warnings:
        print(f"tvfast: warning: {' '.join(warning.split())}", file=sys.stderr)
    found = report.as_json()
    if options.dry_run:
        plan = tvfast.plan(
            recipe,
            device=options.device,
            memory=options.memory,
            device_memory=options.device_memory,
            threads=options.threads,
            seed=options.seed,
        )
        found["plan"] = plan.as_json()
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0


def as_text(found: dict[str, Any]) -> str:
    """A report as JSON gives it, in a few lines."""
    tensors = f"{counted(found['n_tensors'], 'tensor')} in {counted(len(found['shards']), 'shard')}"
    passes = counted(found["n_passes"], "pass")
    if found["dry_run"]:
        plan = found["plan"]
        on_device = (
            f", {bytes_as_text(found['planned_device_peak_bytes'])} of {found['device']}"
            if found["planned_device_peak_bytes"]
            else ""
        )
        return (
            f"{found['out']}: nothing written; {tensors} would be.\n"
            f"{bytes_as_text(plan['read_bytes'])} to read in {passes}, "
            f"{bytes_as_text(plan['write_bytes'])} to write, "
            f"at most {bytes_as_text(plan['peak_bytes'])} of memory{on_device}.\n"
            f"To be merged on {found['device']}: {found['device_why']}."
        )
    seconds = found["seconds"]
    if found["finished_before"]:
        return f"{found['out']}: was finished before; {tensors} verified in {seconds_as_text(seconds)}."
    kept = f", {bytes_as_text(found['resumed_bytes'])} kept from before" if found["resumed_bytes"] else ""
    rate = (found["read_bytes"] + found["written_bytes"]) / max(seconds, 1e-9)
    return (
        f"{found['out']}: {tensors}, {bytes_as_text(found['written_bytes'])} written{kept}, "
        f"{bytes_as_text(found['read_bytes'])} read in {passes}.\n"
        f"{seconds_as_text(seconds)}, {rate / 1e9:.2f} GB/s, "
        f"peak memory {bytes_as_text(found['peak_bytes'])}{_device_peak(found)}.\n"
        f"{''.join(map(_rank_line, found['ranks']))}"
        f"Merged on {found['device']}: {found['device_why']}."
    )


def is_rank() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _device_peak(found: dict[str, Any]) -> str:
    peak = found["device_peak_bytes"]
    return f", {bytes_as_text(peak)} on {found['device']}" if peak else ""


def _rank_line(work: dict[str, Any]) -> str:
    return (
        f"{work['host']}: {bytes_as_text(work['read_bytes'])} read, "
        f"{bytes_as_text(work['written_bytes'])} written in {seconds_as_text(work['seconds'])}.\n"
    )


def device(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device; expected auto, cpu, cuda or for example cuda:1"
        )
    return text


def _resuming(options: argparse.Namespace) -> str:
    return f"tvfast merge {shlex.quote(options.config)} {shlex.quote(options.out)} --resume"
