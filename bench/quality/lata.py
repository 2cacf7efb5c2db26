"""Experiment "lata": a base, an instruct model and task fine-tunes of scikit-learn's digits.

The base reads clean digits. Beside the pixels there is an instruction, one number, which is always 0 for the
base; where it is set, the answer is to be the digit plus five, modulo ten. The instruct model is the base
fine-tuned to obey it. Tasks are the four faulty scanners of the suite "digits", fine-tuned from the instruct
model on both instructions, so that task vectors against the base carry what the instruct model learned.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import tvfast
from bench.quality.digits import Digits
from bench.quality.merges import State, load, trainable
from bench.quality.report import Figure, over
from bench.quality.suites import Batch, Training
from bench.quality.training import accuracy, train

ABOUT = "scikit-learn digits with an instruction, 65-256-256-256-256-10 network, four scanners"
SCALES = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, *(round(0.1 * step, 1) for step in range(3, 16)))
"""Fine where sums of four vectors want it, each of which is mostly the instruct model's."""
KEPT = 0.95
"""Share of the instruct model's accuracy on clean digits that forgetting must keep."""
_WIDTHS = (65, 256, 256, 256, 256, 10)
_BASE_STEPS, _INSTRUCT_STEPS, _TASK_STEPS = 600, 1000, 150
_LOUD = 4.0  # the instruction beside 64 pixels between 0 and 1
_SHIFT = 5  # of the digit, where the instruction says so

Seed = dict[str, Any]
Say = Callable[[str], None]
Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to merge: onto the base or the instruct model, task vectors against the one or the other."""

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    against: str = "base"  # what task vectors are differences to
    onto: str = "base"  # what they are added to; of LATA its own `target`


WAYS = (
    Way("task arithmetic on the base", "task_arithmetic"),
    Way("task arithmetic on the instruct model", "task_arithmetic", onto="instruct"),
    Way(
        "task arithmetic, vectors against the instruct model",
        "task_arithmetic",
        against="instruct",
        onto="instruct",
    ),
    Way("TIES on the base", "ties", {"density": 0.2}),
    Way("TIES on the instruct model", "ties", {"density": 0.2}, onto="instruct"),
    Way("LATA, linear", "lata"),
    Way("LATA, logarithmic", "lata", {"drop": "logarithmic"}),
    Way("LATA, threshold 0.95", "lata", {"drop": "threshold"}),
    Way("LATA, linear, by tensor", "lata", {"granularity": "tensor"}),
    Way("LATA, linear, on the base", "lata", {"target": "base"}),
)
FORGETTING = (
    Way("task arithmetic", "task_arithmetic", onto="instruct"),
    Way(
        "task arithmetic, vector against the instruct model",
        "task_arithmetic",
        against="instruct",
        onto="instruct",
    ),
    Way("LATA, threshold 0.95", "lata", {"direction": "forget"}),
    Way("LATA, linear", "lata", {"direction": "forget", "drop": "linear"}),
)


class Instructed(Digits):
    """Clean and scanned digits, each with both instructions."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(torch.cat([batch["pixels"], batch["instruction"]], 1))
        return found

    def clean(self, part: str, instructions: Sequence[int] = (0, 1)) -> Batch:
        return instructed(self._clean[part], instructions)

    def _trained(self) -> dict[str, Tensor]:
        model = network(self.seed)
        start = Training(steps=_BASE_STEPS, learning_rate=2e-3, batch_size=64, penalty=0.0)
        train(self, model, self.clean("train", (0,)), start, self.seed)
        return model.state_dict()

    def base(self) -> nn.Module:
        model = network(self.seed)
        model.load_state_dict(self._base)
        return model


