"""Strategies: which points, how many, always the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tvfast import search
from tvfast.errors import ArgumentError, EvaluationError
from tvfast.search import CMA, Grid, Interval, Random, Strategy


def asked(strategy: Strategy, value: Callable[[Sequence[float]], float] = sum) -> list[tuple[float, ...]]:
    found: list[tuple[float, ...]] = []
    while points := strategy.ask():
        found += points
        strategy.tell([value(point) for point in points])
    return found


def test_a_grid_is_every_combination_and_its_last_axis_varies_fastest() -> None:
    grid = Grid([[1, 2], [0.5, 0.25, 0.0]])
    assert grid.n_points == 6
    assert asked(grid) == [(1.0, 0.5), (1.0, 0.25), (1.0, 0.0), (2.0, 0.5), (2.0, 0.25), (2.0, 0.0)]


def test_random_points_are_of_their_seed_and_inside() -> None:
    axes = [Interval(-1.0, 2.0), [0.2, 0.8], Interval(1e-4, 1.0, log=True)]
    points = asked(Random(axes, 400, seed=3))
    assert points == asked(Random(axes, 400, seed=3))
    assert points != asked(Random(axes, 400, seed=4))
    first, second, third = zip(*points, strict=True)
    assert min(first) < -0.95
    assert max(first) > 1.95
    assert set(second) == {0.2, 0.8}
    assert 0.4 < sum(value < 1e-2 for value in third) / 400 < 0.6


def test_cma_finds_a_minimum_and_leaves_numpys_state_alone() -> None:
    pytest.importorskip("cma", reason="CMA-ES is the package cma's")
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    axes = [Interval(0.0, 1.0), Interval(-1.0, 1.0), Interval(1e-3, 1.0, log=True)]

    def far(point: Sequence[float]) -> float:
        return (point[0] - 0.3) ** 2 + (point[1] + 0.4) ** 2 + (math.log10(point[2]) + 2.0) ** 2

    found = search.minimise(far, CMA(axes, 300, seed=1))
    assert len(found.trials) == 300
    assert found.best.value < 1e-3
    assert found.best.value == min(trial.value for trial in found.trials)
    assert all(a.low <= x <= a.high for t in found.trials for a, x in zip(axes, t.point, strict=True))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]
    assert asked(CMA(axes, 20, seed=1), far) == [trial.point for trial in found.trials[:20]]
    assert asked(CMA(axes, 20, seed=2), far) != [trial.point for trial in found.trials[:20]]
    (first, *_) = asked(CMA(axes, 1, start=[0.5, 0.25, 0.01], spread=1e-9))
    assert first == pytest.approx((0.5, 0.25, 0.01))


def test_cma_takes_values_that_are_no_numbers_for_the_worst() -> None:
    pytest.importorskip("cma", reason="CMA-ES is the package cma's")

    def value(point: Sequence[float]) -> float:
        return math.nan if point[0] > 0.5 else point[0]

    found = search.minimise(value, CMA([Interval(0.0, 1.0)] * 2, 60, seed=1))
    assert found.best.value < 0.1


def test_the_best_is_the_first_of_the_largest() -> None:
    found = search.maximise(lambda p: math.nan if p[0] == 0 else -abs(p[0] - 2), Grid([[0, 1, 3, 2, 2.0]]))
    assert found.best.point == (2.0,)
    assert found.trials[3] is found.best
    assert search.minimise(lambda p: p[0], Grid([[3, 1, 2]])).best.value == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid([]), "at least one axis"),
        (lambda: Grid([[1.0], []]), "at least one value"),
        (lambda: Random([], 3), "at least one axis"),
        (lambda: Random([Interval(0, 1)], 0), "n_points is 0"),
        (lambda: CMA([[0.0, 1.0]], 3), r"expected Interval\(low, high\)"),
        (lambda: CMA([Interval(0, 1)], 3, start=[2.0]), "inside its interval"),
        (lambda: Interval(1.0, 1.0), "from 1.0 to 1.0"),
        (lambda: Interval(0.0, math.inf), "finite bounds"),
        (lambda: Interval(0.0, 1.0, log=True), "above zero"),
    ],
)
def test_wrong_searches(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(EvaluationError, match=r"returned a NoneType at \[1.0\]"):
        search.maximise(lambda point: None, Grid([[1]]))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("worst", [math.inf, math.nan, 1e308])
def test_cma_ranks_infinities_and_nan(worst: float) -> None:
    """Only the order of values counts: -inf is better than every number, and NaN comes last."""
    pytest.importorskip("cma", reason="CMA-ES is the package cma's")

    def follow(values: Sequence[float]) -> list[tuple[float, ...]]:
        search = CMA([Interval(0.0, 1.0)] * 2, 18, seed=1, population=6)
        points = search.ask()
        search.tell(values)
        return points + search.ask()

    assert follow([3.0, -math.inf, 1.0, 2.0, worst, 1.0]) == follow([3.0, -5.0, 1.0, 2.0, 7.0, 1.0])
    assert follow([math.inf, 2.0, 1.0, 3.0, math.nan, 0.0]) == follow([4.0, 2.0, 1.0, 3.0, 5.0, 0.0])


def test_cma_goes_where_values_are_without_a_bound() -> None:
    pytest.importorskip("cma", reason="CMA-ES is the package cma's")

    def value(point: Sequence[float]) -> float:
        return -math.inf if point[0] < 0.1 else point[0]

    found = search.minimise(value, CMA([Interval(0.0, 1.0)] * 2, 90, seed=1))
    assert found.best.value == -math.inf
    assert sum(trial.value == -math.inf for trial in found.trials[-30:]) > 15


def test_nan_is_the_best_only_where_all_are() -> None:
    values = iter([math.nan, math.inf, math.nan])
    assert search.minimise(lambda point: next(values), Grid([[0, 1, 2]])).best.value == math.inf
    assert math.isnan(search.minimise(lambda point: math.nan, Grid([[0, 1]])).best.value)
