"""Time whole merges on a GPU beside the CPU's, the link's and the disk's; check that their bytes are equal.

    python -m bench.checkpoints.device --family FOLDER [--method ties] [--device cpu --device cuda]

FOLDER is what `python -m bench.checkpoints.family FOLDER --preset 0.5b` writes. Every merge is `tvfast merge`
from the shell, start-up of torch and CUDA included, inputs in the page cache. A GPU has a second row with so
little of its memory that its largest tensors are measured on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.checkpoints.limits import warm_limit
from bench.checkpoints.rows import ROWS, MethodRow
from bench.checkpoints.running import ROOT, RunError, remove, shards, tvfast, warm
from bench.checkpoints.suite import Place, working_in
from bench.environment import environment, load_average
from bench.suite import write
from bench.table import aligned
from bench.timing import Summary

METHODS = ("task_arithmetic", "ties", "dare_ties", "della")
LITTLE = "192M"
"""Of a device, in the second row: its scratch and a ring of a few pieces."""

_COPY_BYTES = 2**28
_COPIES = 8


@dataclass(slots=True)
class Row:
    """Merges with one method on one device."""

    method: MethodRow
    device: str
    options: tuple[str, ...]
    reports: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    checksums: Any = None
    error: str = ""

    @property
    def name(self) -> str:
        return " ".join([self.method.method, self.device, *self.options])


def link() -> dict[str, float]:
    """GB/s of pinned copies to the first GPU, from it, and both ways at once (the sum)."""
    import torch

    host = [torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    found = {}
    for name, up, down in (("up", True, False), ("down", False, True), ("both", True, True)):
        for timed in (False, True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            begin.record()
            for stream in streams:
                stream.wait_event(begin)
            for _ in range(_COPIES):
                if up:
                    with torch.cuda.stream(streams[0]):
                        there[0].copy_(host[0], non_blocking=True)
                if down:
                    with torch.cuda.stream(streams[1]):
                        host[1].copy_(there[1], non_blocking=True)
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)
            end.record()
            torch.cuda.synchronize()
            if timed:
                found[name] = (up + down) * _COPIES * _COPY_BYTES / begin.elapsed_time(end) / 1e6
    return found


def merge(place: Place, row: Row) -> None:
    """One merge into an empty place; its report and checksums are kept in the row."""
    remove(place.out)
    warm(place.inputs(row.method))
    try:
        recipe = str(place.recipe(row.method))
        done = tvfast("merge", recipe, str(place.out), "--json", "--device", row.device, *row.options)
        manifest = json.loads((place.out / "tvfast_manifest.json").read_text())
    except RunError as error:
        row.error = str(error)
        return
    finally:
        remove(place.out)
    row.seconds.append(done.seconds)
    row.reports.append(json.loads(done.stdout))
    row.peak_bytes = max(row.peak_bytes, done.peak_bytes)
    row.checksums = manifest["shards"]


def record(row: Row, first: Row, limit_s: float, rates: dict[str, float]) -> dict[str, Any]:
    """Figures of a row; `first` is that of the same method on the first device."""
    found: dict[str, Any] = {"row": row.name, "device": row.device, "cache": "warm"}
    if row.error:
        return found | {"error": row.error}
    report = row.reports[-1]
    found |= Summary(tuple(row.seconds)).record()
    found["engine_s"] = Summary(tuple(one["seconds"] for one in row.reports)).median
    for key in ("read_bytes", "written_bytes", "n_passes", "device", "device_why", "planned_peak_bytes"):
        found[key] = report[key]
    found["peak_bytes"] = row.peak_bytes
    found["device_peak_bytes"] = max(one["device_peak_bytes"] for one in row.reports)
    found["planned_device_peak_bytes"] = report["planned_device_peak_bytes"]
    found["peaks_kept"] = (
        found["peak_bytes"] <= found["planned_peak_bytes"]
        and found["device_peak_bytes"] <= found["planned_device_peak_bytes"]
    )
    found["limit_s"] = limit_s
    if rates and report["device"] != "cpu":
        up, down = report["read_bytes"] / rates["up"], report["written_bytes"] / rates["down"]
        found["link_s"] = max(up, down) / 1e9
        found["share_of_link"] = found["link_s"] / found["engine_s"]
    found["equal"] = row.checksums == first.checksums
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it is written to the result file."""
    methods = [row for row in ROWS if row.method in (options.method or METHODS)]
    rows = []
    for method in methods:
        for device in options.device:
            rows.append(Row(method, device, ()))
            if device.startswith("cuda"):
                rows.append(Row(method, device, ("--device-memory", LITTLE)))
    result: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "what": "whole merges on devices",
        "environment": environment(),
        "family": json.loads((options.family / "family.json").read_text()),
        "load_before": load_average(),
    }
    rates = link() if any(row.device.startswith("cuda") for row in rows) else {}
    limits: dict[str, list[float]] = {method.method: [] for method in methods}
    with working_in(options.family) as work:
        place = Place(options.family, work)
        for _ in range(options.rounds):
            for method in methods:
                files = place.inputs(method)
                warm(files)
                base = shards(place.family / method.inputs()[0])
                limits[method.method].append(warm_limit(files, base, work / "scratch")["seconds"])
            for row in rows:
                if not row.error:
                    merge(place, row)
    first = {row.method.method: row for row in reversed(rows)}
    result["link_gb_per_s"] = rates
    result["rows"] = [
        record(row, first[row.method.method], Summary(tuple(limits[row.method.method])).median, rates)
        for row in rows
    ]
    result["load_after"] = load_average()
    return result


_HEAD = (
    "row",
    "median s",
    "engine s",
    "cat + cp s",
    "link s",
    "share of link",
    "peak MiB",
    "device MiB",
    "equal",
)


def table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    lines: list[tuple[str, ...]] = [_HEAD]
    notes = []
    for row in result["rows"]:
        if "error" in row:
            notes.append(f"! {row['row']}: {row['error']}")
            continue
        lines.append(
            (
                row["row"],
                f"{row['median_s']:.2f}",
                f"{row['engine_s']:.2f}",
                f"{row['limit_s']:.2f}",
                f"{row['link_s']:.2f}" if "link_s" in row else "",
                f"{100 * row['share_of_link']:.0f} %" if "share_of_link" in row else "",
                f"{row['peak_bytes'] / 2**20:.0f}" + ("" if row["peaks_kept"] else " EXCEEDED"),
                f"{row['device_peak_bytes'] / 2**20:.0f}",
                "yes" if row["equal"] else "NO",
            )
        )
    rates = ", ".join(f"{name} {rate:.1f}" for name, rate in result["link_gb_per_s"].items())
    return "\n".join([aligned(lines), *notes, *([f"Link, GB/s: {rates}."] if rates else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured; 1 a merge failed, gave other bytes or took more than planned; 2 arguments."""
    parser = argparse.ArgumentParser(
        prog="bench.checkpoints.device", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--family", type=Path, required=True)
    parser.add_argument("--method", action="append", choices=[row.method for row in ROWS], help="repeatable")
    parser.add_argument("--device", action="append", help="repeatable; bytes are compared with the first's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    options.device = options.device or ["cpu", "cuda"]
    options.family = options.family.resolve()
    if not (options.family / "family.json").exists():
        parser.error(f"--family {options.family}: no family.json there; bench.checkpoints.family writes one")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    try:
        result = measure(options)
    except (RuntimeError, AssertionError) as error:  # of torch, where it finds no GPU
        print(f"bench.checkpoints.device: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(table(result))
    print(write(result, options.out))
    good = all("error" not in row and row["equal"] and row["peaks_kept"] for row in result["rows"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
