"""The rows of the table: how experts become one model, and what is collected of them for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tvfast
from bench.quality.suites import Batch, Suite, batches
from tvfast import curvature, importance
from tvfast.curvature import Gaussian, SampledLabels, Statistics

State = dict[str, Tensor]

_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Merge:
    """One way to merge. `stats`: which statistics it takes, by the names of `collect`."""

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    stats: str = ""


AVERAGE, ARITHMETIC = "average", "task arithmetic"

MERGES = (
    Merge(AVERAGE, "linear"),
    Merge(ARITHMETIC, "task_arithmetic"),
    Merge("TIES", "ties", {"density": 0.2}),
    Merge("DARE", "dare_linear", {"density": 0.5}),
    Merge("DARE, TIES", "dare_ties", {"density": 0.5}),
    Merge("DELLA", "della", {"density": 0.5, "epsilon": 0.1}),
    Merge("Breadcrumbs", "breadcrumbs", {"density": 0.9, "gamma": 0.01}),
    Merge("SCE", "sce", {"select_topk": 0.5}),
    Merge("STA, abs(g θ)", "sta", {"density": 0.2}, "weight"),
    Merge("STA, abs(g τ)", "sta", {"density": 0.2, "importance": "delta"}, "delta"),
    Merge("STA, cross: winner", "sta", {"density": 0.5, "importance": "delta", "cross": "winner"}, "delta"),
    Merge("Fisher, exact", "fisher", {"dialect": "matena_raffel"}, "fisher exact"),
    Merge("Fisher, empirical", "fisher", {"dialect": "mats"}, "fisher"),
    Merge("RegMean", "regmean", {}, "kfac"),
    Merge("MaTS", "mats", {}, "kfac"),
    Merge("MaTS, solved to the end", "mats", {"preconditioned": True}, "kfac"),
    Merge("MaTS, ridge", "kfac", {}, "kfac"),
)

NEGATIONS = (
    Merge(ARITHMETIC, "task_arithmetic"),
    Merge("TIES", "ties", {"density": 0.2}),
    Merge("DARE", "dare_linear", {"density": 0.5}),
    Merge("Breadcrumbs", "breadcrumbs", {"density": 0.9, "gamma": 0.01}),
    Merge("STA, abs(g θ)", "sta_forget", {"density": 0.2}, "weight"),
    Merge("STA, abs(g τ)", "sta_forget", {"density": 0.2, "importance": "delta"}, "delta"),
)


def collect(
    suite: Suite, wanted: Collection[str], model: nn.Module, base: nn.Module, data: Batch, seed: int
) -> dict[str, Any]:
    """Statistics of one expert on data of its own task, by the names in `Merge.stats`."""
    some = list(batches(data, _AT_ONCE, suite.n_collected))

    def losses(one: nn.Module, batch: Batch) -> Tensor:
        logits = suite.outputs(one, batch)
        found: Tensor = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return found

    def scores(loss: Callable[[nn.Module, Batch], Tensor] = losses, **options: Any) -> Any:
        names = list(trainable(model))
        return importance.collect(model, loss, some, parameters=names, **options)

    ways: dict[str, Callable[[], Any]] = {
        "weight": scores,
        "delta": lambda: scores(kind="delta", base=base),
        "fisher": lambda: scores(kind="fisher"),
        "fisher exact": lambda: scores(suite.outputs, kind="fisher", fisher="matena_raffel"),
        "kfac": lambda: curvature.collect(
            model, SampledLabels(suite.outputs, seed=seed), some, convention="mats", layers=suite.layers
        ),
    }
    return {name: make() for name, make in ways.items() if name in wanted}


def curvature_of(suite: Suite, base: nn.Module, data: Batch, seed: int) -> Statistics:
    """What TAK's penalty takes of one task: factors at the base, of the outputs."""
    some = batches(data, _AT_ONCE, suite.n_collected)
    return curvature.collect(
        base, Gaussian(suite.outputs, seed=seed), some, convention="tak", layers=suite.layers
    )


def merged(merge: Merge, base: State, models: Sequence[State], stats: Sequence[Mapping[str, Any]]) -> State:
    """The merge with λ = 1; where the method has no λ beside the base, its whole result."""
    given = [one[merge.stats] for one in stats] if merge.stats else None
    report: list[str] = []
    return tvfast.merge(base, models, merge.method, stats=given, report=report, seed=0, **merge.parameters)


def scaled(base: State, one: State, scale: float) -> State:
    """θ₀ + λ (θ - θ₀)."""
    return tvfast.merge(base, [one], "task_arithmetic", scale=scale)


def trainable(model: nn.Module) -> State:
    """What is merged: the parameters that are trained."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load(model: nn.Module, state: State) -> nn.Module:
    """Put merged parameters into a model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])
    return model
