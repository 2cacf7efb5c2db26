"""Which elements are read before the passes over a streamed unit, to bracket its thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tvfast.engine.arrange import Part
from tvfast.engine.tasks import row_elements

SAMPLE_ELEMENTS = 32768
"""Of one tensor, read together for a sample."""

SAMPLE_SHARE = 64
"""One element of so many is sampled; at least `SAMPLE_LEAST` of a unit, at most `SAMPLE_MOST`."""

SAMPLE_LEAST = 2**20
SAMPLE_MOST = 2**26


def samples(parts: Sequence[Part]) -> Iterator[Part]:
    """Runs of `SAMPLE_ELEMENTS` at equal distances over all parts together."""
    total = sum(part.n for part in parts)
    if any(row_elements(part.task) for part in parts):
        return  # nothing is thresholded where rows are ranked
    wanted = min(max(total // SAMPLE_SHARE, SAMPLE_LEAST), SAMPLE_MOST, total)
    step = max(SAMPLE_ELEMENTS, total * SAMPLE_ELEMENTS // max(wanted, 1))
    next_at, position = 0, 0
    for part in parts:
        start = max(position, next_at)
        while start < position + part.n:  # a run goes on in the next part: small ones count like large ones
            stop = min(next_at + SAMPLE_ELEMENTS, position + part.n)
            yield Part(part.task, start - position, stop - start)
            if stop == next_at + SAMPLE_ELEMENTS:
                next_at += step
            start = max(stop, next_at)
        position += part.n
