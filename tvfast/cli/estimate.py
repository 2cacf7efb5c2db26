"""How long a merge takes: seconds of disk, network and processor for each rank; the slowest decides.

docs/distributed.md has the formula, `python -m bench.checkpoints.ranks` compares it with runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvfast.cli.quantities import counted
from tvfast.errors import ArgumentError

if TYPE_CHECKING:
    from tvfast.checkpoints import Plan

DISK_GB_S = 2.0
"""What a disk is taken to do where `--disk` does not say."""

CPU_GB_S = {
    "linear": 40.0,
    "task_arithmetic": 40.0,
    "passthrough": 40.0,
    "copy": 40.0,
    "ties": 4.0,
    "slerp": 6.7,
    "breadcrumbs": 2.9,
    "breadcrumbs_ties": 2.9,
    "dare_linear": 1.8,
    "dare_ties": 1.8,
    "fisher": 7.7,
    "sta": 4.0,
    "sta_forget": 4.0,
    "sce": 0.67,
    "della_linear": 0.76,
    "della": 0.76,
    "ram": 10.0,
    "magmax": 10.0,
    "nearswap": 8.0,
    "magnitude_prune": 7.0,
    "nuslerp": 6.5,
    "multislerp": 5.3,
    "model_stock": 5.3,
    "lata": 5.3,
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
bench/results/20261122T001050-01a477f164e7.json; `ties`, `slerp` and `della`: what whole merges took beside
READ_GB_S and WRITE_GB_S, in 20261122T031110-06461a166e30.json, 20261126T004923-4cbf8ef3e9f5.json and, on one
and two threads, 20261126T033353-744fc0c8ed76.json. Those that read float32 scores: processor time of one
thread there, beside other work; `ram` to `knots`: the same, as multiples of what `ties` took in memory;
`lata`: taken to be `model_stock`'s, which measures as much. Those from `iso_c` on decompose matrices or solve
equations: layers of 1024 x 1024, and as much slower as layers are wider."""

MEMORY_GB_S = 40.0
"""What all cores together do at most, there."""

LINK_GB_S = {"a100": 22.0, "h100": 45.0, "h200": 45.0}
"""What goes over PCIe 4 and 5 to and from a GPU, which merges faster than that."""

OTHER_LINK_GB_S = 22.0
"""The same of a GPU whose name says nothing: PCIe 4."""

HOST_GB_S = 20.0
"""What one core looks through for NaN, and takes checksums of, where a GPU merges: CPU_GB_S' machine."""


READ_GB_S, WRITE_GB_S = 4.0, 5.0
"""What one core does beside merging, where the CPU merges: reads out of the page cache and looks for NaN;
takes checksums and writes. From the processor time of whole merges there."""

START_S, JOIN_S = 0.25, 0.6
"""From the shell to the first read; and what several ranks take besides: torch, 0.53 s of a core to load and
to leave, and their meeting."""

EXCHANGES, RECORD_BYTES = 8, 30
"""Values that each rank gives to the others for a merge, and bytes for each unit of work among them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A merge that was made, as `tvfast merge --json` reports it.

    Attributes:
        gb_per_s: read and written by the rank that moved most, over the whole merge.
    """

    path: str
    device: str
    ranks: int
    gb_per_s: float


