"""Weight disentanglement: whether two task vectors keep out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, EvaluationError

AXIS = tuple(round(-3.0 + 0.3 * k, 1) for k in range(21))
"""21 values from -3 to 3, zero among them."""

Distance = Callable[[Tensor, Tensor], float]


class Coefficients(Protocol):
    """What is asked of a `LiveMerge`."""

    @property
    def n_tasks(self) -> int: ...

    def set(self, coefficients: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class DisentanglementMap:
    """ξ(α₁, α₂) on a grid.

    Attributes:
        first, second: the values of α₁ and α₂; n and m.
        by_task: [2, n, m], float64: the expectation over each task's data.
        n_forward: evaluations of one task's data that it took.
        n_merges: merges that it took.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    by_task: Tensor
    n_forward: int
    n_merges: int

    @property
    def error(self) -> Tensor:
        """[n, m]: the sum over both tasks; for disagreement from 0 to 2."""
        return self.by_task.sum(0)

    def within(self, most: float) -> float:
        """Share of the grid whose error is at most `most`."""
        return float((self.error <= most).double().mean())

    def as_json(self) -> dict[str, Any]:
        return {
            "first": list(self.first),
            "second": list(self.second),
            "by_task": self.by_task.tolist(),
            "n_forward": self.n_forward,
            "n_merges": self.n_merges,
        }


def disagreement(single: Tensor, joint: Tensor) -> float:
    """Share of samples with another class: of classes [N], or of scores [N, C] by their argmax."""
    left, right = (found if _are_classes(found) else found.argmax(-1) for found in (single, joint))
    return float((left != right).double().mean())


def disentanglement(
    live: Coefficients,
    predict: Callable[[int], Any],
    *,
    first: Sequence[float] = AXIS,
    second: Sequence[float] | None = None,
    distance: Distance = disagreement,
) -> DisentanglementMap:
    """The weight-disentanglement error of two task vectors, on a grid of coefficients.

    ξ(α₁, α₂) = Σ_t E_{x of task t} dist( f(x; θ₀ + α_t τ_t), f(x; θ₀ + α₁ τ₁ + α₂ τ₂) ): model against model,
    no labels. Where it is small, a task's vector changes predictions on its own data alone.

    Args:
        live: a `LiveMerge` of two tasks by a method that adds them, such as task arithmetic. Left at the last
            point.
        predict: task (0 or 1) -> predictions of the live model on that task's data, the same data in every
            call: classes [N] of integers, or scores [N, C]. Called without gradients.
        first, second: α₁ and α₂; `second` as `first` by default. That [-3, 3] is the usual grid is our
            reading.
        distance: of two predictions; by default the share of samples whose class differs.

    Returns:
        The map, with the number of evaluations.

    Raises:
        ArgumentError: not two tasks, or an axis that is empty or not finite.
        EvaluationError: predictions that are no tensor [N] or [N, C], or of another number than before.

    Notes:
        Single-task predictions are made once per value of an axis. Where the other coefficient is 0, both
        models are the same and nothing is evaluated. n · m + n + m merges at most; with 0 on both axes 2 n m
        evaluations.

    Source: Ortiz-Jimenez et al. 2023, arXiv:2305.12827; Hazimeh et al. 2025, arXiv:2511.14569, for any
        classifier.
    """
    if live.n_tasks != 2:
        raise ArgumentError(f"live merges {live.n_tasks} tasks; expected two, whose vectors are compared.")
    axes = (tuple(map(float, first)), tuple(map(float, first if second is None else second)))
    if not all(axis and all(map(math.isfinite, axis)) for axis in axes):
        raise ArgumentError("an axis is empty or has a number that is not finite; expected finite numbers.")
    run = _Run(live, predict)
    with torch.no_grad():
        singles = [[run.at(_alone(task, value), task) for value in axes[task]] for task in (0, 1)]
        by_task = torch.zeros(2, len(axes[0]), len(axes[1]), dtype=torch.float64)
        for i, one in enumerate(axes[0]):
            for j, other in enumerate(axes[1]):
                for task, place, elsewhere in ((0, i, other), (1, j, one)):
                    if elsewhere != 0.0:
                        found = run.at((one, other), task)
                        by_task[task, i, j] = distance(singles[task][place], found)
    return DisentanglementMap(*axes, by_task, run.n_forward, run.n_merges)


class _Run:
    """Predictions at points; consecutive ones of the same point share a merge."""

    def __init__(self, live: Coefficients, predict: Callable[[int], Any]) -> None:
        self._live, self._predict = live, predict
        self._here: tuple[float, float] | None = None
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.n_forward = self.n_merges = 0

    def at(self, point: tuple[float, float], task: int) -> Tensor:
        if point != self._here:
            self._live.set(list(point))
            self._here, self.n_merges = point, self.n_merges + 1
        found = torch.as_tensor(self._predict(task)).detach()
        self.n_forward += 1
        expected = self._shapes.setdefault(task, tuple(found.shape))
        if tuple(found.shape) != expected or found.dim() not in (1, 2) or not len(found):
            raise EvaluationError(
                f"predict({task}) returned {list(found.shape)} at {list(point)}, and {list(expected)} first; "
                "expected classes [N] or scores [N, C] of the same samples in every call."
            )
        if found.dim() == 1 and not _are_classes(found):
            raise EvaluationError(
                f"predict({task}) returned [N] of {found.dtype}; expected classes, which are integers, or "
                "scores [N, C]."
            )
        return found.clone()  # what the caller's function may overwrite in the next call


def _alone(task: int, value: float) -> tuple[float, float]:
    return (value, 0.0) if task == 0 else (0.0, value)


def _are_classes(found: Tensor) -> bool:
    return found.dim() == 1 and not found.is_floating_point()
