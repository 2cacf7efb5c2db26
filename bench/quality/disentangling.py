"""Weight disentanglement of a pretrained network against one that starts from random weights."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tvfast
from bench.quality.digits import Digits, _network
from bench.quality.spread import Seed, spread, table, won
from bench.quality.suites import Training
from bench.quality.training import accuracy, train
from tvfast import analysis

ABOUT = "scikit-learn digits, 64-256-256-10 network, two scanners (white line at the top, at the left)"
TASKS = (0, 2)
STARTS = {"pretrained": 120, "random": 420}
"""Steps of fine-tuning: the random start gets those of pretraining, too."""
RATE = 1e-3
NEAR_ONE = 0.9


def run(seed: int) -> dict[str, Any]:
    """Maps of 21 x 21 on test images, and accuracies in percent."""
    suite = Digits(seed)
    found: dict[str, Any] = {"seed": seed, "starts": {}}
    tasks = [suite.tasks[number] for number in TASKS]
    for start, steps in STARTS.items():
        base: nn.Module = suite.base() if start == "pretrained" else _network(seed)
        experts = []
        for number, task in enumerate(tasks):
            expert = copy.deepcopy(base)
            train(suite, expert, task.train, Training(steps, RATE, 64, 0.0), seed + number + 1)
            experts.append(expert)
        model = copy.deepcopy(base)
        with tvfast.LiveMerge(model, models=experts) as live:
            one = analysis.disentanglement(live, lambda task, model=model: model(tasks[task].test["pixels"]))
            live.set([1.0, 1.0])
            merged = [accuracy(suite, model, task.test) for task in tasks]
        found["starts"][start] = {
            "experts": [accuracy(suite, e, t.test) for e, t in zip(experts, tasks, strict=True)],
            "merged": merged,
            "map": {**one.as_json(), "by_task": one.by_task.round(decimals=6).tolist()},
        }
    return found


def tables(seeds: Sequence[Seed]) -> str:
    """Error inside [0, 1]², over the whole map and at (1, 1)."""
    figures = {
        "experts, %": lambda start: lambda seed: statistics.fmean(seed["starts"][start]["experts"]),
        "α = (1, 1), %": lambda start: lambda seed: statistics.fmean(seed["starts"][start]["merged"]),
        "ξ(1, 1)": lambda start: (
            lambda seed: _mean(seed, start, lambda a, b: abs(a - 0.9) + abs(b - 0.9) < 1e-6)
        ),
        "ξ(0.9, 0.9)": lambda start: lambda seed: _mean(seed, start, _is_near_one),
        "mean ξ, [0, 1]²": lambda start: lambda seed: _inside(seed, start),
        "mean ξ, [-3, 3]²": lambda start: lambda seed: _mean(seed, start, lambda a, b: True),
    }
    rows = [
        [start, *(spread(seeds, make(start), 1 if "%" in name else 2) for name, make in figures.items())]
        for start in STARTS
    ]
    claim = won(seeds, lambda seed: _inside(seed, "random"), lambda seed: _inside(seed, "pretrained"))
    whole = won(
        seeds,
        lambda seed: _mean(seed, "random", lambda a, b: True),
        lambda seed: _mean(seed, "pretrained", lambda a, b: True),
    )
    claims = [["disentanglement comes from pretraining: ξ in [0, 1]² is larger from random weights", claim],
              ["the same in [-3, 3]²", whole]]  # fmt: skip
    head = (
        f"{ABOUT}; {len(seeds)} seeds, mean ± standard deviation. ξ is from 0 to 2, on 600 test images of "
        f"each task; {STARTS['pretrained']} steps of fine-tuning from the pretrained network, "
        f"{STARTS['random']} from random weights, as many as both trainings of the other together."
    )
    return "\n\n".join([head, table(["start", *figures], rows), table(["claim", "held in"], claims)]) + "\n"


def draw(seeds: Sequence[Seed], path: Path) -> None:
    """The means over seeds side by side."""
    maps = {}
    for start in STARTS:
        found = [seed["starts"][start]["map"] for seed in seeds]
        mean = torch.stack([torch.tensor(one["by_task"], dtype=torch.float64) for one in found]).mean(0)
        first, second = (tuple(found[0][axis]) for axis in ("first", "second"))
        maps[f"{start}, mean of {len(seeds)} seeds"] = analysis.DisentanglementMap(
            first, second, mean, found[0]["n_forward"], found[0]["n_merges"]
        )
    analysis.draw_disentanglement(maps, path, names=("line at the top", "line at the left"))


def _inside(seed: Seed, start: str) -> float:
    return _mean(seed, start, lambda a, b: -1e-9 <= a <= 1 + 1e-9 and -1e-9 <= b <= 1 + 1e-9)


def _is_near_one(first: float, second: float) -> bool:
    """The grid has no 1."""
    return first == second == NEAR_ONE


def _mean(seed: Seed, start: str, chosen: Any) -> float:
    found = seed["starts"][start]["map"]
    first, second = found["by_task"]
    return statistics.fmean(
        first[i][j] + second[i][j]
        for i, a in enumerate(found["first"])
        for j, b in enumerate(found["second"])
        if chosen(a, b)
    )
