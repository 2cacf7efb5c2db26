"""Time whole merges as processes, beside their limit and mergekit; print a table and write it as JSON.

    python bench/checkpoints/run.py --family FOLDER [--method ties] [--peer run|kept|none] [--rounds 5]

FOLDER is what `python -m bench.checkpoints.family FOLDER --preset 0.5b` writes. Every merge is `tvfast merge`
from the shell, start-up included, into a directory on FOLDER's disk that is removed in between. Rows of
mergekit need `TVFAST_MERGEKIT_PYTHON` (tests/parity/make_env.sh). A family of four fine-tunes has the row of
LATA, whose instruct model is ft4; it is measured against TIES of the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoints.family import PRESETS, Family
from bench.checkpoints.limits import cold_reads, direct_write, warm_limit
from bench.checkpoints.options import beginning, family_parser, parsed
from bench.checkpoints.peer import Peer, find_peer
from bench.checkpoints.rows import ROWS, MethodRow
from bench.checkpoints.running import (
    ROOT,
    Finished,
    RunError,
    back_memory,
    evict,
    remove,
    shards,
    total_bytes,
    tvfast,
    warm,
)
from bench.checkpoints.table import judged, table
from bench.environment import load_average
from bench.suite import write
from bench.timing import Summary

_COLD = ("task_arithmetic", "ties")
_START_ROUNDS = 5


@dataclass(frozen=True)
class Place:
    """Where a run reads and writes; everything is on the disk of the family."""

    family: Path
    work: Path

    @property
    def out(self) -> Path:
        return self.work / "out"

    def inputs(self, row: MethodRow) -> list[Path]:
        return [shard for member in row.inputs() for shard in shards(self.family / member)]

    def recipe(self, row: MethodRow) -> Path:
        """The row's recipe, written; the output's type is the family's."""
        record = json.loads((self.family / "base" / "config.json").read_text())
        path = self.work / f"{row.method}.yml"
        path.write_text(row.recipe(self.family, record["torch_dtype"]))
        return path


def merge(place: Place, row: MethodRow, options: Sequence[str]) -> Finished:
    """One merge into an empty place."""
    remove(place.out)
    try:
        return tvfast("merge", str(place.recipe(row)), str(place.out), *options)
    finally:
        remove(place.out)


def promised_bytes(place: Place, row: MethodRow, options: Sequence[str]) -> int:
    """`peak_bytes` of `tvfast plan` for the same merge."""
    kept = [option for option in options if option != "--json"]
    found = json.loads(tvfast("plan", str(place.recipe(row)), "--json", *kept).stdout)
    return int(found["peak_bytes"])


def warm_rows(
    place: Place, rows: Sequence[MethodRow], rounds: int, options: Sequence[str]
) -> list[dict[str, Any]]:
    """Inputs in the page cache, as much memory touched.

    Each round goes through limits and rows in turn, so that drift meets all.
    """
    runs: dict[str, list[Finished]] = {row.method: [] for row in rows}
    limits: dict[tuple[str, ...], list[dict[str, float]]] = {row.inputs(): [] for row in rows}
    failed: dict[str, str] = {}
    promised: dict[str, int] = {}
    for row in rows:
        try:
            promised[row.method] = promised_bytes(place, row, options)
        except RunError as error:
            failed[row.method] = str(error)
    for _ in range(rounds):
        for members, samples in limits.items():
            files = [shard for member in members for shard in shards(place.family / member)]
            back_memory(total_bytes(files))
            warm(files)
            samples.append(warm_limit(files, shards(place.family / members[0]), place.work / "scratch"))
        for row in rows:
            if row.method in failed:
                continue
            back_memory(total_bytes(place.inputs(row)))
            warm(place.inputs(row))
            try:
                runs[row.method].append(merge(place, row, options))
            except RunError as error:
                failed[row.method] = str(error)
    records = []
    for row in rows:
        record: dict[str, Any] = {"row": row.method, "cache": "warm"}
        if row.method in failed:
            records.append(record | {"error": failed[row.method]})
            continue
        mine, limit = runs[row.method], limits[row.inputs()]
        record |= Summary(tuple(run.seconds for run in mine)).record()
        record["peak_bytes"] = max(run.peak_bytes for run in mine)
        record["cpu_s"] = Summary(tuple(run.cpu_s for run in mine)).median
        record["promised_bytes"] = promised[row.method]
        record["read_bytes"] = total_bytes(place.inputs(row))
        record["limit_s"] = Summary(tuple(sample["seconds"] for sample in limit)).record()
        record["limit_parts_s"] = {
            part: Summary(tuple(sample[part] for sample in limit)).median for part in ("cat_s", "cp_s")
        }
        records.append(record)
    return records


