"""What the methods on scores share: from sums in a statistics file to numbers on one scale."""

from __future__ import annotations

from collections.abc import Callable

from tvfast.errors import ArgumentError
from tvfast.methods.scalars import float32
from tvfast.methods.statistics import TableStatistics
from tvfast.program import ScoreMap, ScoreSummary

LARGEST = float32(3.4028234663852886e38)

Mapper = Callable[[int, ScoreSummary], ScoreMap]
"""(model, summary of its scores of a tensor) -> how they are read."""


def map_scores(statistics: TableStatistics, mapper: Mapper) -> None:
    """Give every entry of the table its score maps.

    Raises:
        ArgumentError: an entry has no scores.
    """
    table = statistics.table
    for entry in table.entries:
        if len(entry.score_summaries) != table.n_models:
            raise ArgumentError(
                f"tensor {entry.name!r} has scores of {len(entry.score_summaries)} models; expected those of "
                f"all {table.n_models}. Pass scores=, one mapping per model, or give each model its stats."
            )
        entry.score_maps = tuple(mapper(k, summary) for k, summary in enumerate(entry.score_summaries))
    table.cache.clear()


def inverse(value: float) -> float:
    """1 / value as a finite float32; 0 for 0."""
    return 0.0 if value == 0.0 else min(float32(1.0 / value), LARGEST)


def as_mean(summary: ScoreSummary) -> ScoreMap:
    """The mean over samples."""
    return ScoreMap(scale=inverse(summary.divisor))


def by_most(summary: ScoreSummary) -> ScoreMap:
    """Largest score 1."""
    return ScoreMap(scale=inverse(summary.most))


def by_range(summary: ScoreSummary) -> ScoreMap:
    """Smallest score 0, largest 1."""
    scale = inverse(summary.most - summary.least)
    return ScoreMap(scale=scale, shift=float32(-summary.least * scale))


def by_l1(summary: ScoreSummary) -> ScoreMap:
    """Sum 1."""
    return ScoreMap(scale=inverse(summary.l1))