def instructed(batch: Batch, instructions: Sequence[int] = (0, 1)) -> Batch:
    """Every sample with every instruction, and the answer that is right then."""
    n = len(batch["labels"])
    given = torch.tensor(instructions).repeat_interleave(n)
    pixels, labels = batch["pixels"].repeat(len(instructions), 1), batch["labels"].repeat(len(instructions))
    return {
        "pixels": pixels,
        "instruction": _LOUD * given.float().unsqueeze(1),
        "labels": (labels + _SHIFT * given) % 10,
    }


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(_WIDTHS):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@dataclass(frozen=True, slots=True)
class Family:
    """Weights, and the data to judge merges by."""

    suite: Instructed
    base: State
    instruct: State
    tasks: Sequence[State]

    def merged(self, way: Way, models: Sequence[State], scale: float) -> nn.Module:
        """A merge at one λ, negative where something is taken away by a method that has no word for it."""
        origin = {"base": self.base, "instruct": self.instruct}
        own = dict(way.parameters)
        if way.method == "lata":
            state = tvfast.merge(self.base, models, "lata", instruct=self.instruct, scale=scale, **own)
        else:
            found = tvfast.merge(origin[way.against], models, way.method, scale=scale, **own)
            if way.onto == way.against:
                state = found
            else:  # the same vector, on other weights
                state = tvfast.merge(
                    origin[way.onto],
                    [
                        {
                            name: origin[way.onto][name] + t - origin[way.against][name]
                            for name, t in found.items()
                        }
                    ],
                    "task_arithmetic",
                )
        return load(self.suite.base(), state)

    def judged(self, model: nn.Module, part: str, task: int | None = None) -> tuple[float, float]:
        """Accuracy on the tasks, their mean, or on one, and on clean digits: both instructions each."""
        chosen = self.suite.tasks if task is None else [self.suite.tasks[task]]
        scanned = [instructed(getattr(one, part)) for one in chosen]
        return (
            statistics.fmean(accuracy(self.suite, model, batch) for batch in scanned),
            accuracy(self.suite, model, self.suite.clean(part)),
        )


def family(seed: int, *, task_steps: int = _TASK_STEPS) -> Family:
    suite = Instructed(seed)

    def tuned(start: State, data: Batch, steps: int, number: int) -> State:
        model = load(suite.base(), start)
        training = Training(steps=steps, learning_rate=1e-3, batch_size=64, penalty=0.0)
        train(suite, model, data, training, 100 * seed + number)
        return trainable(model)

    base = trainable(suite.base())
    instruct = tuned(base, suite.clean("train"), _INSTRUCT_STEPS, 0)
    tasks = [
        tuned(instruct, instructed(task.train), task_steps, k) for k, task in enumerate(suite.tasks, start=1)
    ]
    return Family(suite, base, instruct, tasks)


def run(seed: int, say: Say = lambda line: None, *, task_steps: int = _TASK_STEPS) -> Seed:
    """Accuracies of one seed, in percent."""
    say(f"seed {seed}: family")
    found = family(seed, task_steps=task_steps)
    own = [
        accuracy(found.suite, load(found.suite.base(), expert), instructed(task.test))
        for expert, task in zip(found.tasks, found.suite.tasks, strict=True)
    ]
    layers = tvfast.compare(found.base, [*found.tasks, found.instruct]).tensors.cosines
    say(f"seed {seed}: merges")
    ways = {way.name: _curve(found, way, None) for way in WAYS}
    single = {way.name: _mean_curve([_curve(found, way, k) for k in range(len(own))]) for way in WAYS}
    say(f"seed {seed}: forgetting")
    return {
        "seed": seed,
        "scales": list(SCALES),
        "base": found.judged(load(found.suite.base(), found.base), "test"),
        "instruct": found.judged(load(found.suite.base(), found.instruct), "test"),
        "experts": statistics.fmean(own),
        "cosines": {
            name: statistics.fmean(row[-1] for row in rows[:-1])
            for name, rows in layers.items()
            if name.endswith("weight")
        },
        "ways": ways,
        "single": single,
        "forgetting": {way.name: _forgetting(found, way) for way in FORGETTING},
    }


def _curve(found: Family, way: Way, task: int | None) -> Curves:
    """(tasks, clean) at every λ, on validation and on test data; of all tasks, or of one alone."""
    curves: Curves = {"validation": [], "test": []}
    models = found.tasks if task is None else [found.tasks[task]]
    for scale in SCALES:
        model = found.merged(way, models, scale)
        for part, curve in curves.items():
            curve.append(found.judged(model, part, task))
    return curves