def cold_rows(
    place: Place, rows: Sequence[MethodRow], rounds: int, options: Sequence[str]
) -> list[dict[str, Any]]:
    """Inputs on the disk only, dropped from the page cache before every run and every limit."""
    records = []
    for row in rows:
        files = place.inputs(row)
        n_written = total_bytes(shards(place.family / row.inputs()[0]))
        samples, limits = [], []
        record: dict[str, Any] = {"row": row.method, "cache": "cold", "read_bytes": total_bytes(files)}
        try:
            for _ in range(rounds):
                read = cold_reads(files)
                written = direct_write(place.work / "scratch", n_written)
                limits.append({"read": read, "write_s": written, "seconds": read["seconds"] + written})
                evict(files)
                samples.append(merge(place, row, options))
        except RunError as error:
            records.append(record | {"error": str(error)})
            continue
        record |= Summary(tuple(run.seconds for run in samples)).record()
        record["peak_bytes"] = max(run.peak_bytes for run in samples)
        record["promised_bytes"] = promised_bytes(place, row, options)
        record["limit_s"] = Summary(tuple(limit["seconds"] for limit in limits)).record()
        record["limit_parts"] = limits
        records.append(record)
    return records


def peer_rows(
    place: Place, rows: Sequence[MethodRow], peer: Peer | str, mode: str, repeats: int
) -> list[dict[str, Any]]:
    """mergekit's times, measured or kept; a row without one says why."""
    family = json.loads((place.family / "family.json").read_text())
    records = []
    for row in rows:
        if row.instruct:
            continue  # no such method there
        record: dict[str, Any] = {"row": f"mergekit {row.method}", "cache": "warm"}
        if isinstance(peer, str):
            records.append(record | {"error": peer})
            continue
        recipe = place.recipe(row)
        # Not the paths, so that a kept result outlives the folder it was made in.
        key = peer.key(recipe.read_text().replace(str(place.family), ""), family)
        kept = peer.kept(key) if mode == "kept" else None
        if mode == "kept" and kept is None:
            record["error"] = "not measured: no kept result for this recipe, machine and version"
        elif kept is not None:
            record |= kept | {"kept": True}
        else:
            try:
                record |= peer.measure(recipe, place.out, place.inputs(row), key, row.method, repeats)
            except RunError as error:
                record["error"] = str(error)
        records.append(record)
    return records


def start_rows(work: Path) -> list[dict[str, Any]]:
    """What is mostly start-up: `tvfast --help`, and a merge of a family of 0.2 M parameters."""
    Family(PRESETS["tiny"]).write(work / "tiny")
    place = Place(work / "tiny", work)
    started: tuple[tuple[str, float, Callable[[], Finished]], ...] = (
        ("--help", 0.3, lambda: tvfast("--help")),
        ("tiny family", 1.0, lambda: merge(place, ROWS[0], ())),
    )
    records = []
    for name, at_most, start in started:
        record: dict[str, Any] = {"row": name, "cache": "warm"}
        try:
            samples = tuple(start().seconds for _ in range(_START_ROUNDS))
            records.append(record | {"at_most_s": at_most, **Summary(samples).record()})
        except RunError as error:
            records.append(record | {"error": str(error)})
    return records


@contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """A directory beside the family, removed afterwards."""
    work = folder / "bench-work"
    remove(work)
    work.mkdir()
    try:
        yield work
    finally:
        remove(work)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it is written to the result file."""
    members = {path.name for path in options.family.iterdir()}
    rows = [
        row
        for row in ROWS
        if (row.method in options.method if options.method else members.issuperset(row.inputs()))
    ]
    result = beginning("whole merges", options.family)
    result["options"] = list(options.option)
    with working_in(options.family) as work:
        place = Place(options.family, work)
        records = start_rows(work)
        records += warm_rows(place, rows, options.rounds, options.option)
        cold = [row for row in rows if row.method in _COLD]
        if options.cold_rounds:
            records += cold_rows(place, cold, options.cold_rounds, options.option)
        if options.peer != "none":
            peer = find_peer(options.peer_results, result["environment"])
            records += peer_rows(place, rows, peer, options.peer, options.peer_repeats)
    result["rows"] = judged(records)
    result["load_after"] = load_average()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, whatever the figures; 1 a merge failed; 2 wrong arguments."""
    parser = family_parser("bench/checkpoints/run.py", __doc__)
    parser.add_argument("--cold-rounds", type=int, default=3, help="0: no cold rows")
    parser.add_argument("--peer", choices=("run", "kept", "none"), default="kept")
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument(
        "--peer-results", type=Path, default=ROOT / "bench" / "results" / "mergekit-merges.json"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="of tvfast merge, e.g. --option=--memory=2G"
    )
    options = parsed(parser, arguments)
    result = measure(options)
    print(table(result))
    print(write(result, options.out))
    failed = [row for row in result["rows"] if "error" in row and not row["row"].startswith("mergekit ")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
