"""Base, experts, merges: what the demonstration runs and what it found."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tvfast
from tvfast.demo import digits, files
from tvfast.demo.digits import TASKS, Images
from tvfast.demo.network import accuracy, network, train

SCALES = tuple(round(0.1 * step, 1) for step in range(1, 21))
"""λ is the value of this grid with the best average on the validation images."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One merge of the table. `scaled`: whether λ is chosen on the validation images."""

    method: str
    parameters: dict[str, float] = field(default_factory=dict)
    scaled: bool = True


RECIPES = (
    Recipe("slerp", {"t": 0.5}, scaled=False),
    Recipe("linear", scaled=False),
    Recipe("task_arithmetic"),
    Recipe("ties", {"density": 0.5}),
    Recipe("dare_ties", {"density": 0.5}),
    Recipe("della", {"density": 0.8, "epsilon": 0.1}),
    Recipe("breadcrumbs_ties", {"density": 0.9, "gamma": 0.01}),
    Recipe("sce", {"select_topk": 1.0}, scaled=False),  # mergekit's recipes have no λ for it
)


@dataclass(frozen=True, slots=True)
class Row:
    """A model of the table: test accuracy per task in percent. `kind` is base, expert or merge."""

    name: str
    kind: str
    settings: str
    tasks: tuple[float, ...]

    @property
    def average(self) -> float:
        return sum(self.tasks) / len(self.tasks)


@dataclass(frozen=True, slots=True)
class Results:
    """All rows, the validation average of every scaled merge at every λ, and the time that took.

    λ is searched by `n_searched` merges in memory; the table comes from `n_merges` merges of files.
    """

    seed: int
    rows: tuple[Row, ...]
    scales: tuple[float, ...]
    validation: dict[str, tuple[float, ...]]
    chosen: dict[str, float]
    n_searched: int
    search_seconds: float
    n_merges: int
    merge_seconds: float
    total_seconds: float

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]


class _Merger:
    """Merges base and experts, in memory to search λ and through files for the table; times both."""

    def __init__(self, base: nn.Module, experts: Sequence[nn.Module], seed: int, folder: Path) -> None:
        self.base, self.experts, self.seed, self.folder = base, experts, seed, folder
        self.n_searched, self.search_seconds = 0, 0.0
        self.n_merges, self.merge_seconds = 0, 0.0
        self.base_path = folder / "base"
        self.expert_paths = [folder / f"expert-{number}" for number in range(1, len(experts) + 1)]
        for path, model in zip((self.base_path, *self.expert_paths), (base, *experts), strict=True):
            files.save(model.state_dict(), path)

    def in_memory(self, recipe: Recipe, scale: float) -> nn.Module:
        """By `tvfast.merge_`, into a copy of the base."""
        target = copy.deepcopy(self.base)
        start = time.perf_counter()
        arguments: dict[str, Any] = dict(recipe.parameters)
        tvfast.merge_(target, self.experts, method=recipe.method, scale=scale, seed=self.seed, **arguments)
        self.search_seconds += time.perf_counter() - start
        self.n_searched += 1
        return target

    def through_files(self, recipe: Recipe, scale: float) -> nn.Module:
        """By a recipe and `tvfast.merge_checkpoints`, which is `tvfast merge`; the result is loaded again."""
        base, models = {
            "slerp": (
                self.expert_paths[0],
                self.expert_paths[:2],
            ),  # takes two models, and the first is t = 0
            "linear": (None, self.expert_paths),
        }.get(recipe.method, (self.base_path, self.expert_paths))
        numbers = {**recipe.parameters, **({"lambda": scale} if recipe.scaled else {})}
        text = files.recipe(
            recipe.method, base, models, numbers, weighted=recipe.method not in ("slerp", "sce")
        )
        config, out = self.folder / f"{recipe.method}.yaml", self.folder / recipe.method
        config.write_text(text, encoding="utf-8")
        start = time.perf_counter()
        tvfast.merge_checkpoints(config, out, seed=self.seed, overwrite=True)
        self.merge_seconds += time.perf_counter() - start
        self.n_merges += 1
        merged = copy.deepcopy(self.base)
        merged.load_state_dict(files.load(out))
        return merged


def run(
    seed: int,
    folder: Path,
    *,
    base_steps: int = 150,
    expert_steps: int = 60,
    scales: Sequence[float] = SCALES,
    recipes: Sequence[Recipe] = RECIPES,
) -> Results:
    """Train a base on clean images, fine-tune one expert per task from it, then merge the experts.

    Args:
        seed: of the split, the initial weights, the batches and the random merges.
        folder: made if need be; gets base, experts, one recipe per method and its result. Older ones are
            replaced.
        base_steps, expert_steps: optimiser steps.
        scales: values of λ to choose from.
        recipes: what to merge by.

    Returns:
        Test accuracies of the base, the experts and the merges; the same for the same seed on one machine.
    """
    with _one_torch_thread():
        return _run(seed, folder, base_steps, expert_steps, scales, recipes)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Products this small lose more to waiting threads than they gain, and one thread sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    seed: int,
    folder: Path,
    base_steps: int,
    expert_steps: int,
    scales: Sequence[float],
    recipes: Sequence[Recipe],
) -> Results:
    start = time.perf_counter()
    data = digits.load(seed)
    base = network(seed)
    train(base, data.train, steps=base_steps, learning_rate=2e-3, seed=seed)
    experts = []
    for index, task in enumerate(TASKS):
        expert = copy.deepcopy(base)
        train(expert, data.train.of(task), steps=expert_steps, learning_rate=5e-4, seed=seed + index + 1)
        experts.append(expert)

    rows = [_row("base", "base", "trained on clean images", base, data.test)]
    for task, expert in zip(TASKS, experts, strict=True):
        rows.append(_row(f"expert: {task}", "expert", "the base, fine-tuned on one task", expert, data.test))
    merger = _Merger(base, experts, seed, folder)
    validation, chosen = {}, {}
    for recipe in recipes:
        scale = 1.0
        if recipe.scaled:
            averages = tuple(_average(merger.in_memory(recipe, scale), data.validation) for scale in scales)
            scale = scales[max(range(len(scales)), key=averages.__getitem__)]
            validation[recipe.method], chosen[recipe.method] = averages, scale
        merged = merger.through_files(recipe, scale)
        rows.append(_row(recipe.method, "merge", _settings(recipe, scale), merged, data.test))
    return Results(
        seed=seed,
        rows=tuple(rows),
        scales=tuple(scales),
        validation=validation,
        chosen=chosen,
        n_searched=merger.n_searched,
        search_seconds=merger.search_seconds,
        n_merges=merger.n_merges,
        merge_seconds=merger.merge_seconds,
        total_seconds=time.perf_counter() - start,
    )


def _per_task(model: nn.Module, images: Images) -> tuple[float, ...]:
    return tuple(accuracy(model, images.of(task)) for task in TASKS)


def _average(model: nn.Module, images: Images) -> float:
    tasks = _per_task(model, images)
    return sum(tasks) / len(tasks)


def _row(name: str, kind: str, settings: str, model: nn.Module, test: Images) -> Row:
    return Row(name, kind, settings, _per_task(model, test))


def _settings(recipe: Recipe, scale: float) -> str:
    parts = [f"{name} {value:g}" for name, value in recipe.parameters.items()]
    if recipe.method == "slerp":
        parts.append("first two experts")
    if recipe.scaled:
        parts.append(f"λ {scale:g}")
    return ", ".join(parts) or "mean of the experts"