def read_sample(path: str) -> Sample:
    """The report in a file.

    Raises:
        ArgumentError: no such file, not a report, or of a merge that did not do all of its work.
    """
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        works = report["ranks"] or [report]
        n_bytes = max(work["read_bytes"] + work["written_bytes"] for work in works)
        seconds, device = float(report["seconds"]), str(report["device"])
        partly = report["dry_run"] or report["finished_before"] or report["resumed_bytes"]
    except OSError as error:
        raise ArgumentError(
            f"{path}: {error.strerror or error}. Give a file with what `tvfast merge --json` printed."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(f"{path} is not what `tvfast merge --json` prints ({error!r}).") from error
    if partly or not (n_bytes > 0 and 0 < seconds < math.inf):
        raise ArgumentError(f"{path}: that merge did not make all of its output; give one that did.")
    return Sample(path, device, len(works), n_bytes / 1e9 / seconds)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that a merge takes if reading, merging and writing overlap.

    Attributes:
        seconds: `start_s` and the largest of `terms`.
        disk_gb_s: None where `--like` tells of disk and device together.
        terms: seconds of each resource alone, of the rank that needs it longest; the network is everybody's.
        tensor_collectives: collectives that carry tensors: none.
        exchanged_bytes: values in the store.
    """

    seconds: float
    limited_by: str
    ranks: int
    disk_gb_s: float | None
    network_gb_s: float | None
    device: str
    assumed: tuple[str, ...]
    terms: dict[str, float]
    start_s: float
    exchanges: int
    exchanged_bytes: int
    tensor_collectives: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "limited_by": self.limited_by,
            "ranks": self.ranks,
            "disk_gb_s": self.disk_gb_s,
            "network_gb_s": self.network_gb_s,
            "device": self.device,
            "assumed": list(self.assumed),
            "start_s": self.start_s,
            "terms_s": self.terms,
            "tensor_collectives": self.tensor_collectives,
            "exchanges": self.exchanges,
            "exchanged_bytes": self.exchanged_bytes,
        }


def estimate(
    plan: Plan,
    device: Mapping[str, Any],
    threads: int,
    *,
    disk: float | None = None,
    network: float | None = None,
    like: Sample | None = None,
) -> Estimate:
    """The slowest of disk, network and device decides, since they work at the same time.

    Args:
        plan: what every rank does; each has its own disk and device.
        device: of the plan as JSON gives it.
        threads: of each rank.
        disk, network: GB/s; the network is shared by all ranks.
        like: a merge whose rate is taken for that of each rank's disk and device together.

    Raises:
        ArgumentError: `like` was merged on another kind of device.
    """
    works = plan.ranks
    moved = [(work.read_bytes + work.write_bytes) / 1e9 for work in works]
    card, assumed = device["name"], []
    if disk is None and like is None:
        disk = DISK_GB_S
        assumed.append(f"disk {DISK_GB_S:g} GB/s; pass --disk")
    terms = {} if disk is None else {"disk": max(moved) / disk}
    if like is not None:
        if (like.device == "cpu") != (card == "cpu"):
            raise ArgumentError(
                f"{like.path}: merged on {like.device}, but this plan is for {card}. Choose --device."
            )
        terms["machine"] = max(moved) / like.gb_per_s
        of_each = f" by each of {counted(like.ranks, 'rank')}" if like.ranks > 1 else ""
        assumed.append(f"{like.gb_per_s:.3g} GB/s read and written{of_each}, as in {like.path}")
    elif card == "cpu":
        computing = [
            _processor_s(work.by_method, work.read_bytes, work.write_bytes, threads) for work in works
        ]
        terms["cpu"] = max(computing)
        rate = math.fsum(moved) / max(1e-12, math.fsum(computing))
        assumed.append(f"{counted(threads, 'thread')} that read, merge and write {rate:.3g} GB/s")
    else:
        link = _link(device)
        terms |= {card: max(moved) / link, "cpu": max(moved) / (threads * HOST_GB_S)}
        assumed.append(f"{link:g} GB/s to and from the {card}")
        assumed.append(f"{counted(threads, 'thread')} that check {threads * HOST_GB_S:g} GB/s")
    if network is not None:
        terms["network"] = math.fsum(moved) / network
    limited_by = max(terms, key=terms.__getitem__)
    several = len(works) > 1
    start = START_S + JOIN_S * several
    return Estimate(
        seconds=start + terms[limited_by],
        limited_by=limited_by,
        ranks=len(works),
        disk_gb_s=disk,
        network_gb_s=network,
        device=card,
        assumed=tuple(assumed),
        terms=terms,
        start_s=start,
        exchanges=EXCHANGES * several,
        exchanged_bytes=several * RECORD_BYTES * sum(work.n_units for work in works),
    )


def _processor_s(by_method: Mapping[str, int], n_read: int, n_written: int, threads: int) -> float:
    """Seconds that the threads of a rank compute."""
    kernels = math.fsum(
        n_bytes / 1e9 / min(MEMORY_GB_S, threads * CPU_GB_S[method]) for method, n_bytes in by_method.items()
    )
    return kernels + (n_read / READ_GB_S + n_written / WRITE_GB_S) / 1e9 / threads


def _link(device: Mapping[str, Any]) -> float:
    """GB/s of a card, by its name."""
    words = f"{device['name']} {device['description']}".lower()
    return next((rate for name, rate in LINK_GB_S.items() if name in words), OTHER_LINK_GB_S)
