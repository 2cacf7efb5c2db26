"""AdaMerging on the digits: coefficients from unlabelled images against one λ from labelled ones."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tvfast
from bench.quality.digits import Digits
from bench.quality.experiment import PENALTY, PLAIN, fine_tuned
from bench.quality.merges import curvature_of
from bench.quality.spread import Say, Seed, spread, table, won
from bench.quality.suites import Batch
from bench.quality.training import accuracy
from tvfast import search

ABOUT = "scikit-learn digits, 64-256-256-10 network, four scanners"
STEPS, PUBLISHED, FASTER, BATCH, START = 1000, 1e-3, 1e-2, 16, 0.3


@dataclass(frozen=True, slots=True)
class Way:
    """How coefficients are learned.

    Attributes:
        images: whose entropy it is; labels are never read. The authors take the test images.
        trimmed: task vectors that TIES has trimmed to a fifth, as in AdaMerging++.
    """

    layerwise: bool
    images: str = "test"
    trimmed: bool = False
    rate: float = PUBLISHED

    @property
    def name(self) -> str:
        kind = "AdaMerging, trimmed" if self.trimmed else "AdaMerging"
        per = "per layer" if self.layerwise else "per task"
        return f"{kind}, {per}, rate {self.rate:g}, {self.images} images"


WAYS = {
    PLAIN: [
        *(Way(layerwise, images) for images in ("test", "validation") for layerwise in (False, True)),
        *(Way(layerwise, rate=FASTER) for layerwise in (False, True)),
        *(Way(layerwise, trimmed=True) for layerwise in (False, True)),
    ],
    PENALTY: [Way(layerwise, images) for images in ("test", "validation") for layerwise in (False, True)],
}
"""By how the experts were fine-tuned."""


def run(seed: int, say: Say = lambda line: None) -> Seed:
    """Accuracies in percent on test images, means over tasks, of every way to coefficients."""
    suite = Digits(seed)
    base = suite.base()
    curvatures = [curvature_of(suite, base, task.train, seed) for task in suite.tasks]
    spared = [[one for other, one in enumerate(curvatures) if other != k] for k in range(len(curvatures))]
    found: dict[str, Any] = {"seed": seed, "base": _mean(suite, base, "test"), "regimes": {}}
    for regime, ways in WAYS.items():
        penalised = spared if regime == PENALTY else None
        experts = fine_tuned(suite, base, seed, penalised, tangent=False).models
        say(f"seed {seed}, {regime}")
        one: dict[str, Any] = {
            "experts": statistics.fmean(
                accuracy(suite, expert, task.test) for expert, task in zip(experts, suite.tasks, strict=True)
            ),
            **_fixed(suite, base, experts),
            "learned": {way.name: _learned(suite, base, experts, way, seed) for way in ways},
        }
        found["regimes"][regime] = one
    return found


def _fixed(suite: Digits, base: nn.Module, experts: Sequence[nn.Module]) -> dict[str, Any]:
    """Task arithmetic where AdaMerging starts, and at the best λ on labelled validation images."""
    model = copy.deepcopy(base)
    with tvfast.LiveMerge(model, models=experts) as live:
        curve = {}
        for scale in suite.scales:
            live.set(scale)
            curve[scale] = _mean(suite, model, "validation"), _mean(suite, model, "test")
    best = max(curve, key=lambda scale: curve[scale][0])
    return {"start": curve[START][1], "best": {"scale": best, "test": curve[best][1]}}


def _learned(
    suite: Digits, base: nn.Module, experts: Sequence[nn.Module], way: Way, seed: int
) -> dict[str, Any]:
    model = copy.deepcopy(base)
    options: dict[str, Any] = {"method": "breadcrumbs", "density": 0.2, "gamma": 0.0} if way.trimmed else {}
    with tvfast.LiveMerge(model, models=experts, **options) as live:
        learned = search.adamerging(
            live,
            lambda task, x: model(x),
            [Images(getattr(task, way.images), seed) for task in suite.tasks],
            layerwise=way.layerwise,
            steps=STEPS,
            learning_rate=way.rate,
            start=START,
        )
        return {
            "test": _mean(suite, model, "test"),
            "entropy": [statistics.fmean(learned.losses[:50]), statistics.fmean(learned.losses[-50:])],
            "coefficients": learned.coefficients.tolist(),
        }


class Images:
    """Random batches of a part's images without their labels, begun again for every search."""

    def __init__(self, part: Batch, seed: int) -> None:
        self._pixels, self._seed = part["pixels"], seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield self._pixels[torch.randint(len(self._pixels), (BATCH,), generator=generator)]


def text(about: str, seeds: Sequence[Seed]) -> str:
    """Every way to coefficients, and what the claims came to."""
    rows = [["base", "", spread(seeds, lambda seed: seed["base"]), "", ""]]
    for regime, ways in WAYS.items():
        rows += [
            [f"{regime}: experts, each on its own task", "", spread(seeds, _of(regime, "experts")), "", ""],
            [
                f"{regime}: task arithmetic, λ = {START:g}",
                "nothing",
                spread(seeds, _of(regime, "start")),
                "",
                "",
            ],
            [
                f"{regime}: task arithmetic, best λ",
                "labelled validation images",
                spread(seeds, _best(regime)),
                "",
                "",
            ],
        ]
        for way in ways:
            kind, images = way.name.rsplit(", ", 1)
            entropies = (
                spread(
                    seeds,
                    lambda seed, w=way, r=regime, k=k: (
                        seed["regimes"][r]["learned"][w.name]["entropy"][k] / 4
                    ),
                    2,
                )
                for k in (0, 1)
            )
            rows.append(
                [f"{regime}: {kind}", f"unlabelled {images}", spread(seeds, _test(regime, way)), *entropies]
            )
    head = (
        f"{about}; {len(seeds)} seeds, mean ± standard deviation of test accuracy in percent; entropy in "
        f"nats, mean of the first and last 50 steps. Adam, {STEPS} steps of {BATCH} images of each task from "
        f"{START:g}; a learning rate of {PUBLISHED:g} is the authors'. Penalty: experts "
        "fine-tuned with TAK's, as above."
    )
    heads = ["merge", "chosen on", "accuracy", "entropy at first", "in the end"]
    return "\n\n".join([head, table(heads, rows), table(["claim", "held in"], _claims(seeds))]) + "\n"


def _claims(seeds: Sequence[Seed]) -> list[list[str]]:
    task, layer = Way(False), Way(True)
    found = []
    for regime in WAYS:
        found += [
            [
                f"{regime}: per task is above λ = {START:g}",
                won(seeds, _test(regime, task), _of(regime, "start")),
            ],
            [f"{regime}: per layer is above per task", won(seeds, _test(regime, layer), _test(regime, task))],
            [f"{regime}: per layer is above the best λ", won(seeds, _test(regime, layer), _best(regime))],
        ]
    return found


def _mean(suite: Digits, model: nn.Module, part: str) -> float:
    return statistics.fmean(accuracy(suite, model, getattr(task, part)) for task in suite.tasks)


def _of(regime: str, key: str) -> Callable[[Seed], float]:
    return lambda seed: float(seed["regimes"][regime][key])


def _best(regime: str) -> Callable[[Seed], float]:
    return lambda seed: float(seed["regimes"][regime]["best"]["test"])


def _test(regime: str, way: Way) -> Callable[[Seed], float]:
    return lambda seed: float(seed["regimes"][regime]["learned"][way.name]["test"])
