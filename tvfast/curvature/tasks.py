"""Curvature of several tasks as one: sums over tasks, leave-one-out by subtraction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tvfast.errors import ArgumentError, StatisticsError
from tvfast.factors import Factor, Root
from tvfast.factors.records import Curvature, Source, Statistics, statistics_of

ACCUMULATE = ("paper", "weighted", "ideal")


class Tasks:
    """The curvature of T tasks, seen as one.

    With n_s the samples of task s, N their sum over the tasks that count, and λ_s = n_s / N:

    - "paper": A = Σ λ_s A_s, B = Σ B_s, F = Σ λ_s F_s: TAK's surrogate. Its B grows with the number of tasks,
      about T times what "weighted" and "ideal" give, so that a scale found for one mode does not fit another;
    - "weighted": A = Σ λ_s A_s, B = Σ λ_s B_s, F = Σ λ_s F_s;
    - "ideal": a term of its own for every task, Σ λ_s B_s (x) A_s, at T times the cost.

    Args:
        sources: statistics or paths, one per task.
        accumulate: one of the three.

    Raises:
        ArgumentError: no task, or an unknown mode.
        StatisticsError: tasks with different parameters.

    Notes:
        Sums are float64, and stay in memory once `without` has asked for them: leaving out each of T tasks in
        turn costs T subtractions. Square roots are put side by side, so they grow with T, and are not
        subtracted.

    Source: Porrello et al. 2026, arXiv:2602.17385, equations 7 and 8 and their code.
    """

    def __init__(self, sources: Sequence[Source], accumulate: str = "paper") -> None:
        if accumulate not in ACCUMULATE:
            raise ArgumentError(f"accumulate is {accumulate!r}; expected one of {', '.join(ACCUMULATE)}.")
        if not sources:
            raise ArgumentError("stats is empty; expected the statistics of one task at least.")
        self.tasks = [statistics_of(source, f"stats[{k}]") for k, source in enumerate(sources)]
        self.accumulate = accumulate
        self._sums: dict[str, Curvature] = {}
        first = self.tasks[0]
        for k, other in enumerate(self.tasks[1:], start=1):
            if different := sorted(first.keys() ^ other.keys()):
                holder = "stats[0]" if different[0] in first else f"stats[{k}]"
                raise StatisticsError(
                    f"stats[{k}]: tasks have different parameters: only {holder} has {different[0]!r} "
                    f"({len(different)} differ); expected the statistics of one model. Collect the same "
                    "layers."
                )

    def __len__(self) -> int:
        return len(self.tasks)

    def names(self) -> Iterator[str]:
        """Parameters, in the order of the first task."""
        return iter(self.tasks[0])

    def terms(self, name: str, without: int | None = None) -> list[Curvature]:
        """What is added up for a parameter, in float64: one for all tasks, or with "ideal" one for each.

        Args:
            without: a task that does not count: the one that is trained.

        Raises:
            ArgumentError: no task would be left.
        """
        counted = self._counted(without)
        if self.accumulate == "ideal":
            found = {k: self._task(name, k) for k in counted}
            total = sum(one.n_samples for one in found.values())
            return [_scaled(one, one.n_samples / total, first_only=True) for one in found.values()]
        if without is None:
            return [self._divided(self._sum(name, counted))]
        if name not in self._sums:
            self._sums[name] = self._sum(name, range(len(self)))
        whole = self._sums[name]
        if any(isinstance(factor, Root) for factor in whole.factors):
            return [self._divided(self._sum(name, counted))]
        return [self._divided(_minus(whole, self._raw(name, without)))]

    def _counted(self, without: int | None) -> list[int]:
        if without is not None and not 0 <= without < len(self):
            raise ArgumentError(f"without is {without}; expected a task from 0 to {len(self) - 1}.")
        counted = [k for k in range(len(self)) if k != without]
        if not counted:
            raise ArgumentError("without leaves no task; expected two tasks at least.")
        return counted

    def _task(self, name: str, k: int) -> Curvature:
        task = self.tasks[k]
        return (
            task.read(name, torch.float64)
            if isinstance(task, Statistics)
            else task[name].to(dtype=torch.float64)
        )

    def _raw(self, name: str, k: int) -> Curvature:
        """What a task adds to the sums: n A, n F and B, or n B."""
        one = self._task(name, k)
        return _scaled(one, one.n_samples, first_only=self.accumulate == "paper")

    def _sum(self, name: str, counted: Sequence[int]) -> Curvature:
        total = self._raw(name, counted[0])
        for k in counted[1:]:
            other = self._raw(name, k)
            if other.shape != total.shape or other.bias != total.bias:
                raise StatisticsError(
                    f"stats[{k}]: parameter {name!r} has shape {list(other.shape)} and bias {other.bias}, in "
                    f"stats[{counted[0]}] {list(total.shape)} and {total.bias}; expected one model and "
                    "convention."
                )
            total = _combined(total, other, "plus")
        return total

    def _divided(self, raw: Curvature) -> Curvature:
        return _scaled(raw, 1.0 / raw.n_samples, first_only=self.accumulate == "paper")


def _scaled(one: Curvature, factor: float, *, first_only: bool) -> Curvature:
    """factor · A and factor · F; factor · B unless `first_only`. The number of samples stays."""
    return one.replaced(
        a=_times(one.a, factor),
        b=one.b if first_only else _times(one.b, factor),
        block=_times(one.block, factor),
    )


def _times(one: Factor | None, factor: float) -> Factor | None:
    return None if one is None else one.scaled(factor)


def _combined(one: Curvature, other: Curvature, operation: str) -> Curvature:
    def both(name: str) -> Any:
        mine, theirs = getattr(one, name), getattr(other, name)
        if (mine is None) != (theirs is None):
            raise StatisticsError(
                f"parameter {one.parameter!r}: one task has {name.upper()}, another has not; expected one "
                "convention. Collect all tasks alike."
            )
        return None if mine is None else getattr(mine, operation)(theirs)

    sign = 1.0 if operation == "plus" else -1.0
    return one.replaced(
        a=both("a"), b=both("b"), block=both("block"), n_samples=one.n_samples + sign * other.n_samples
    )


def _minus(one: Curvature, other: Curvature) -> Curvature:
    return _combined(one, other, "minus")


def tasks_of(stats: Source | Sequence[Source] | Tasks, accumulate: str) -> Tasks:
    """One or several statistics as tasks."""
    if isinstance(stats, Tasks):
        return stats
    if isinstance(stats, Mapping | str) or hasattr(stats, "__fspath__"):
        return Tasks([stats], accumulate)
    return Tasks(list(stats), accumulate)
