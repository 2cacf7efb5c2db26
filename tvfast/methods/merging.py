"""From a method and a table to its results, by the shortest way that the backend has."""

from __future__ import annotations

from collections.abc import Callable

from tvfast.methods.base import ProgramMethod
from tvfast.methods.statistics import TableStatistics
from tvfast.methods.task_vectors import TaskVectorMethod, trim
from tvfast.ops.raw import TrimmingBackend
from tvfast.program import Tie


def merge_table(
    method: ProgramMethod, statistics: TableStatistics, go_on: Callable[[], None] = lambda: None
) -> None:
    """Writes the `out` of every entry of `statistics.table`.

    A method that only trims needs no answer from a backend that resolves thresholds by itself, as
    `ops.raw.TrimmingBackend` does. The bits are the same.

    Args:
        go_on: called before the first step and before the entries are written; raises to stop.
    """
    backend, table = statistics.backend, statistics.table
    go_on()
    if isinstance(method, TaskVectorMethod) and isinstance(backend, TrimmingBackend):
        ranks = method.trims(table.n_models)
        # The place of an element among its equals takes a pass of its own, which a caller who sees the counts
        # often spares.
        if ranks is not None and method.program().tie is not Tie.INDEX:
            scalars = method.plain_scalars(table)
            queries = trim(statistics, scalars, ranks)
            if queries:
                backend.combine_trimmed(table, method.program(), scalars, queries)
                return
    program, scalars = method.resolve(statistics)
    go_on()
    backend.combine(table, program, scalars, statistics.n_threads)
