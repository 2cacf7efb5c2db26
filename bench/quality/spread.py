"""Means and deviations over seeds, as text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Seed = dict[str, Any]
Say = Callable[[str], None]


def spread(seeds: Sequence[Seed], figure: Callable[[Seed], float], digits: int = 1) -> str:
    """ "76.8 ± 3.2": mean and sample standard deviation."""
    values = [figure(seed) for seed in seeds]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def won(seeds: Sequence[Seed], better: Callable[[Seed], float], worse: Callable[[Seed], float]) -> str:
    """In how many seeds the first figure is above the second, and by how much."""
    n = sum(better(seed) > worse(seed) for seed in seeds)
    found = spread(seeds, lambda seed: better(seed) - worse(seed), 2)
    return f"{n} of {len(seeds)} seeds, difference {found}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
