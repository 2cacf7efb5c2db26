"""Arcee Fusion of one matrix in host memory by the CPU's kernels, without torch."""

from __future__ import annotations

import ctypes

from tvfast.ops import host
from tvfast.ops.raw import host_backend
from tvfast.program import (
    Entry,
    Keep,
    ModelScalars,
    Program,
    RankQuery,
    TensorScalars,
    View,
    WorkTable,
)

FLOOR = 1e-8
"""Added to every probability."""


def fuse_rows(
    base: View, model: View, importances: View, out: View, row: int, scale: float, n_threads: int
) -> None:
    """b + scale · d where the importance |d| · KL reaches median + 1.5 (q75 - q25), d = m - b; otherwise b.

    Args:
        base, model, out: of one size, at least one element.
        importances: float32 of that size, which is written over; may be `out`, and neither is an input.
        row: elements of a row, for divergences.
    """
    divergences = (ctypes.c_double * (base.n_elements // row))()
    at = importances.address
    host.divergences(model, base, row, FLOOR, ctypes.addressof(divergences), at, n_threads)
    host.fuse(model, base, _least_of(_quartiles(importances, n_threads)), scale, at, n_threads)
    if out.address != at:
        rounding = WorkTable([Entry(name="fused", models=(importances,), out=out)], 1)
        host_backend().combine(rounding, Program(), [TensorScalars(models=[ModelScalars()])], n_threads)


def _quartiles(importances: View, n_threads: int) -> list[float]:
    """The values of ascending ranks (n - 1) / 4, (n - 1) / 2, 3 (n - 1) / 4, truncated; none is below 0."""
    n = importances.n_elements
    table = WorkTable([Entry(name="importance", models=(importances,))], 1)
    queries = [RankQuery(0, 0, n - (n - 1) * quarter // 4) for quarter in (1, 2, 3)]
    return [one.value for one in host_backend().thresholds(table, Keep.BAND, queries, n_threads)]


def _least_of(quartiles: list[float]) -> float:
    """The importance from which on an entry is taken, in float32."""
    q25, median, q75 = quartiles
    return _float32(median + _float32(1.5 * _float32(q75 - q25)))


def _float32(x: float) -> float:
    return ctypes.c_float(x).value
