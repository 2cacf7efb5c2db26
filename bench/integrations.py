"""A peer's merge without and with its integration, in one process of the peer's interpreter.

    PEER/bin/python bench/integrations.py peft [--elements 67108864] [--rounds 3] [--out FILE]

Three tensors, one thread. Prints seconds (medians of process time, the two taken in turn), their ratio and
the peak of resident memory above what was resident before the call, with the goals: 20 times faster (30 for
DELLA), and at most one output and 64 MiB more memory. The unpatched call runs once where it takes long.
Before each call, with and without, as much memory as a peer takes is touched: what a virtual machine's host
gives anew, page by page, is no part of a merge.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.checkpoints.running import back_memory
from bench.environment import environment

N_MODELS = 3
SLACK_BYTES = 64 * 2**20
SLOW_S = 5.0
BACKED_OUTPUTS = 16  # more than any peer takes at a time
Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """`make(base, deltas)` gives the call; mergekit's take models, which are base + delta."""

    name: str
    make: Callable[[Tensor, list[Tensor]], Run]
    at_least: float


def _peft(function: str, *arguments: Any) -> Callable[[Tensor, list[Tensor]], Run]:
    merges = importlib.import_module("peft.utils.merge_utils")
    weights = torch.tensor([0.5, 0.3, 0.2])
    return lambda base, deltas: lambda: getattr(merges, function)(deltas, weights, *arguments)


def _fusion_bench(how: str) -> Callable[[Tensor, list[Tensor]], Run]:
    module = importlib.import_module("fusion_bench.method.ties_merging.ties_merging_utils")

    def make(base: Tensor, deltas: list[Tensor]) -> Run:
        flat = torch.stack([delta.view(-1) for delta in deltas])
        deltas.clear()
        return lambda: module.ties_merging(flat, 20, how)

    return make


def _sd_mecha(function: str, **own: Any) -> Callable[[Tensor, list[Tensor]], Run]:
    importlib.import_module("sd_mecha")
    module = importlib.import_module("sd_mecha.extensions.builtin.merge_methods.ties")
    return lambda base, deltas: lambda: getattr(module, function).__wrapped__(*deltas, **own)


def _mergekit(name: str, **own: Any) -> Callable[[Tensor, list[Tensor]], Run]:
    groups = importlib.import_module("mergekit.merge_methods.base").TensorGroup
    registry = importlib.import_module("mergekit.merge_methods.registry")
    parameters = {"weight": [0.5, 0.3, 0.2], **own}

    def make(base: Tensor, deltas: list[Tensor]) -> Run:
        for delta in deltas:
            delta.add_(base)
        group = groups.from_tensors([base, *deltas], base_index=0)
        return lambda: registry.get(name)((group,), parameters=parameters)

    return make


def rows(peer: str) -> list[Row]:
    """What is timed of a peer."""
    if peer == "peft":
        return [Row("ties", _peft("ties", 0.2), 20), Row("dare_ties", _peft("dare_ties", 0.5), 20)]
    if peer == "fusion_bench":
        return [Row(f"ties, {how}", _fusion_bench(how), 20) for how in ("sum", "mean", "max")]
    if peer == "sd_mecha":
        dropout: dict[str, Any] = {"probability": torch.tensor(0.5), "k": 1.0, "seed": 1}
        return [
            Row("ties_sum", _sd_mecha("ties_sum", k=0.2), 20),
            Row(
                "ties_sum_with_dropout, DELLA",
                _sd_mecha("ties_sum_with_dropout", della_eps=0.1, **dropout),
                30,
            ),
        ]
    return [
        Row("ties", _mergekit("ties", density=0.2), 20),
        Row("della", _mergekit("della", density=0.5, epsilon=0.1), 30),
    ]


def inputs(n_elements: int) -> tuple[Tensor, list[Tensor]]:
    """A base and task vectors of 8192 columns, as for the other rows of the benchmark."""
    generator = torch.Generator().manual_seed(1)
    shape = (n_elements // 8192, 8192)
    base = torch.randn(shape, generator=generator).mul_(0.02)
    return base, [torch.randn(shape, generator=generator).mul_(0.001) for _ in range(N_MODELS)]


def timed(run: Run, n_bytes: int) -> float:
    """Processor seconds of a call, after `n_bytes` of memory were written to and freed (`back_memory`)."""
    back_memory(n_bytes)
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    return time.process_time() - begin


def peak_bytes(run: Run) -> int:
    """The highest resident memory during a call above what it was before."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    return field("VmHWM") - before


def measured(row: Row, integration: Any, n_elements: int, rounds: int) -> dict[str, Any]:
    run = row.make(*inputs(n_elements))
    output_bytes = 4 * n_elements
    plain, ours = [], []
    for index in range(rounds):
        if not plain or max(plain) < SLOW_S:
            plain.append(timed(run, BACKED_OUTPUTS * output_bytes))
        with integration.install():
            if index == 0:
                peak = peak_bytes(run)
            ours.append(timed(run, BACKED_OUTPUTS * output_bytes))
            counts = integration.stats()
    ratio = statistics.median(plain) / statistics.median(ours)
    return {
        "row": row.name,
        "plain_s": statistics.median(plain),
        "tvfast_s": statistics.median(ours),
        "ratio": ratio,
        "at_least": row.at_least,
        "peak_bytes": peak,
        "output_bytes": output_bytes,
        "met": ratio >= row.at_least and peak <= output_bytes + SLACK_BYTES,
        "stats": counts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=["peft", "mergekit", "fusion_bench", "sd_mecha"])
    parser.add_argument("--elements", type=int, default=64 * 2**20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    integration = importlib.import_module(f"tvfast.integrations.{options.peer}")
    results = []
    for row in rows(options.peer):
        found = measured(row, integration, options.elements, options.rounds)
        results.append(found)
        print(
            f"{options.peer:12} {found['row']:30} {found['plain_s']:8.3f} s {found['tvfast_s']:8.3f} s "
            f"{found['ratio']:6.1f} x (asked {found['at_least']:.0f}) "
            f"peak {found['peak_bytes'] / 2**20:6.0f} MiB of output {found['output_bytes'] / 2**20:.0f}",
            flush=True,
        )
    if options.out:
        record = {
            "peer": options.peer,
            "peer_version": importlib.metadata.version(options.peer.replace("_", "-")),
            "elements": options.elements,
            "environment": environment(),
        }
        options.out.write_text(json.dumps({**record, "rows": results}, indent=1) + "\n")
    return 0 if all(row["met"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
