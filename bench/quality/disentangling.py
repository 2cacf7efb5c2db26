"""Weight disentanglement of a pretrained network against one that starts from random weights, with heads of
their own.

As in closed vocabularies: a linear head per task is fitted on the features of θ₀ and frozen, then the
backbone is fine-tuned, and the backbones' task vectors are added.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tvfast
from bench.quality.digits import Digits, _network
from bench.quality.spread import Say, Seed, spread, table, won
from bench.quality.suites import Batch, cut
from tvfast import analysis

ABOUT = (
    "scikit-learn digits, 64-256-256 backbone, a head each for 0 to 4 behind a line at the top and 5 to 9 "
    "behind one at the left"
)
TASKS = {"0 to 4, line at the top": (0, 0), "5 to 9, line at the left": (2, 5)}
"""By name: the scanner, and the first of five digits."""
STARTS = {"pretrained": 120, "random": 420}
"""Steps of fine-tuning: the random start gets those of pretraining, too."""
N_CLASSES, NEAR_ONE = 5, 0.9
_RATE, _BATCH = 1e-3, 64


def run(seed: int, say: Say = lambda line: None) -> Seed:
    """Maps of 21 x 21 on test images, and accuracies in percent."""
    suite = Digits(seed)
    tasks = [
        {part: _of(getattr(suite.tasks[scanner], part), first) for part in ("train", "test")}
        for scanner, first in TASKS.values()
    ]
    found: dict[str, Any] = {"seed": seed, "starts": {}}
    for start, steps in STARTS.items():
        say(f"seed {seed}, {start}")
        whole: Any = suite.base() if start == "pretrained" else _network(seed)
        base: nn.Module = whole[:4]
        heads = [
            analysis.aligned_head(
                base, [(task["train"]["pixels"], task["train"]["labels"])], n_classes=N_CLASSES
            )
            for task in tasks
        ]
        experts = [
            _tuned(base, head, task["train"], steps, seed + number + 1)
            for number, (head, task) in enumerate(zip(heads, tasks, strict=True))
        ]

        def accuracy(backbone: nn.Module, task: int, heads: Sequence[nn.Module] = heads) -> float:
            with torch.no_grad():
                right = (
                    heads[task](backbone(tasks[task]["test"]["pixels"])).argmax(1)
                    == tasks[task]["test"]["labels"]
                )
            return 100.0 * float(right.double().mean())

        model = copy.deepcopy(base)
        with tvfast.LiveMerge(model, models=experts) as live:
            one = analysis.disentanglement(
                live, lambda task, model=model, heads=heads: heads[task](model(tasks[task]["test"]["pixels"]))
            )
            live.set([1.0, 1.0])
            merged = [accuracy(model, task) for task in (0, 1)]
        found["starts"][start] = {
            "probe": [accuracy(base, task) for task in (0, 1)],
            "experts": [accuracy(experts[task], task) for task in (0, 1)],
            "merged": merged,
            "map": {**one.as_json(), "by_task": one.by_task.round(decimals=6).tolist()},
        }
    return found


def text(about: str, seeds: Sequence[Seed]) -> str:
    """Accuracies; the error near (1, 1), in [0, 1]², and over the whole map."""

    def percent(key: str, start: str) -> Callable[[Seed], float]:
        return lambda seed: statistics.fmean(seed["starts"][start][key])

    def error(start: str, chosen: Callable[[float, float], bool]) -> Callable[[Seed], float]:
        return lambda seed: _mean(seed["starts"][start]["map"], chosen)

    places: dict[str, Callable[[float, float], bool]] = {
        "ξ(0.9, 0.9)": lambda a, b: a == b == NEAR_ONE,
        "mean ξ, [0, 1]²": lambda a, b: 0.0 <= a <= 1.0 and 0.0 <= b <= 1.0,
        "mean ξ, [-3, 3]²": lambda a, b: True,
    }
    rows = [
        [
            start,
            *(spread(seeds, percent(key, start)) for key in ("probe", "experts", "merged")),
            *(spread(seeds, error(start, chosen), 2) for chosen in places.values()),
        ]
        for start in STARTS
    ]
    claims = [
        [
            f"{place} is larger from random weights",
            won(seeds, error("random", chosen), error("pretrained", chosen)),
        ]
        for place, chosen in places.items()
    ]
    claims.append(
        ["the sum, α = (1, 1), is above the linear probe (pretrained)",
         won(seeds, percent("merged", "pretrained"), percent("probe", "pretrained"))]
    )  # fmt: skip
    head = (
        f"{about}; {len(seeds)} seeds, mean ± standard deviation; accuracy in percent, mean of both tasks, "
        f"on test images. ξ is from 0 to 2. {STARTS['pretrained']} steps of fine-tuning from the pretrained "
        f"network, {STARTS['random']} from random weights, as many as both trainings of the other together."
    )
    heads = ["start", "probe on θ₀", "experts", "α = (1, 1)", *places]
    return "\n\n".join([head, table(heads, rows), table(["claim", "held in"], claims)]) + "\n"


def draw(about: str, seeds: Sequence[Seed], path: Path) -> None:
    """The means over seeds side by side."""
    maps = {}
    for start in STARTS:
        found = [seed["starts"][start]["map"] for seed in seeds]
        mean = torch.stack([torch.tensor(one["by_task"], dtype=torch.float64) for one in found]).mean(0)
        first, second = (tuple(found[0][axis]) for axis in ("first", "second"))
        maps[f"{start}, mean of {len(seeds)} seeds"] = analysis.DisentanglementMap(
            first, second, mean, found[0]["n_forward"], found[0]["n_merges"]
        )
    one, two = TASKS
    analysis.draw_disentanglement(maps, path, names=(one, two))


def _of(batch: Batch, first: int) -> Batch:
    """Five of the digits, numbered from 0."""
    found = cut(batch, (batch["labels"] >= first) & (batch["labels"] < first + N_CLASSES))
    return {**found, "labels": found["labels"] - first}


def _tuned(base: nn.Module, head: nn.Module, data: Batch, steps: int, seed: int) -> nn.Module:
    """The backbone, by Adam with a cosine to 0 on cross-entropy behind the frozen head."""
    backbone = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = cut(data, torch.randint(len(data["labels"]), (_BATCH,), generator=generator))
        logits: Tensor = head(backbone(batch["pixels"]))
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(logits, batch["labels"]))
        optimizer.step()
        schedule.step()
    return backbone


def _mean(found: dict[str, Any], chosen: Callable[[float, float], bool]) -> float:
    first, second = found["by_task"]
    return statistics.fmean(
        first[i][j] + second[i][j]
        for i, a in enumerate(found["first"])
        for j, b in enumerate(found["second"])
        if chosen(a, b)
    )
