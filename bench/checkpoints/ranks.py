"""Merges by several ranks against one, and `tvfast plan` against both; print a table and write it as JSON.

    python -m bench.checkpoints.ranks --family FOLDER [--like FOLDER] [--method ties] [--rounds 5]

FOLDER is what `python -m bench.checkpoints.family FOLDER --preset 1.2b` writes. Inputs are in the page cache.
Ranks are processes with the variables of torchrun, so that its own start is not in the figures. Asked are,
with exit status 1 otherwise:

- two ranks of one thread take at most 1.15 times as long as one rank of two threads, from the first header
  to the last rename (`seconds` of the report: torch is loaded before that);
- each rank reads at most its part of the bytes and 5 % more;
- `tvfast plan` is within 25 % of every run from start to exit. With `--like` it is given the report of a
  merge of that family, smaller, by as many ranks and threads: the middle one of as many rounds. Without, its
  rates are those of the table in the program, so that this holds on the table's machine only, and its disk
  moves the same bytes in and out as fast as two threads do that merge nothing, by the same calls, before each
  run; all ranks share it (`--network`).

The first round is not counted: it finds other work's pages in memory, and places on the disk that were never
written. Before each merge as much memory as it takes is written to and freed (`running.back_memory`).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoints.limits import moved
from bench.checkpoints.options import beginning, family_parser, parsed
from bench.checkpoints.rows import ROWS, MethodRow
from bench.checkpoints.running import (
    ROOT,
    RunError,
    back_memory,
    remove,
    shards,
    total_bytes,
    tvfast,
    warm,
)
from bench.checkpoints.suite import Place, working_in
from bench.environment import load_average
from bench.suite import write
from bench.timing import Summary

METHODS = ("task_arithmetic", "ties", "della")
SHAPES = ((1, 1), (1, 2), (2, 1))
"""(ranks, threads of each)."""

MEMORY_BYTES = 4 * 10**9
"""More than the ranks of one merge take."""

MOST_SLOWER, MOST_READ, MOST_ERROR = 1.15, 1.05, 0.25


@dataclass(frozen=True, slots=True)
class RanksRun:
    """One merge: from start to exit of all ranks, their processor time, and what `--json` printed."""

    wall_s: float
    cpu_s: float
    report: Mapping[str, Any]

    @property
    def merge_s(self) -> float:
        return float(self.report["seconds"])

    @property
    def read_bytes(self) -> tuple[int, ...]:
        """Of each rank."""
        return tuple(work["read_bytes"] for work in self.report["ranks"] or [self.report])


def merge(place: Place, row: MethodRow, n_ranks: int, threads: int) -> RanksRun:
    """One merge into an empty place.

    Raises:
        RunError: a rank fails.
    """
    remove(place.out)
    command = [sys.executable, "-m", "tvfast", "merge", str(place.recipe(row)), str(place.out), "--json"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT)}
    common.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, every rank may compile all of torch that it loads
    if n_ranks > 1:
        size = str(n_ranks)
        common |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(port)}
    before = _children_s()
    start = time.perf_counter()
    ranks = [
        subprocess.Popen(
            [*command, "--threads", str(threads)],
            env={**common, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if n_ranks > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_ranks)
    ]
    said = [rank.communicate() for rank in ranks]
    wall, cpu = time.perf_counter() - start, _children_s() - before
    remove(place.out)
    if any(rank.returncode for rank in ranks):
        raise RunError("\n".join(errors for _, errors in said))
    return RanksRun(wall, cpu, json.loads(said[0][0]))


def _children_s() -> float:
    """Processor seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def predicted_s(place: Place, row: MethodRow, n_ranks: int, threads: int, *rates: str) -> float:
    """Seconds from start to exit, by the plan."""
    found = tvfast(
        *("plan", str(place.recipe(row)), "--json", "--ranks", str(n_ranks), "--threads", str(threads)),
        *("--device", "cpu", *rates),
    )
    return float(json.loads(found.stdout)["estimate"]["seconds"])


