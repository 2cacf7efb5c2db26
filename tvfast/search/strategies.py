"""Which points to try: every one of a grid, random ones, or where CMA-ES looks next."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from tvfast.errors import ArgumentError

Point: TypeAlias = tuple[float, ...]
"""One number per axis."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Every number from `low` to `high`; with `log`, equal ratios are equally far.

    Raises:
        ArgumentError: bounds that are not finite, not in order, or not above zero with `log`.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ArgumentError(f"interval from {self.low} to {self.high}; expected finite bounds in order.")
        if self.log and self.low <= 0.0:
            raise ArgumentError(f"interval from {self.low} with log; expected bounds above zero.")

    def at(self, share: float) -> float:
        """The number at a share in [0, 1] of the way from `low` to `high`."""
        if self.log:
            found = math.exp((1.0 - share) * math.log(self.low) + share * math.log(self.high))
        else:
            found = (1.0 - share) * self.low + share * self.high
        return min(max(found, self.low), self.high)


class Strategy(Protocol):
    """Proposes points until it has none; `n_points` in all."""

    @property
    def n_points(self) -> int: ...

    def ask(self) -> list[Point]:
        """The next points, none when it is done. Values of the last ones are told before."""

    def tell(self, losses: Sequence[float]) -> None:
        """What the points of the last `ask` came to, in their order.

        Lower is better; infinities are values like others, and NaN comes after all of them.
        """


class Grid:
    """Every combination of values; the last axis varies fastest.

    Args:
        axes: values of each axis.

    Raises:
        ArgumentError: no axis, or one without values.
    """

    def __init__(self, axes: Sequence[Sequence[float]]) -> None:
        self._axes = [tuple(float(value) for value in axis) for axis in axes]
        if not self._axes or not all(self._axes):
            raise ArgumentError("a grid needs at least one axis, and each at least one value.")
        self._asked = False

    @property
    def n_points(self) -> int:
        return math.prod(len(axis) for axis in self._axes)

    def ask(self) -> list[Point]:
        if self._asked:
            return []
        self._asked = True
        return list(itertools.product(*self._axes))

    def tell(self, losses: Sequence[float]) -> None:
        """A grid does not look back."""


class Random:
    """Independent draws: uniform in an interval, one of the values of a list.

    Args:
        axes: intervals, or lists of values.
        n_points: how many.
        seed: of the draws; equal seeds give equal points.

    Raises:
        ArgumentError: no axis, a list without values, or no points.
    """

    def __init__(self, axes: Sequence[Interval | Sequence[float]], n_points: int, seed: int = 0) -> None:
        if not axes or not all(isinstance(axis, Interval) or axis for axis in axes):
            raise ArgumentError("a random search needs at least one axis, an interval or a list of values.")
        self._axes, self._n_points = list(axes), _positive(n_points)
        self._generator = random.Random(seed)
        self._asked = False

    @property
    def n_points(self) -> int:
        return self._n_points

    def ask(self) -> list[Point]:
        if self._asked:
            return []
        self._asked = True
        return [tuple(self._drawn(axis) for axis in self._axes) for _ in range(self._n_points)]

    def tell(self, losses: Sequence[float]) -> None:
        """Draws do not depend on what was found."""

    def _drawn(self, axis: Interval | Sequence[float]) -> float:
        share = self._generator.random()
        if isinstance(axis, Interval):
            return axis.at(share)
        return float(axis[min(int(share * len(axis)), len(axis) - 1)])


class CMA:
    """Covariance matrix adaptation: a normal distribution that moves to where values are good.

    Args:
        axes: intervals; points stay inside.
        n_points: evaluations in all; the last generation may be cut short.
        seed: of the draws. numpy's global state is neither read nor changed.
        start: first mean; None: the middle.
        spread: first standard deviation, as a share of each interval.
        population: points of a generation; None: 4 + floor(3 ln n), as its authors do.

    Raises:
        ImportError: the package `cma` is not installed.
        ArgumentError: no interval, no points, or a start outside.

    Source: Hansen 2016, arXiv:1604.00772; the package cma.
    """

    def __init__(
        self,
        axes: Sequence[Interval],
        n_points: int,
        seed: int = 0,
        *,
        start: Sequence[float] | None = None,
        spread: float = 0.3,
        population: int | None = None,
    ) -> None:
        if not axes or not all(isinstance(axis, Interval) for axis in axes):
            raise ArgumentError(
                "CMA-ES needs at least one axis, and each an interval; expected Interval(low, high)."
            )
        self._axes, self._left = list(axes), _positive(n_points)
        self._n_points = n_points
        first = [0.5] * len(axes) if start is None else _shares(self._axes, start)
        self._distribution = _distribution(first, spread, seed, population)
        self._asked: list[Any] = []

    @property
    def n_points(self) -> int:
        return self._n_points

    def ask(self) -> list[Point]:
        if not self._left:
            return []
        self._asked = self._distribution.ask()
        shown = self._asked[: self._left]
        self._left -= len(shown)
        return [
            tuple(axis.at(float(share)) for axis, share in zip(self._axes, one, strict=True)) for one in shown
        ]

    def tell(self, losses: Sequence[float]) -> None:
        if len(losses) < len(self._asked):
            return  # the last generation, cut short
        # Their order is all that CMA-ES reads of values, and ranks are finite.
        order = sorted({loss for loss in losses if not math.isnan(loss)})
        ranks = {loss: float(rank) for rank, loss in enumerate(order)}
        self._distribution.tell(self._asked, [ranks.get(loss, float(len(order))) for loss in losses])


def _distribution(start: Sequence[float], spread: float, seed: int, population: int | None) -> Any:
    """CMA-ES in the unit cube."""
    try:
        import cma
    except ImportError:
        raise ImportError(
            "CMA-ES needs the package cma, which is not installed; run pip install 'tvfast[search]'."
        ) from None
    import numpy as np

    generator = np.random.default_rng(seed)
    options = {
        "bounds": [[0.0] * len(start), [1.0] * len(start)],
        "verbose": -9,
        "randn": lambda *shape: generator.standard_normal(shape),
        "seed": math.nan,  # its own seed would be numpy's global one
    }
    if population is not None:
        options["popsize"] = population
    return cma.CMAEvolutionStrategy(list(start), spread, options)


def _shares(axes: Sequence[Interval], start: Sequence[float]) -> list[float]:
    if len(start) != len(axes) or not all(a.low <= x <= a.high for a, x in zip(axes, start, strict=True)):
        raise ArgumentError(f"start is {list(start)}; expected one number per axis, inside its interval.")
    return [
        (math.log(x / a.low) / math.log(a.high / a.low)) if a.log else (x - a.low) / (a.high - a.low)
        for a, x in zip(axes, start, strict=True)
    ]


def _positive(n_points: int) -> int:
    if n_points < 1:
        raise ArgumentError(f"n_points is {n_points}; expected at least 1.")
    return n_points
