"""One seed: experts by every way of fine-tuning, their merges at every λ, and their negations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bench.quality.merges import (
    ARITHMETIC,
    MERGES,
    NEGATIONS,
    Merge,
    State,
    collect,
    curvature_of,
    load,
    merged,
    scaled,
    trainable,
)
from bench.quality.suites import Batch, Suite, Task, joined
from bench.quality.training import Tangent, accuracy, train
from tvfast.curvature import KroneckerPenalty, Statistics

PLAIN, PENALTY = "plain", "penalty"
TANGENT, TANGENT_PENALTY = "tangent", "tangent, penalty"
KEPT = 0.95
"""Share of the base's accuracy on the control that a negation must keep, as in Ilharco et al. 2022."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Experts:
    """Fine-tunes of one base, one per task.

    Attributes:
        base: θ₀ of what was trained: zeros for task vectors in the tangent space.
        realise: a model with given parameters.
    """

    models: Sequence[nn.Module]
    base: State
    realise: Callable[[State], nn.Module]

    @property
    def states(self) -> list[State]:
        return [trainable(model) for model in self.models]


@dataclass(frozen=True, slots=True)
class Curvatures:
    """Of the base on each task, and on what must be kept when a task is forgotten."""

    tasks: Sequence[Statistics]
    kept: Sequence[Statistics]


def run(suite: Suite, seed: int, say: Say = lambda line: None) -> dict[str, Any]:
    """Everything that the table and the picture need, as plain data; accuracies in percent.

    Returns:
        `base`: accuracies on the tasks. `regimes`: by way of fine-tuning `experts`, the accuracy of each on
        its own task; `merges`, by row `validation` and `test`, means over tasks at each λ; `negations`, by
        row `target` and `control`, means over tasks on test data, and `base_control`.
    """
    base = suite.base()
    found = Curvatures(
        [curvature_of(suite, base, task.train, seed) for task in suite.tasks],
        [curvature_of(suite, base, joined(suite.kept(k)), seed) for k in range(len(suite.tasks))],
    )
    regimes = [PLAIN, PENALTY, *([TANGENT, TANGENT_PENALTY] if suite.has_tangent else [])]
    return {
        "seed": seed,
        "scales": list(suite.scales),
        "tasks": [task.name for task in suite.tasks],
        "base": [accuracy(suite, base, task.test) for task in suite.tasks],
        "regimes": {regime: _regime(suite, regime, base, found, seed, say) for regime in regimes},
    }


def _regime(
    suite: Suite, regime: str, base: nn.Module, found: Curvatures, seed: int, say: Say
) -> dict[str, Any]:
    """Merges and negations of experts that were fine-tuned one way."""
    tangent, penalised = regime.startswith(TANGENT), regime.endswith(PENALTY)
    merges = [row for row in MERGES if not tangent or row.name == ARITHMETIC]
    negations = [row for row in NEGATIONS if not tangent or row.name == ARITHMETIC]

    say(f"seed {seed}, {regime}: experts")
    others = [_without(found.tasks, k) for k in range(len(suite.tasks))] if penalised else None
    experts = fine_tuned(suite, base, seed, others, tangent)
    stats = _collected(suite, merges, experts, base, seed)
    say(f"seed {seed}, {regime}: merges")
    result: dict[str, Any] = {
        "experts": [
            accuracy(suite, model, task.test) for model, task in zip(experts.models, suite.tasks, strict=True)
        ],
        "merges": {row.name: _merge_row(suite, row, experts, stats) for row in merges},
    }
    if penalised:  # a vector that is to be taken away must spare the control, not the other tasks
        say(f"seed {seed}, {regime}: experts that spare the control")
        experts = fine_tuned(suite, base, seed, [[one] for one in found.kept], tangent)
        stats = _collected(suite, negations, experts, base, seed)
    say(f"seed {seed}, {regime}: negations")
    result["negations"] = {row.name: _negation_row(suite, row, base, experts, stats) for row in negations}
    return result


