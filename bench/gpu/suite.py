"""Time rows on one device and add them to a result file.

    python -m bench.gpu OUT.json --group merges --elements 100000000

Groups: merges (of `--elements`), layers, table, live, checkpoints. `--device cpu` runs the same rows at tiny
sizes on the stand-ins of both backends, which the variables TVFAST_SIMT=1 and TRITON_INTERPRET=1 choose: for
their logic, not for figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import environment
from bench.gpu import checkpoints, layers, merges, tables
from bench.gpu.clock import Clock
from bench.gpu.inputs import DeviceBuffers, fitting
from bench.gpu.limits import Limits, measured
from bench.gpu.registry import BACKENDS, BASELINE, FULL, TINY, Goal, GpuRow, Place, Ready, Shapes
from bench.gpu.table import judged, table
from bench.registry import UnavailableError

GROUPS: dict[str, tuple[GpuRow, ...]] = {
    "merges": merges.ROWS,
    "layers": layers.ROWS,
    "table": tables.TABLE_ROWS,
    "live": tables.LIVE_ROWS,
    "checkpoints": (),
}


class DeviceLostError(RuntimeError):
    """An earlier failure left the device unusable for this process."""


def goals() -> dict[str, Sequence[Goal]]:
    """Of every row by name."""
    found: dict[str, Sequence[Goal]] = {row.name: row.goals for rows in GROUPS.values() for row in rows}
    for method in checkpoints.METHODS:
        name = checkpoints._name(method, "cuda")
        found[name] = (Goal(checkpoints.baseline_of(name)),)
    return found


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Public functions take this backend; None: as they would."""
    before = os.environ.get("TVFAST_BACKEND")
    try:
        os.environ.pop("TVFAST_BACKEND", None)
        if backend is not None:
            os.environ["TVFAST_BACKEND"] = backend
        yield
    finally:
        os.environ.pop("TVFAST_BACKEND", None)
        if before is not None:
            os.environ["TVFAST_BACKEND"] = before


def timed(row: GpuRow, place: Place, clock: Clock, limits: Limits) -> dict[str, Any]:
    """One record: samples, or why there are none.

    Raises:
        DeviceLostError: the device answers nothing any more.
    """
    record: dict[str, Any] = {"row": row.name, "backend": place.backend_name or BASELINE}
    if place.buffers is not None:
        record["n_elements"] = place.buffers.n_elements
        if row.most_elements is not None and place.buffers.n_elements > row.most_elements:
            return record | {"unavailable": f"takes too long above {row.most_elements} elements"}
    try:
        with forced(place.backend_name), torch.no_grad():
            ready = row.make(place)
            _check(ready)
            record |= clock.time(ready.run)
            record |= _facts(ready, limits)
            _synchronize(place.device)
    except UnavailableError as error:
        record["unavailable"] = str(error)
    except torch.OutOfMemoryError as error:
        record["unavailable" if row.baseline else "error"] = f"out of memory: {str(error)[:200]}"
    except Exception as error:  # a row that fails must not take the others with it
        record["error"] = f"{type(error).__name__}: {str(error).strip()[:500]}"
        try:
            _synchronize(place.device)
        except RuntimeError as lost:
            raise DeviceLostError(f"{row.name} ({record['backend']}): {record['error']}") from lost
    return record


def _check(ready: Ready) -> None:
    """Runs once and raises if an element of what it writes was not written."""
    if ready.written is None:
        return
    ready.written.fill_(float("nan"))
    ready.run()
    if not bool(ready.written.isfinite().all()):
        raise RuntimeError("the output has elements that were not written, or are not finite")


def _facts(ready: Ready, limits: Limits) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if ready.cost is not None:
        facts = {
            "n_bytes": ready.cost.n_bytes,
            "n_operations": ready.cost.n_operations,
            "limit": ready.cost.name(limits),
            "limit_s": ready.cost.seconds(limits),
        }
    if ready.written is not None:
        facts["checksum"] = _checksum(ready.written)
    return facts