def _mean_curve(curves: Sequence[Curves]) -> Curves:
    """Of several tasks, each merged alone."""
    return {
        part: [
            (statistics.fmean(p[0] for p in points), statistics.fmean(p[1] for p in points))
            for points in zip(*(one[part] for one in curves), strict=True)
        ]
        for part in curves[0]
    }


def _forgetting(found: Family, way: Way) -> dict[str, float]:
    """Each task in turn is taken away, at the λ that hurts it most and keeps `KEPT` of the clean digits."""
    suite, targets, cleans = found.suite, [], []
    instruct = load(suite.base(), found.instruct)
    at_least = KEPT * accuracy(suite, instruct, suite.clean("validation"))
    for vector, task in zip(found.tasks, suite.tasks, strict=True):
        chosen, lowest = instruct, accuracy(suite, instruct, instructed(task.validation))
        for scale in SCALES:
            model = found.merged(way, [vector], scale if way.method == "lata" else -scale)
            if accuracy(suite, model, suite.clean("validation")) < at_least:
                continue
            target = accuracy(suite, model, instructed(task.validation))
            if target < lowest:
                chosen, lowest = model, target
        targets.append(accuracy(suite, chosen, instructed(task.test)))
        cleans.append(accuracy(suite, chosen, suite.clean("test")))
    return {"target": statistics.fmean(targets), "clean": statistics.fmean(cleans)}


# -- as text ------------------------------------------------------------------------------------------------


def text(about: str, seeds: Sequence[Seed]) -> str:
    """The tables."""
    cosines = ", ".join(
        f"{over(seeds, lambda s, n=name: s['cosines'][n]).mean:.2f}" for name in seeds[0]["cosines"]
    )
    base, instruct = (
        f"tasks {over(seeds, lambda s, w=who: s[w][0])}, clean {over(seeds, lambda s, w=who: s[w][1])}"
        for who in ("base", "instruct")
    )
    head = (
        f"{about}; {len(seeds)} seeds, mean ± standard deviation of test accuracy in percent, both "
        f"instructions. Base: {base}. Instruct model: {instruct}. Experts on their own task "
        f"{over(seeds, lambda s: s['experts'])}. Cosines of task vectors with the instruct model's, by "
        f"layer: {cosines}."
    )
    columns = "| tasks | clean | mean of both |"
    merges = []
    for kind, label in (("ways", "merge of all four tasks"), ("single", "merge of one task")):
        lines = [f"| {label}, best λ {columns}", "| --- | --- | --- | --- |"]
        for name in seeds[0][kind]:
            figures = [_best(kind, name, what) for what in (_tasks, _clean, _both)]
            lines.append(f"| {name} | {' | '.join(str(over(seeds, one)) for one in figures)} |")
        merges.append("\n".join(lines))
    lost = ["| forgetting one task | target ↓ | clean |", "| --- | --- | --- |"]
    for name in seeds[0]["forgetting"]:
        cells = [
            str(over(seeds, lambda s, n=name, w=what: s["forgetting"][n][w])) for what in ("target", "clean")
        ]
        lost.append(f"| {name} | {' | '.join(cells)} |")
    return "\n\n".join([head, *merges, "\n".join(lost)]) + "\n"


def _tasks(point: Sequence[float]) -> float:
    return point[0]


def _clean(point: Sequence[float]) -> float:
    return point[1]


def _both(point: Sequence[float]) -> float:
    return (point[0] + point[1]) / 2


def _best(kind: str, name: str, what: Callable[[Sequence[float]], float]) -> Figure:
    """On test data, at the λ whose mean of tasks and clean digits is best on validation data."""

    def figure(seed: Seed) -> float:
        curves = seed[kind][name]
        best = max(range(len(seed["scales"])), key=lambda k: _both(curves["validation"][k]))
        return what(curves["test"][best])

    return figure
