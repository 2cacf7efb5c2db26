"""Experiment "atm": alternating tuning and merging against one-shot merging with as many training steps.

Tasks, network and training are those of the suite "digits". Each task has 120 steps in all; ATM divides them
over its rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import tvfast
from bench.quality.digits import Digits
from bench.quality.merges import State, load, scaled, trainable
from bench.quality.report import Figure, Spread, over
from bench.quality.suites import Batch, Task, Training, joined
from bench.quality.training import accuracy, train
from tvfast.loops import alternate

ABOUT = "scikit-learn digits, 64-256-256-10 network, four scanners, 120 steps for each task"
ROUNDS = (1, 2, 4, 8, 12, 24, 40)
WITH_TIES = (1, 4, 12)
POST_HOC = (1, 4)
_POST_HOC_STEPS = 20  # of each task on its validation data, over all rounds
_TIES: Mapping[str, Any] = {"merge": "ties", "density": 0.2}

Seed = dict[str, Any]
Say = Callable[[str], None]


def run(seed: int, say: Say = lambda line: None, *, steps: int = 120) -> Seed:
    """Test accuracies of one seed, means over the tasks, in percent."""
    suite = Digits(seed, steps=steps)
    say(f"seed {seed}: one shot")
    experts = _experts(suite)
    base = trainable(suite.base())
    shots = {
        "average": ("task_arithmetic", {"normalize": True}),
        "task arithmetic": ("task_arithmetic", {}),
        "TIES": ("ties", {"density": 0.2}),
    }
    one_shot = {
        name: _curve(suite, base, tvfast.merge(base, experts, method, **given))
        for name, (method, given) in shots.items()
    }
    say(f"seed {seed}: rounds")
    result: Seed = {
        "seed": seed,
        "scales": list(suite.scales),
        "base": _tested(suite, suite.base()),
        "experts": statistics.fmean(
            accuracy(suite, load(suite.base(), expert), task.test)
            for expert, task in zip(experts, suite.tasks, strict=True)
        ),
        "one_shot": one_shot,
        "joint": _tested(suite, _joint(suite)),
        "atm": {
            str(rounds): _tested(suite, _alternated(suite, rounds)) for rounds in ROUNDS if rounds <= steps
        },
        "atm_ties": {
            str(rounds): _tested(suite, _alternated(suite, rounds, **_TIES)) for rounds in WITH_TIES
        },
    }
    say(f"seed {seed}: post hoc")
    result["post_hoc"] = {
        name: {
            str(rounds): _tested(
                suite, _post_hoc(suite, tvfast.merge(base, experts, method, **given), rounds)
            )
            for rounds in POST_HOC
        }
        for name, (method, given) in shots.items()
        if name != "task arithmetic"
    }
    return result


def _tuner(suite: Digits, steps: int, part: str = "train") -> Callable[[nn.Module, Task], None]:
    """Tunes on one part of a task's data; batches are drawn by the turn's seed."""
    training = replace(suite.training, steps=steps)

    def tune(model: nn.Module, task: Task) -> None:
        drawn = int(torch.randint(2**31, ()))
        train(suite, model, getattr(task, part), training, drawn)

    return tune


def _tasks(suite: Digits) -> dict[str, Task]:
    return {task.name: task for task in suite.tasks}


def _alternated(suite: Digits, rounds: int, **merge: Any) -> nn.Module:
    model = suite.base()
    steps = suite.training.steps // rounds
    alternate(model, _tasks(suite), _tuner(suite, steps), rounds=rounds, seed=suite.seed, **merge)
    return model


def _experts(suite: Digits) -> list[State]:
    """What the tasks make of the base in one turn, as in a loop of one round."""
    found: list[State] = []
    tune = _tuner(suite, suite.training.steps)

    def noting(model: nn.Module, task: Task) -> None:
        tune(model, task)
        found.append(trainable(model))

    alternate(suite.base(), _tasks(suite), noting, rounds=1, seed=suite.seed)
    return found


def _joint(suite: Digits) -> nn.Module:
    """One model trained on the data of all tasks, with as many steps as all tasks have together."""
    model = suite.base()
    data = joined([task.train for task in suite.tasks])
    training: Training = replace(suite.training, steps=len(suite.tasks) * suite.training.steps)
    train(suite, model, data, training, suite.seed)
    return model


def _post_hoc(suite: Digits, merged: State, rounds: int) -> nn.Module:
    model = suite.base()
    tune = _tuner(suite, _POST_HOC_STEPS // rounds, "validation")
    alternate(model, _tasks(suite), tune, rounds=rounds, start=merged, seed=suite.seed)
    return model


def _curve(suite: Digits, base: State, merged: State) -> dict[str, list[float]]:
    """Accuracy over λ, on validation and on test data."""
    curves: dict[str, list[float]] = {"validation": [], "test": []}
    for scale in suite.scales:
        model = load(suite.base(), scaled(base, merged, scale))
        curves["validation"].append(_mean(suite, model, [task.validation for task in suite.tasks]))
        curves["test"].append(_tested(suite, model))
    return curves


def _tested(suite: Digits, model: nn.Module) -> float:
    return _mean(suite, model, [task.test for task in suite.tasks])


def _mean(suite: Digits, model: nn.Module, parts: Sequence[Batch]) -> float:
    return statistics.fmean(accuracy(suite, model.eval(), part) for part in parts)


# -- as text ------------------------------------------------------------------------------------------------


def text(about: str, seeds: Sequence[Seed]) -> str:
    """The tables."""
    head = (
        f"{about}; {len(seeds)} seeds, mean ± standard deviation of test accuracy in percent, mean over "
        f"tasks. Base {over(seeds, lambda s: s['base'])}, experts on their own task "
        f"{over(seeds, lambda s: s['experts'])}, one model trained on all data "
        f"{over(seeds, lambda s: s['joint'])}."
    )
    lines = ["| merge | accuracy | above the average of one shot |", "| --- | --- | --- |"]
    for name in seeds[0]["one_shot"]:
        lines.append(_line(seeds, f"one shot, {name}, λ = 1", _at_one(name)))
        if name != "average":
            lines.append(_line(seeds, f"one shot, {name}, best λ", _best(name)))
    for key, label in (("atm", "ATM, average"), ("atm_ties", "ATM, TIES")):
        for rounds in seeds[0][key]:
            many = f"{rounds} round{'s' * (rounds != '1')}"
            lines.append(_line(seeds, f"{label}, {many}", lambda s, key=key, r=rounds: s[key][r]))
    for name in seeds[0]["post_hoc"]:
        for rounds in POST_HOC:
            label = f"one shot, {name}, then ATM on validation data, {rounds} round{'s' * (rounds != 1)}"
            lines.append(_line(seeds, label, lambda s, n=name, r=str(rounds): s["post_hoc"][n][r]))
    return f"{head}\n\n" + "\n".join(lines) + "\n"


def _at_one(name: str) -> Figure:
    return lambda seed: float(seed["one_shot"][name]["test"][seed["scales"].index(1.0)])


def _best(name: str) -> Figure:
    def figure(seed: Seed) -> float:
        curves = seed["one_shot"][name]
        best = max(range(len(seed["scales"])), key=curves["validation"].__getitem__)
        return float(curves["test"][best])

    return figure


def _line(seeds: Sequence[Seed], label: str, figure: Figure) -> str:
    average = _at_one("average")
    above = Spread(tuple(figure(seed) - average(seed) for seed in seeds))
    return f"| {label} | {over(seeds, figure)} | {above.mean:+.1f} ± {above.deviation:.1f} |"
