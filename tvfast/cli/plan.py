"""`tvfast plan`: what a recipe will read, write and need, from file headers alone."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvfast
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

DISK_GB_S = 2.0
"""What a disk is taken to do where `--disk` does not say."""

CPU_GB_S = {
    "linear": 40.0,
    "task_arithmetic": 40.0,
    "passthrough": 40.0,
    "copy": 40.0,
    "ties": 10.0,
    "slerp": 4.9,
    "breadcrumbs": 2.9,
    "breadcrumbs_ties": 2.9,
    "dare_linear": 1.8,
    "dare_ties": 1.8,
    "fisher": 7.7,
    "sta": 4.0,
    "sta_forget": 4.0,
    "sce": 0.67,
    "della_linear": 0.57,
    "della": 0.57,
    "ram": 10.0,
    "magmax": 10.0,
    "nearswap": 8.0,
    "magnitude_prune": 7.0,
    "nuslerp": 6.5,
    "multislerp": 5.3,
    "model_stock": 5.3,
    "geometric_median": 5.3,
    "ramplus_tl": 4.6,
    "karcher": 3.8,
    "consensus": 2.1,
    "arcee_fusion": 1.4,
    "pcb": 0.23,
    "iso_c": 0.083,
    "wudi": 0.080,
    "tsv_m": 0.018,
    "iso_cts": 0.016,
    "knots": 0.013,
    "regmean": 0.033,
    "kfac": 0.00075,
    "mats": 0.00051,
}
"""What one core takes in and gives out while it merges three bfloat16 models: an EPYC of two cores, in
bench/results/20261122T001050-01a477f164e7.json. Those that read float32 scores: processor time of one thread
there, beside other work; `ram` to `knots`: the same, as multiples of what `ties` took beside them. Those from
`iso_c` on decompose matrices or solve equations: layers of 1024 x 1024, and as much slower as layers are
wider."""

MEMORY_GB_S = 40.0
"""What all cores together do at most, there."""

LINK_GB_S = {"a100": 22.0, "h100": 45.0, "h200": 45.0}
"""What goes over PCIe 4 and 5 to and from a GPU, which merges faster than that."""

OTHER_LINK_GB_S = 22.0
"""The same of a GPU whose name says nothing: PCIe 4."""

HOST_GB_S = 20.0
"""What one core looks through for NaN, and takes checksums of, where a GPU merges: CPU_GB_S' machine."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that a merge takes if reading, merging and writing overlap; `terms` are those of each alone."""

    seconds: float
    limited_by: str
    ranks: int
    disk_gb_s: float
    network_gb_s: float | None
    device: str
    assumed: tuple[str, ...]
    terms: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "limited_by": self.limited_by,
            "ranks": self.ranks,
            "disk_gb_s": self.disk_gb_s,
            "network_gb_s": self.network_gb_s,
            "device": self.device,
            "assumed": list(self.assumed),
            "terms_s": self.terms,
        }


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
    plan = tvfast.plan(
        options.config,
        device=options.device,
        memory=options.memory,
        device_memory=options.device_memory,
        threads=options.threads,
        seed=options.seed,
    )
    found = plan.as_json()
    rates = estimate(
        found,
        shares_of(plan),
        ranks=options.ranks,
        disk=options.disk,
        network=options.network,
    )
    for warning in (*(w for stage in found.get("stages", ()) for w in stage["warnings"]), *found["warnings"]):
        print(f"tvfast: warning: {' '.join(warning.split())}", file=sys.stderr)
    if options.json:
        print(json.dumps({**found, "estimate": rates.as_json(), "tensor_methods": _tensors(plan)}, indent=2))
    else:
        print(as_text(found, rates))
    return 0


def estimate(
    found: dict[str, Any],
    shares: Mapping[str, float],
    *,
    ranks: int = 1,
    disk: float | None = None,
    network: float | None = None,
) -> Estimate:
    """The slowest of disk, network and device decides, since they work at the same time.

    Args:
        found: a plan as JSON gives it.
        shares: of the output's bytes, by method.
        ranks: each does an equal share of the work, with its own disk and device.
        disk, network: GB/s; the network is shared by all ranks.
    """
    n_bytes = (found["read_bytes"] + found["write_bytes"]) / 1e9
    assumed = []
    card, threads = found["device"]["name"], found["threads"]
    if disk is None:
        assumed.append(f"disk {DISK_GB_S:g} GB/s; pass --disk")
    if card == "cpu":
        device_rate = 1.0 / math.fsum(
            share / min(MEMORY_GB_S, threads * CPU_GB_S[method]) for method, share in shares.items()
        )
        assumed.append(f"{counted(threads, 'thread')} that merge {device_rate:.3g} GB/s")
    else:
        device_rate = _link(found["device"])
        assumed.append(f"{device_rate:g} GB/s to and from the {card}")
    rates = {"disk": ranks * (DISK_GB_S if disk is None else disk), card: ranks * device_rate}
    if card != "cpu":
        rates["cpu"] = ranks * threads * HOST_GB_S
        assumed.append(f"{counted(threads, 'thread')} that check {threads * HOST_GB_S:g} GB/s")
    if network is not None:
        rates["network"] = network
    limited_by = min(rates, key=rates.__getitem__)
    return Estimate(
        seconds=n_bytes / rates[limited_by],
        limited_by=limited_by,
        ranks=ranks,
        disk_gb_s=DISK_GB_S if disk is None else disk,
        network_gb_s=network,
        device=card,
        assumed=tuple(assumed),
        terms={name: n_bytes / rate for name, rate in rates.items()},
    )


def _link(device: dict[str, Any]) -> float:
    """GB/s of a card, by its name."""
    words = f"{device['name']} {device['description']}".lower()
    return next((rate for name, rate in LINK_GB_S.items() if name in words), OTHER_LINK_GB_S)


def shares_of(plan: Plan) -> dict[str, float]:
    """Which share of the output's elements each method makes; of a plan without any, all is copied."""
    sizes: dict[str, int] = {}
    for _, shape, _, method in plan.tensors:
        word = method.split()[0]
        sizes[word] = sizes.get(word, 0) + math.prod(shape)
    total = sum(sizes.values())
    return {word: n / total for word, n in sizes.items()} if total else {"copy": 1.0}


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
        f"time      about {seconds_as_text(rates.seconds)}, limited by the {rates.limited_by}",
        f"          {', '.join(f'{name} {seconds_as_text(s)}' for name, s in rates.terms.items())}",
        *(f"          assuming {assumption}" for assumption in rates.assumed),
        "",
        "tensors by method",
    ]
    width = max((len(str(row["tensors"])) for row in found["methods"]), default=1)
    lines += [f"  {row['tensors']:>{width}}  {row['method']}" for row in found["methods"]]
    return "\n".join(lines)


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
