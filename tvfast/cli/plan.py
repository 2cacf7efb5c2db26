"""`tvfast plan`: what a recipe will read, write and need, from file headers alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tvfast
from tvfast.cli.estimate import DISK_GB_S, LINK_GB_S, Estimate, estimate, read_sample
from tvfast.cli.merge import device
from tvfast.cli.quantities import (
    bytes_as_text,
    counted,
    positive,
    seconds_as_text,
    seed,
    size,
    whole_number,
)

if TYPE_CHECKING:
    from tvfast.checkpoints import Plan

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "plan",
        help="what a merge will read, write and need; touches no tensor data",
        description="Print reads, writes, passes, method per tensor, peak memory and an estimated time.",
    )
    command.add_argument("config", metavar="CONFIG", help="recipe, YAML")
    command.add_argument("--memory", type=size, metavar="SIZE", help="as in `tvfast merge`")
    command.add_argument("--threads", type=whole_number, default=0, metavar="N", help="as in `tvfast merge`")
    command.add_argument("--seed", type=seed, metavar="N", help="as in `tvfast merge`")
    command.add_argument("--ranks", type=_ranks, default=1, metavar="N", help="machines that share the work")
    command.add_argument("--disk", type=positive, metavar="GB/s", help=f"of each rank ({DISK_GB_S:g})")
    command.add_argument("--network", type=positive, metavar="GB/s", help="that all ranks share (no limit)")
    command.add_argument(
        "--like",
        metavar="REPORT",
        help="take this machine's rate from what `tvfast merge --json` printed: a merge by the same method "
        "with as many threads and ranks",
    )
    command.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="auto|cpu|cuda[:i]|NAME",
        help=f"what each rank merges on (%(default)s); {', '.join(LINK_GB_S)} need not be here",
    )
    command.add_argument("--device-memory", type=size, metavar="SIZE", help="as in `tvfast merge`")
    command.add_argument("--json", action="store_true", help="print one JSON object, with every tensor")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    like = None if options.like is None else read_sample(options.like)
    plan = tvfast.plan(
        options.config,
        device=options.device,
        memory=options.memory,
        device_memory=options.device_memory,
        threads=options.threads,
        seed=options.seed,
        ranks=options.ranks,
    )
    found = plan.as_json()
    rates = estimate(
        plan,
        found["device"],
        found["threads"],
        disk=options.disk,
        network=options.network,
        like=like,
    )
    for warning in (*(w for stage in found.get("stages", ()) for w in stage["warnings"]), *found["warnings"]):
        print(f"tvfast: warning: {' '.join(warning.split())}", file=sys.stderr)
    if options.json:
        print(json.dumps({**found, "estimate": rates.as_json(), "tensor_methods": _tensors(plan)}, indent=2))
    else:
        print(as_text(found, rates))
    return 0


def as_text(found: dict[str, Any], rates: Estimate) -> str:
    """A plan as lines."""
    shards = counted(len(found["shards"]), "shard")
    lines = [
        *(
            f"stage     {stage['name']}: {counted(stage['tensors'], 'tensor')}, "
            f"{bytes_as_text(stage['read_bytes'])} read, {bytes_as_text(stage['write_bytes'])} written and "
            "removed in the end"
            for stage in found.get("stages", ())
        ),
        f"tensors   {found['tensors']} in {shards}, {counted(found['units'], 'unit')} of work",
        f"reads     {bytes_as_text(found['read_bytes'])} in {counted(found['passes'], 'pass')}",
        *(f"          {reason}" for reason in found["passes_why"]),
        f"writes    {bytes_as_text(found['write_bytes'])}",
        f"memory    {bytes_as_text(found['peak_bytes'])} at most ({found['peak_bytes']} bytes)",
        f"device    {found['device']['name']}: {found['device_why']}",
        *_device_lines(found["device"]),
        *_rank_lines(found["ranks"], rates),
        f"time      about {seconds_as_text(rates.seconds)}, limited by the {rates.limited_by}",
        f"          start {seconds_as_text(rates.start_s)}, then the longest of "
        f"{', '.join(f'{name} {seconds_as_text(s)}' for name, s in rates.terms.items())}",
        *(f"          assuming {assumption}" for assumption in rates.assumed),
        "",
        "tensors by method",
    ]
    width = max((len(str(row["tensors"])) for row in found["methods"]), default=1)
    lines += [f"  {row['tensors']:>{width}}  {row['method']}" for row in found["methods"]]
    return "\n".join(lines)


def _rank_lines(ranks: Sequence[dict[str, Any]], rates: Estimate) -> list[str]:
    """The shares of several ranks, and what goes between them."""
    if len(ranks) < 2:
        return []

    def span(key: str) -> str:
        sizes = [rank[key] for rank in ranks]
        least, most = bytes_as_text(min(sizes)), bytes_as_text(max(sizes))
        return most if least == most else f"{least} to {most}"

    return [
        f"ranks     {len(ranks)}, each reads {span('read_bytes')} and writes {span('write_bytes')}, "
        f"memory {span('peak_bytes')} at most",
        f"          no collective carries a tensor; {rates.exchanges} values of each rank, "
        f"{bytes_as_text(rates.exchanged_bytes)} in all, in the store",
    ]


def _device_lines(device: dict[str, Any]) -> list[str]:
    """What a GPU is asked for."""
    if "peak_bytes" not in device:
        return []
    return [
        f"          {bytes_as_text(device['peak_bytes'])} at most ({device['peak_bytes']} bytes), of which "
        f"{bytes_as_text(device['ring_bytes'])} hold tensors; backend {device['backend']}",
        *(f"          {note}" for note in device["notes"]),
    ]


def _device(text: str) -> str:
    """What `tvfast merge` takes, or a card that need not be here."""
    return text if text in LINK_GB_S else device(text)


def _tensors(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(shape), "dtype": dtype, "method": method}
        for name, shape, dtype, method in plan.tensors
    ]


def _ranks(text: str) -> int:
    n = whole_number(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"{text} ranks; expected at least one")
    return n