def _checksum(tensor: Tensor) -> int:
    """A sum over the bits, which two outputs that differ in one element do not share."""
    return int(tensor.view(-1).view(torch.int16).sum(dtype=torch.int64))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(
    group: str, backends: Sequence[str], named: Sequence[str] = ()
) -> Iterator[tuple[GpuRow, str | None]]:
    """Torch's rows that come first in their group, then backend by backend, then the rest of torch's."""
    rows = [row for row in GROUPS[group] if not named or any(name in row.name for name in named)]
    quick = list(takewhile(lambda row: row.baseline, rows))
    yield from ((row, None) for row in quick)
    yield from ((row, backend) for backend in backends for row in rows if not row.baseline)
    yield from ((row, None) for row in rows[len(quick) :] if row.baseline)


def records_of(
    group: str, device: torch.device, options: argparse.Namespace, limits: Limits
) -> Iterator[dict[str, Any]]:
    """The records of one group, one after the other."""
    shapes = shapes_of(device)
    if group == "checkpoints":
        yield from checkpoints.records(device, shapes.preset, limits)
        return
    clock = Clock(device)
    buffers = _buffers(options.elements, device, shapes) if group == "merges" else None
    lost = ""
    for row, backend in rows_of(group, options.backends, options.row):
        if lost:
            yield {"row": row.name, "backend": backend or BASELINE, "error": f"not run: {lost}"}
            continue
        try:
            yield timed(row, Place(device, shapes, buffers, backend), clock, limits)
        except DeviceLostError as error:
            lost = str(error)
            yield {"row": row.name, "backend": backend or BASELINE, "error": lost}
        if device.type == "cuda" and not lost:
            _release()


def _release() -> None:
    """Gives back what a row held: operands, and what it compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def shapes_of(device: torch.device) -> Shapes:
    return FULL if device.type == "cuda" else TINY


def _buffers(n_elements: int, device: torch.device, shapes: Shapes) -> DeviceBuffers:
    return DeviceBuffers(fitting(n_elements, device, shapes.columns), device, shapes.columns)


def described(device: torch.device) -> dict[str, Any]:
    """Name, memory, cache, multiprocessors and driver."""
    if device.type != "cuda":
        return {"name": "no GPU, stand-ins on the CPU"}
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "memory": facts.total_memory,
        "l2": facts.L2_cache_size,
        "multiprocessors": facts.multi_processor_count,
        "capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        "driver": os.environ.get("TVFAST_DRIVER"),
    }


def fresh(device: torch.device) -> dict[str, Any]:
    """A result without rows."""
    found = environment()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": described(device),
        "environment": found,
        "commit": found["commit"] or os.environ.get("TVFAST_COMMIT"),
        "limits": {},
        "rows": [],
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """All at once, so that a run that is cut off leaves the rows before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def run(options: argparse.Namespace) -> int:
    """Number of rows that failed."""
    device = torch.device(options.device)
    shapes = shapes_of(device)
    result = json.loads(options.out.read_text()) if options.out.exists() else fresh(device)
    if not result["limits"]:
        result["limits"] = measured(Clock(device), shapes.limit_bytes, shapes.side).record()
    limits = Limits(**result["limits"])
    n_failed = 0
    for group in options.group:
        start = time.perf_counter()
        for record in records_of(group, device, options, limits):
            record |= {"group": group, "device": result["device"]["name"]}
            n_failed += "error" in record
            result["rows"] = judged([*result["rows"], record], goals())
            write(options.out, result)
        print(f"{group}: {time.perf_counter() - start:.1f} s", flush=True)
    return n_failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all rows ran or said why they cannot here; 1 some failed; 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="result file; rows are added to what it holds")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[], help="what to time")
    parser.add_argument("--elements", type=int, default=10**8, help="parameters of a tensor of `merges`")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for the stand-ins")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--row", nargs="+", default=[], help="only rows with one of these in their names")
    parser.add_argument("--show", action="store_true", help="print the table of the file")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and options.group and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu runs the rows on stand-ins at tiny sizes")
    n_failed = run(options) if options.group else 0
    if options.show:
        print(table(json.loads(options.out.read_text())))
    return 1 if n_failed else 0
