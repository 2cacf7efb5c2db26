"""What streamed tables are not asked: planes, passes for no question, NaN where norms are finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.conftest import load
from tests.engine.test_streamed import TensorSource, blocks_of, one_tensor, plain_scalars, table_of
from tvfast.engine.streamed import StreamedBackend
from tvfast.errors import BackendError
from tvfast.methods import TableStatistics, make_method
from tvfast.ops.raw import Wants
from tvfast.program import Keep, Program, Tie, WorkTable


@pytest.mark.parametrize(
    ("keep", "wants", "value", "looked"),
    [
        (Keep.ALL, Wants.GRAM, 1.0, [False, False]),
        (Keep.ALL, Wants.GRAM | Wants.LAST, 1.0, [False, False]),
        (Keep.ALL, Wants.SQUARES, 1.0, [False, False]),
        (Keep.ALL, Wants.SQUARES, math.inf, [False, True, False]),
        (Keep.ALL, Wants.GRAM, math.nan, [False, True, False]),
        (Keep.ALL, Wants.GRAM | Wants.LAST, -math.inf, [False, True, False]),
        (Keep.ALL, Wants.L1, 1.0, [True, False]),
        (Keep.BAND, Wants.GRAM, 1.0, [True, False]),
    ],
)
@pytest.mark.parametrize("where", ["base", "first", "last"])
def test_norms_that_are_finite_spare_the_search_for_nan(
    keep: Keep, wants: Wants, value: float, looked: list[bool], where: str
) -> None:
    method = make_method("task_arithmetic")
    items = one_tensor()
    {"base": items[0].base, "first": items[0].models[0], "last": items[0].models[-1]}[where][31] = value
    table = table_of(items, method, resident=False)
    source = TensorSource(items, method, table, blocks_of(items, 10))
    backend = StreamedBackend(load("cpp"), source)
    backend.measure(table, Program(keep=keep), plain_scalars(table), wants)
    backend.combine(table, Program(), plain_scalars(table))
    assert source.looked == looked


def test_what_norms_do_not_cover_is_searched() -> None:
    method = make_method("task_arithmetic")
    items = one_tensor()
    table = table_of(items, method, resident=False)
    entry = table.entries[0]
    for changed in (replace(entry, task_vectors=True), replace(entry, scores=entry.models)):
        other = WorkTable([changed], table.n_models)
        source = TensorSource(items, method, table, blocks_of(items, 10))
        StreamedBackend(load("cpp"), source).measure(other, Program(), plain_scalars(other), Wants.SQUARES)
        assert source.looked == [True]


def test_planes_are_never_asked_for() -> None:
    method = make_method("linear")
    items = one_tensor()
    table = table_of(items, method, resident=False)
    backend = StreamedBackend(load("cpp"), TensorSource(items, method, table, blocks_of(items, 10)))
    statistics = TableStatistics(backend, table, None)
    assert not statistics.planes_fit()
    with pytest.raises(BackendError, match="never in memory at once"):
        statistics.draw_masks(Program(keep=Keep.RANDOM), plain_scalars(table))
    with pytest.raises(BackendError, match="read in parts"):
        backend.row_masks(table, Program(keep=Keep.RANDOM, tie=Tie.GE), plain_scalars(table))
    assert backend.why_not(table) is None


def test_nothing_is_read_for_no_questions() -> None:
    method = make_method("linear")
    items = one_tensor()
    table = table_of(items, method, resident=False)
    backend = StreamedBackend(load("cpp"), TensorSource(items, method, table, blocks_of(items, 10)))
    assert backend.thresholds(table, Keep.BAND, []) == []
    assert backend.nth_equal(table, Keep.BAND, []) == []
    assert backend.n_passes == 0
