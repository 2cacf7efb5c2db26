"""What is timed on whole checkpoints: one recipe per method, and what is asked of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEER, LIMIT, TIES = "mergekit", "cat + cp", "ties"


@dataclass(frozen=True, slots=True)
class Goal:
    """`at_least` times as fast as mergekit, or `at_most` times the seconds of cat + cp or of our own TIES."""

    against: str
    ratio: float
    otherwise_limit: float | None = None  # also met at most this many times cat + cp


_SLOW = Goal(PEER, 10, otherwise_limit=2)
_TWICE = Goal(LIMIT, 2)
_OTHERS = (Goal(PEER, 8),)


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method: parameters of every model, of the recipe, the models it takes, and goals.

    `instruct`: the member that is the instruct model, where the method compares with one; mergekit has no
    such method.
    """

    method: str
    per_model: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("ft1", "ft2", "ft3")
    base: bool = True
    goals: tuple[Goal, ...] = (_SLOW,)
    instruct: str | None = None

    def recipe(self, family: Path, dtype: str) -> str:
        """The recipe as both programs get it, with absolute paths; JSON is YAML."""
        models = []
        for model in self.models:
            entry: dict[str, Any] = {"model": str(family / model)}
            if self.per_model:
                entry["parameters"] = dict(self.per_model)
            models.append(entry)
        recipe: dict[str, Any] = {"merge_method": self.method, "models": models, "dtype": dtype}
        if self.base:
            recipe["base_model"] = str(family / "base")
        if self.parameters:
            recipe["parameters"] = dict(self.parameters)
        if self.instruct:
            recipe["tvfast"] = {"instruct": str(family / self.instruct)}
        return json.dumps(recipe, indent=1) + "\n"

    def inputs(self) -> tuple[str, ...]:
        """Members that are read."""
        others = (self.instruct,) if self.instruct else ()
        return tuple(dict.fromkeys((("base",) if self.base else ()) + self.models + others))


_TRIM = {"weight": 1.0, "density": 0.2}
_RANDOM = {"weight": 0.4, "density": 0.5}
_BAND = {"weight": 0.4, "density": 0.9, "gamma": 0.01}
_RANKS = {**_RANDOM, "epsilon": 0.1}

ROWS = (
    MethodRow("task_arithmetic", {"weight": 0.4}, goals=(_SLOW, _TWICE)),
    MethodRow("ties", _TRIM, goals=(Goal(PEER, 40), _TWICE)),
    MethodRow("linear", {"weight": 1.0}, base=False),
    MethodRow("slerp", parameters={"t": 0.5}, models=("ft1",)),
    MethodRow("passthrough", models=("ft1",), base=False),
    MethodRow("dare_linear", _RANDOM),
    MethodRow("dare_ties", _RANDOM),
    MethodRow("della", _RANKS, goals=(Goal(PEER, 20),)),
    MethodRow("della_linear", _RANKS),
    MethodRow("breadcrumbs", _BAND),
    MethodRow("breadcrumbs_ties", _BAND),
    MethodRow("sce", parameters={"select_topk": 0.5}),
    MethodRow("nuslerp", {"weight": 0.5}, models=("ft1", "ft2"), goals=_OTHERS),
    MethodRow("multislerp", {"weight": 0.5}, goals=_OTHERS),
    MethodRow("karcher", base=False, goals=_OTHERS),
    MethodRow("model_stock", goals=_OTHERS),
    MethodRow("nearswap", parameters={"t": 1e-4}, models=("ft1",)),
    MethodRow("arcee_fusion", models=("ft1",), goals=_OTHERS),
    MethodRow("ram", goals=_OTHERS),
    MethodRow("ramplus_tl"),
    MethodRow("lata", {"weight": 0.4}, instruct="ft4", goals=(Goal(TIES, 1.5),)),
)
