"""`tvfast bench`: merges in memory against the copy bandwidth of this machine."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import tvfast
from tvfast.cli.quantities import whole_number

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

N_ELEMENTS = 1 << 24
N_MODELS = 3
METHODS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.5},
    "breadcrumbs_ties": {"density": 0.9},
    "della": {"density": 0.5, "epsilon": 0.1},
    "sce": {"select_topk": 0.5},
}
"""Methods and parameters of the table; base and models are bfloat16."""

_ROUNDS = 3
_LONG_S = 0.15  # a pass that takes longer is timed once after warming up: the table shall take seconds
_COPY_BYTES = 1 << 28
_ITEM = 2  # bytes of a bfloat16


class Row(NamedTuple):
    """One timed pass. `share`: of the copy bandwidth at the same number of threads."""

    name: str
    threads: int
    seconds: float
    gb_s: float
    share: float


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "bench",
        help="merge speed of this machine, as a share of its copy bandwidth",
        description=(
            f"Merge {N_MODELS} bfloat16 models of {N_ELEMENTS >> 20} Mi parameters in memory by several "
            "methods, and compare with what copying memory reaches. Takes some seconds."
        ),
    )
    command.add_argument(
        "--threads", type=whole_number, default=0, metavar="N", help="0: one, and all cores (%(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = [options.threads] if options.threads else sorted({1, cores})
    rows = measure(threads)
    if options.json:
        print(json.dumps(as_json(rows), indent=2))
    else:
        print(as_text(rows))
    return 0


def measure(threads: list[int], n_elements: int = N_ELEMENTS) -> list[Row]:
    """The copy bandwidth and every method, for each number of threads."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(n_elements // 4096, 4096, generator=generator)

    base = noise(0.02).to(torch.bfloat16)
    models = [(base + noise(2e-4)).to(torch.bfloat16) for _ in range(N_MODELS)]
    target = base.clone()
    other = torch.empty(_COPY_BYTES, dtype=torch.uint8)

    def renew() -> None:
        target.copy_(base)
        other.fill_(1)  # otherwise what was just copied is still in a cache

    rows = []
    for n_threads in threads:
        limit = copy_gb_s(n_threads)
        rows.append(Row("copy", n_threads, 2 * _COPY_BYTES / limit / 1e9, limit, 1.0))
        for method, parameters in METHODS.items():
            arguments: dict[str, Any] = {"method": method, "n_threads": n_threads, **parameters}
            merge = partial(tvfast.merge_, target, models, **arguments)
            seconds = _median(merge, before=renew)
            n_tensors = N_MODELS + 1 + tvfast.methods.method_info(method).needs_base
            rate = n_tensors * n_elements * _ITEM / seconds / 1e9
            rows.append(Row(method, n_threads, seconds, rate, rate / limit))
    return rows


def copy_gb_s(n_threads: int, n_bytes: int = _COPY_BYTES) -> float:
    """Bytes read plus bytes written a second by memmove, each thread its own part."""
    import ctypes
    import mmap
    from concurrent.futures import ThreadPoolExecutor

    source, target = mmap.mmap(-1, n_bytes), mmap.mmap(-1, n_bytes)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in (target, source)]
    ctypes.memset(addresses[1], 1, n_bytes)  # pages that were never written are all the same one
    part = n_bytes // n_threads
    with ThreadPoolExecutor(n_threads) as pool:

        def copy() -> None:
            jobs = [
                pool.submit(ctypes.memmove, addresses[0] + t * part, addresses[1] + t * part, part)
                for t in range(n_threads)
            ]
            for job in jobs:
                job.result()

        return 2 * part * n_threads / _median(copy) / 1e9


def as_json(rows: list[Row]) -> dict[str, Any]:
    """The table with what it was measured on."""
    import platform

    return {
        "tvfast": tvfast.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "backends": {one.name: one.detail for one in tvfast.ops.backend_statuses() if one.usable},
        "n_elements": N_ELEMENTS,
        "n_models": N_MODELS,
        "dtype": "bfloat16",
        "parameters": METHODS,
        "rounds": _ROUNDS,
        "rows": [row._asdict() for row in rows],
    }


def as_text(rows: list[Row]) -> str:
    """The table."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{_processor()}; {N_MODELS} models of {N_ELEMENTS >> 20} Mi parameters, bfloat16",
        f"{'':{width}}  {'threads':>7}  {'ms':>8}  {'GB/s':>6}  share of copy",
    ]
    for index, row in enumerate(rows):
        if index and row.threads != rows[index - 1].threads:
            lines.append("")
        lines.append(
            f"{row.name:{width}}  {row.threads:7}  {1e3 * row.seconds:8.2f}  {row.gb_s:6.1f}  "
            f"{row.share:13.2f}"
        )
    return "\n".join(lines)


def _median(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of the middle of some rounds, after one to warm up."""
    from statistics import median

    samples: list[float] = []
    while len(samples) <= (_ROUNDS if not samples or samples[0] < _LONG_S else 1):
        before()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return median(samples[1:])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "unknown processor"