def sampled(place: Place, row: MethodRow, rounds: int) -> dict[tuple[int, int], Path]:
    """For each shape a file with the report of the middle one of some merges of a smaller family."""
    found = {}
    for n_ranks, threads in SHAPES:
        warm(place.inputs(row))
        runs = [merge(place, row, n_ranks, threads) for _ in range(1 + rounds)][1:]
        report = sorted(runs, key=lambda run: run.merge_s)[len(runs) // 2].report
        found[n_ranks, threads] = place.work / f"{row.method}-{n_ranks}-{threads}.json"
        found[n_ranks, threads].write_text(json.dumps(report))
    return found


def measured(place: Place, row: MethodRow, rounds: int, like: Place | None) -> list[dict[str, Any]]:
    """A record for each shape; rounds go through all shapes in turn, and one round more than is counted."""
    files = place.inputs(row)
    outputs = shards(place.family / row.inputs()[0])
    samples = {} if like is None else sampled(like, row, rounds)
    runs: dict[tuple[int, int], list[RanksRun]] = {shape: [] for shape in SHAPES}
    limits: list[float] = []
    for _ in range(1 + rounds):
        for shape in SHAPES:
            warm(files)
            limits.append(moved(files, place.work / "scratch" / "moved", total_bytes(outputs)))
            warm(files)
            back_memory(MEMORY_BYTES)
            runs[shape].append(merge(place, row, *shape))
    runs = {shape: found[1:] for shape, found in runs.items()}
    limit = Summary(tuple(limits[len(SHAPES) :]))
    gb_per_s = (total_bytes(files) + total_bytes(outputs)) / 1e9 / limit.median
    records = []
    for (n_ranks, threads), found in runs.items():
        wall = Summary(tuple(run.wall_s for run in found))
        rate = f"{gb_per_s:.4g}"
        by_table = predicted_s(place, row, n_ranks, threads, "--disk", rate, "--network", rate)
        by_sample = None
        if samples:
            by_sample = predicted_s(place, row, n_ranks, threads, "--like", str(samples[n_ranks, threads]))
        planned = by_table if by_sample is None else by_sample
        records.append(
            {
                "row": f"{row.method}, {n_ranks} x {threads}",
                "method": row.method,
                "ranks": n_ranks,
                "threads": threads,
                "wall_s": wall.record(),
                "merge_s": Summary(tuple(run.merge_s for run in found)).record(),
                "cpu_s": Summary(tuple(run.cpu_s for run in found)).record(),
                "moved_s": limit.record(),
                "moved_first_s": limits[: len(SHAPES)],
                "disk_gb_per_s": gb_per_s,
                "planned_by_table_s": by_table,
                "planned_by_sample_s": by_sample,
                "planned_s": planned,
                "planned_error": planned / wall.median - 1,
                "read_bytes": found[-1].read_bytes,
                "read_share": max(found[-1].read_bytes) * n_ranks / sum(found[-1].read_bytes),
            }
        )
    return records


def judged(records: Sequence[dict[str, Any]]) -> list[str]:
    """What was asked and is not so."""
    missed = []
    for record in records:
        if record["read_share"] > MOST_READ:
            missed.append(f"{record['row']}: a rank reads {record['read_share']:.3f} of its part")
        if abs(record["planned_error"]) > MOST_ERROR:
            missed.append(f"{record['row']}: the plan is off by {record['planned_error']:+.0%}")
    for method in dict.fromkeys(record["method"] for record in records):
        seconds = {
            (record["ranks"], record["threads"]): record["merge_s"]["median_s"]
            for record in records
            if record["method"] == method
        }
        ratio = seconds[2, 1] / seconds[1, 2]
        print(f"{method}: two ranks of one thread take {ratio:.2f} of one rank of two threads")
        if ratio > MOST_SLOWER:
            missed.append(f"{method}: two ranks take {ratio:.2f} of one, asked is {MOST_SLOWER}")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all that is asked is so; 1 something is not; 2 wrong arguments."""
    parser = family_parser("bench.checkpoints.ranks", __doc__)
    parser.add_argument("--like", type=Path, help="a smaller family: the plan takes its merges' rates")
    options = parsed(parser, arguments)
    family = options.family
    rows = [row for row in ROWS if row.method in (options.method or METHODS)]
    result = beginning("ranks", family)
    with contextlib.ExitStack() as stack:
        place = Place(family, stack.enter_context(working_in(family)))
        like = None
        if options.like is not None:
            smaller = options.like.resolve()
            result["like"] = json.loads((smaller / "family.json").read_text())
            like = Place(smaller, stack.enter_context(working_in(smaller)))
        records = [record for row in rows for record in measured(place, row, options.rounds, like)]
    result |= {"rows": records, "load_after": load_average()}
    print(
        "row                    from start to exit           merge  processor    planned   error  share read"
    )
    for record in records:
        wall, seconds = record["wall_s"]["median_s"], record["merge_s"]["median_s"]
        print(
            f"{record['row']:<22} {wall:>16.2f} s {seconds:>13.2f} s {record['cpu_s']['median_s']:>8.2f} s "
            f"{record['planned_s']:>8.2f} s {record['planned_error']:>+7.0%} {record['read_share']:>11.3f}"
        )
    missed = judged(records)
    print(write(result, options.out))
    print("\n".join(missed) if missed else "all that is asked is so")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