def _without(tasks: Sequence[Statistics], k: int) -> list[Statistics]:
    return [one for number, one in enumerate(tasks) if number != k]


def fine_tuned(
    suite: Suite, base: nn.Module, seed: int, spared: Sequence[Sequence[Statistics]] | None, tangent: bool
) -> Experts:
    """One expert per task.

    Args:
        spared: for each task the curvatures that its expert is penalised by; None: no penalty.
        tangent: whether the linearised network is trained.
    """
    models: list[nn.Module] = []
    for k, task in enumerate(suite.tasks):
        model: nn.Module = Tangent(suite.base()) if tangent else copy.deepcopy(base)
        penalty = None
        if spared is not None:
            penalty = KroneckerPenalty(
                spared[k],
                None if tangent else base,
                scale=suite.training.penalty,
                accumulate="weighted",
            )
        train(suite, model, task.train, suite.training, seed + k + 1, penalty)
        models.append(model)

    def realise(state: State) -> nn.Module:
        return load(Tangent(suite.base()) if tangent else copy.deepcopy(base), state)

    start: nn.Module = Tangent(suite.base()) if tangent else base
    return Experts(models, trainable(start), realise)


def _collected(
    suite: Suite, rows: Sequence[Merge], experts: Experts, base: nn.Module, seed: int
) -> list[dict[str, Any]]:
    """Statistics of every expert on its own task, those that some row takes."""
    wanted = {row.stats for row in rows if row.stats}
    return [
        collect(suite, wanted, model, base, task.train, seed)
        for model, task in zip(experts.models, suite.tasks, strict=True)
    ]


def _merge_row(suite: Suite, row: Merge, experts: Experts, stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over tasks at every λ, on validation and on test data."""
    one = merged(row, experts.base, experts.states, stats)
    curves: dict[str, list[float]] = {"validation": [], "test": []}
    for scale in suite.scales:
        model = experts.realise(scaled(experts.base, one, scale))
        curves["validation"].append(_mean(suite, model, [task.validation for task in suite.tasks]))
        curves["test"].append(_mean(suite, model, [task.test for task in suite.tasks]))
    return curves


def _negation_row(
    suite: Suite, row: Merge, base: nn.Module, experts: Experts, stats: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Each task in turn is taken away, at the λ that hurts it most and keeps `KEPT` of the control."""
    targets, controls, kept, chosen = [], [], [], []
    for k, task in enumerate(suite.tasks):
        control = suite.control(k)
        own = [stats[k]] if row.stats else []
        vector = merged(row, experts.base, [experts.states[k]], own)
        sign = 1.0 if row.method == "sta_forget" else -1.0
        at_least = KEPT * _mean(suite, base, control.validation)
        scale = _most_forgetting(suite, task, control.validation, at_least, experts, vector, sign)
        model = experts.realise(scaled(experts.base, vector, sign * scale))
        targets.append(accuracy(suite, model, task.test))
        controls.append(_mean(suite, model, control.test))
        kept.append(_mean(suite, base, control.test))
        chosen.append(scale)
    n = len(targets)
    return {
        "target": sum(targets) / n,
        "control": sum(controls) / n,
        "base_control": sum(kept) / n,
        "scales": chosen,
    }


def _most_forgetting(
    suite: Suite,
    task: Task,
    control: Sequence[Batch],
    at_least: float,
    experts: Experts,
    vector: State,
    sign: float,
) -> float:
    """λ of the lowest validation accuracy on the task, among those that keep the control; 0: none does."""
    best, lowest = 0.0, accuracy(suite, experts.realise(experts.base), task.validation)
    for scale in suite.scales:
        model = experts.realise(scaled(experts.base, vector, sign * scale))
        if _mean(suite, model, control) < at_least:
            continue
        target = accuracy(suite, model, task.validation)
        if target < lowest:
            best, lowest = scale, target
    return best


def _mean(suite: Suite, model: nn.Module, parts: Sequence[Batch]) -> float:
    return sum(accuracy(suite, model, part) for part in parts) / len(parts)
