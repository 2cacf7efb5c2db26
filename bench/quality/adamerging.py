"""AdaMerging on the digits: coefficients from unlabelled images against one λ from labelled ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tvfast
from bench.quality.digits import Digits
from bench.quality.experiment import fine_tuned
from bench.quality.spread import Seed, spread, table, won
from bench.quality.suites import Batch
from bench.quality.training import accuracy
from tvfast import search

ABOUT = "scikit-learn digits, 64-256-256-10 network, four scanners, plain fine-tuning"
STEPS, RATES, BATCH = 1000, (1e-3, 1e-2), 16
SOURCES = ("validation", "test")
"""Whose images the entropy is of; labels are read of neither. The authors take the test images."""


def run(seed: int) -> dict[str, Any]:
    """Accuracies in percent, mean over tasks on test images, of every way to coefficients."""
    suite = Digits(seed)
    base = suite.base()
    experts = fine_tuned(suite, base, seed, None, tangent=False)

    def tested(model: nn.Module, part: str = "test") -> float:
        return sum(accuracy(suite, model, getattr(task, part)) for task in suite.tasks) / len(suite.tasks)

    model = copy.deepcopy(base)
    found: dict[str, Any] = {
        "seed": seed,
        "base": tested(base),
        "experts": sum(
            accuracy(suite, one, task.test) for one, task in zip(experts.models, suite.tasks, strict=True)
        )
        / len(suite.tasks),
        "learned": {},
    }
    with tvfast.LiveMerge(model, models=experts.models) as live:
        live.set(0.3)
        found["at 0.3"] = tested(model)
        curve = {scale: _at(live, scale, model, tested) for scale in suite.scales}
        best = max(curve, key=lambda scale: curve[scale][0])
        found["best"] = {"scale": best, "test": curve[best][1]}
    for trimmed in (False, True):
        options: dict[str, Any] = {"method": "breadcrumbs", "density": 0.2, "gamma": 0.0} if trimmed else {}
        for source in SOURCES:
            for layerwise in (False, True):
                for rate in RATES:
                    model = copy.deepcopy(base)
                    with tvfast.LiveMerge(model, models=experts.models, **options) as live:
                        learned = search.adamerging(
                            live,
                            lambda task, x, model=model: model(x),
                            [_images(getattr(task, source), seed) for task in suite.tasks],
                            layerwise=layerwise,
                            steps=STEPS,
                            learning_rate=rate,
                        )
                        found["learned"][_name(trimmed, source, layerwise, rate)] = {
                            "test": tested(model),
                            "entropy": [learned.losses[0], sum(learned.losses[-50:]) / 50],
                            "coefficients": learned.coefficients.tolist(),
                        }
    return found


def _at(live: tvfast.LiveMerge, scale: float, model: nn.Module, tested: Any) -> tuple[float, float]:
    live.set(scale)
    return tested(model, "validation"), tested(model)


def _name(trimmed: bool, source: str, layerwise: bool, rate: float) -> str:
    kind = "AdaMerging, trimmed" if trimmed else "AdaMerging"
    return f"{kind}, {'per layer' if layerwise else 'per task'}, {source} images, rate {rate:g}"


class _images:
    """Random batches of a part's images without their labels, begun again for every search."""

    def __init__(self, part: Batch, seed: int) -> None:
        self._pixels, self._seed = part["pixels"], seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield self._pixels[torch.randint(len(self._pixels), (BATCH,), generator=generator)]


def tables(seeds: Sequence[Seed]) -> str:
    """Every way to coefficients, and what the claims came to."""
    rows = [
        ["base", "", spread(seeds, lambda seed: seed["base"])],
        ["experts, each on its own task", "", spread(seeds, lambda seed: seed["experts"])],
        ["task arithmetic, λ = 0.3", "nothing", spread(seeds, lambda seed: seed["at 0.3"])],
        ["task arithmetic, best λ", "labelled validation images", spread(seeds, _best)],
    ]
    for name in seeds[0]["learned"]:
        kind, per, source, rate = name.rsplit(", ", 3)
        rows.append([f"{kind}, {per}, {rate}", f"unlabelled {source}", spread(seeds, _learned(name))])
    task, layer = (_name(False, "test", layerwise, RATES[0]) for layerwise in (False, True))
    claims = [
        ["per task, as published, is above λ = 0.3", won(seeds, _learned(task), lambda seed: seed["at 0.3"])],
        ["per layer, as published, is above per task", won(seeds, _learned(layer), _learned(task))],
        ["per layer, as published, is above the best λ", won(seeds, _learned(layer), _best)],
        [
            f"per layer at rate {RATES[1]:g} is above the best λ",
            won(seeds, _learned(_name(False, "test", True, RATES[1])), _best),
        ],
    ]
    head = (
        f"{ABOUT}; {len(seeds)} seeds, mean ± standard deviation of test accuracy in percent. Adam, {STEPS} "
        f"steps of {BATCH} images of each task from 0.3; a learning rate of {RATES[0]:g} is the authors'."
    )
    parts = [head, table(["merge", "chosen on", "accuracy"], rows), table(["claim", "held in"], claims)]
    return "\n\n".join(parts) + "\n"


def draw(seeds: Sequence[Seed], path: Path) -> None:
    """There is no picture of it."""


def _best(seed: Seed) -> float:
    return float(seed["best"]["test"])


def _learned(name: str) -> Any:
    return lambda seed: float(seed["learned"][name]["test"])
