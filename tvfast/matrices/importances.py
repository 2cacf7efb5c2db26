"""Arcee Fusion of one matrix in host memory by the CPU's kernels, without torch."""

from __future__ import annotations

import ctypes

from tvfast.ops import host
from tvfast.ops.raw import Backend, host_backend
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
    table = WorkTable([Entry(name="importance", models=(importances,))], 1)
    least = _least_of(quartiles(table, host_backend(), n_threads))
    host.fuse(model, base, least, scale, at, n_threads)
    if out.address != at:
        rounding = WorkTable([Entry(name="fused", models=(importances,), out=out)], 1)
        host_backend().combine(rounding, Program(), [TensorScalars(models=[ModelScalars()])], n_threads)


def quartile_ranks(n: int) -> list[int]:
    """(n - 1) / 4, (n - 1) / 2 and 3 (n - 1) / 4, truncated, of ascending values."""
    return [(n - 1) * quarter // 4 for quarter in (1, 2, 3)]


def quartiles(table: WorkTable, backend: Backend, n_threads: int) -> list[float]:
    """The values of these ranks in the only model of a table, none of which is below 0."""
    n = table.entries[0].models[0].n_elements
    queries = [RankQuery(0, 0, n - rank) for rank in quartile_ranks(n)]
    return [one.value for one in backend.thresholds(table, Keep.BAND, queries, n_threads)]


def _least_of(found: list[float]) -> float:
    """The importance from which on an entry is taken, in float32."""
    q25, median, q75 = found
    return _float32(median + _float32(1.5 * _float32(q75 - q25)))


def _float32(x: float) -> float:
    return ctypes.c_float(x).value
