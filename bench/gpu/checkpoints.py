"""Merges from disk to disk, `tvfast merge --device cuda` against `--device cpu`, on a family made here."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import running
from bench.checkpoints.family import PRESETS, Family
from bench.checkpoints.limits import warm_limit
from bench.checkpoints.rows import ROWS as METHOD_ROWS
from bench.gpu.limits import Limits
from bench.timing import Summary

METHODS = ("task_arithmetic", "ties")
ROUNDS = 2


def make_family(root: Path, preset: str) -> Family:
    """Every member in a process of its own: they do not depend on one another."""
    family = Family(PRESETS[preset])
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        members = enumerate(family.members)
        for made in [pool.submit(family.write_member, root / member, place) for place, member in members]:
            made.result()
    return family


def records(
    device: torch.device,
    preset: str,
    limits: Limits,
    tvfast: Callable[..., running.Finished] = running.tvfast,
) -> Iterator[dict[str, Any]]:
    """A row per method and device; the CPU's is the baseline of the other.

    The limit is reading the inputs with cat and writing with cp, or the bytes over the bus if that is slower.
    """
    root = Path(tempfile.mkdtemp(prefix="tvfast-gpu-check-"))
    try:
        family = make_family(root, preset)
        inputs = [shard for member in family.members for shard in running.shards(root / member)]
        running.warm(inputs)
        outputs = running.shards(root / "base")
        files = warm_limit(inputs, outputs, root / "scratch")["seconds"]
        n_read, n_written = running.total_bytes(inputs), running.total_bytes(outputs)
        bus = max(n_read / limits.uploaded, n_written / limits.downloaded)
        for row in METHOD_ROWS:
            if row.method not in METHODS:
                continue
            recipe = root / f"{row.method}.yaml"
            recipe.write_text(row.recipe(root, "bfloat16"))
            for where in dict.fromkeys(("cpu", device.type)):
                record: dict[str, Any] = {
                    "row": _name(row.method, where),
                    "backend": where,
                    "n_bytes": n_read + n_written,
                    "limit": "cat + cp" if files > bus or where == "cpu" else "bus",
                    "limit_s": files if where == "cpu" else max(files, bus),
                    "limits_s": {"cat + cp": files, "bus": bus},
                }
                try:
                    record |= _merged(tvfast, recipe, root / "out", where)
                except running.RunError as error:
                    record["error"] = str(error)
                yield record
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _name(method: str, where: str) -> str:
    return f"tvfast merge --device {where}, {method}"


def baseline_of(name: str) -> str:
    """The row of the CPU for a row of another device."""
    return name.replace("--device cuda", "--device cpu")


def _merged(tvfast: Callable[..., running.Finished], recipe: Path, out: Path, where: str) -> dict[str, Any]:
    """Seconds from the shell, start-up included; what the report says of the last."""
    seconds = []
    report: dict[str, Any] = {}
    peak = 0
    for _ in range(ROUNDS):
        running.remove(out)
        finished = tvfast("merge", str(recipe), str(out), "--device", where, "--json")
        seconds.append(finished.seconds)
        peak = max(peak, finished.peak_bytes)
        report = json.loads(finished.stdout)
    running.remove(out)
    kept = ("seconds", "device", "device_peak_bytes", "planned_device_peak_bytes")
    return {
        **Summary(tuple(seconds)).record(),
        "peak_bytes": peak,
        "report": {key: report[key] for key in kept if key in report},
    }
