"""The loop of a search: ask, evaluate, tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvfast.errors import EvaluationError
from tvfast.search.strategies import Point, Strategy


@dataclass(frozen=True, slots=True)
class Trial:
    """One point and its value."""

    point: Point
    value: float


@dataclass(frozen=True, slots=True)
class Found:
    """All trials in their order, and the first of the best ones; NaN is the best only where all are NaN."""

    best: Trial
    trials: tuple[Trial, ...]


def maximise(evaluate: Callable[[Point], float], strategy: Strategy) -> Found:
    """Evaluate what a strategy proposes; the best has the largest value.

        live = tvfast.LiveMerge(model, deltas=[math, code])
        def accuracy_at(weights):
            live.set(weights)
            return accuracy(model)
        found = maximise(accuracy_at, Grid([[0.2, 0.4, 0.6]] * 2))
        live.set(found.best.point)

    Raises:
        EvaluationError: `evaluate` returned no number; its own exceptions pass through.
    """
    return _search(evaluate, strategy, sign=-1.0)


def minimise(evaluate: Callable[[Point], float], strategy: Strategy) -> Found:
    """As `maximise`; the best has the smallest value."""
    return _search(evaluate, strategy, sign=1.0)


def _search(evaluate: Callable[[Point], float], strategy: Strategy, sign: float) -> Found:
    trials: list[Trial] = []
    while points := strategy.ask():
        found = [Trial(point, _number(evaluate(point), point)) for point in points]
        trials += found
        strategy.tell([sign * trial.value for trial in found])
    best = min(trials, key=lambda trial: (math.isnan(trial.value), sign * trial.value))
    return Found(best, tuple(trials))


def _number(value: object, point: Point) -> float:
    item = getattr(value, "item", None)  # of a tensor, or of a number of numpy's
    try:
        return float(item() if callable(item) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise EvaluationError(
            f"the function returned a {type(value).__name__} at {list(point)}; expected a number."
        ) from None
