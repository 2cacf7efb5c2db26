"""The table, the claims and the picture of an experiment over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.experiment import PENALTY, PLAIN, TANGENT, TANGENT_PENALTY
from bench.quality.merges import ARITHMETIC, AVERAGE

Seed = dict[str, Any]
"""What `experiment.run` returned for one seed."""

FLAT = (0.3, 2.0)
"""Where TAK's authors report accuracy to be flat, in the tangent space."""
WITHIN = 2.0
"""Points below its best within which a row counts as not sensitive to λ."""
REGIMES = (PLAIN, PENALTY, TANGENT, TANGENT_PENALTY)


@dataclass(frozen=True, slots=True)
class Spread:
    """Over seeds: mean and sample standard deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


Figure = Callable[[Seed], float]


def over(seeds: Sequence[Seed], figure: Figure) -> Spread:
    return Spread(tuple(figure(seed) for seed in seeds))


def experts(regime: str) -> Figure:
    """Mean accuracy of the experts, each on its own task."""
    return lambda seed: statistics.fmean(seed["regimes"][regime]["experts"])


def tuned(regime: str, row: str) -> Figure:
    """Test accuracy at the λ that is best on validation data."""

    def figure(seed: Seed) -> float:
        curves = seed["regimes"][regime]["merges"][row]
        best = max(range(len(seed["scales"])), key=curves["validation"].__getitem__)
        return float(curves["test"][best])

    return figure


def at(regime: str, row: str, scale: float) -> Figure:
    """Test accuracy at a λ of the grid."""
    return lambda seed: float(seed["regimes"][regime]["merges"][row]["test"][seed["scales"].index(scale)])


def width(regime: str, row: str) -> Figure:
    """Length of the interval of λ around the best one in which accuracy is within `WITHIN` points of it."""

    def figure(seed: Seed) -> float:
        scales, test = seed["scales"], seed["regimes"][regime]["merges"][row]["test"]
        best = max(range(len(test)), key=test.__getitem__)
        first = last = best
        while first > 0 and test[first - 1] >= test[best] - WITHIN:
            first -= 1
        while last + 1 < len(test) and test[last + 1] >= test[best] - WITHIN:
            last += 1
        return float(scales[last] - scales[first])

    return figure


def drop(regime: str, row: str) -> Figure:
    """How far accuracy falls below its best within `FLAT`."""

    def figure(seed: Seed) -> float:
        test = seed["regimes"][regime]["merges"][row]["test"]
        inside = [value for scale, value in zip(seed["scales"], test, strict=True) if _is_flat(scale)]
        return float(max(test) - min(inside))

    return figure


def _is_flat(scale: float) -> bool:
    return FLAT[0] <= scale <= FLAT[1]


def negated(regime: str, row: str, what: str) -> Figure:
    """`target` or `control` accuracy of a negation."""
    return lambda seed: float(seed["regimes"][regime]["negations"][row][what])


@dataclass(frozen=True, slots=True)
class Claim:
    """Of a paper. `better` and `worse` are figures whose difference should be above 0 on every seed."""

    text: str
    better: Figure
    worse: Figure
    unit: str = "points"


def claims(seeds: Sequence[Seed]) -> list[Claim]:
    """Those that the experiment can speak to."""
    sta, theirs = "STA, abs(g τ)", "STA, abs(g θ)"
    found = [
        Claim("STA (g θ) is less sensitive to λ than task arithmetic", width(PLAIN, theirs),
              width(PLAIN, ARITHMETIC), "of λ"),
        Claim("STA (g τ) is less sensitive to λ than task arithmetic", width(PLAIN, sta),
              width(PLAIN, ARITHMETIC), "of λ"),
        Claim("STA (g θ) needs no λ: at λ = 1 above task arithmetic at its best λ", at(PLAIN, theirs, 1.0),
              tuned(PLAIN, ARITHMETIC)),
        Claim("Fisher (exact) is above averaging", at(PLAIN, "Fisher, exact", 1.0), at(PLAIN, AVERAGE, 1.0)),
        Claim("RegMean is above averaging", at(PLAIN, "RegMean", 1.0), at(PLAIN, AVERAGE, 1.0)),
        Claim("MaTS is above averaging", at(PLAIN, "MaTS", 1.0), at(PLAIN, AVERAGE, 1.0)),
        Claim("MaTS is above RegMean", at(PLAIN, "MaTS", 1.0), at(PLAIN, "RegMean", 1.0)),
        *_tak_claims(PLAIN, PENALTY, "TAK"),
    ]  # fmt: skip
    if TANGENT in seeds[0]["regimes"]:
        found += _tak_claims(TANGENT, TANGENT_PENALTY, "TAK in the tangent space")
    return found


def _tak_claims(without: str, with_: str, name: str) -> list[Claim]:
    row = ARITHMETIC
    return [
        Claim(f"{name}: better at addition, λ = 1", at(with_, row, 1.0), at(without, row, 1.0)),
        Claim(f"{name}: better at addition, best λ", tuned(with_, row), tuned(without, row)),
        Claim(
            f"{name}: flatter over λ from {FLAT[0]:g} to {FLAT[1]:g} (smaller drop below its best)",
            drop(without, row),
            drop(with_, row),
        ),
        Claim(
            f"{name}: flat over λ from {FLAT[0]:g} to {FLAT[1]:g} (at most {WITHIN:g} points below its best)",
            lambda seed: WITHIN,
            drop(with_, row),
        ),
        Claim(
            f"{name}: better at negation (lower target at 95 % of the control)",
            negated(without, row, "target"),
            negated(with_, row, "target"),
        ),
    ]


def verdict(seeds: Sequence[Seed], claim: Claim) -> tuple[str, Spread]:
    """Whether a claim held, and the differences by seed."""
    found = Spread(tuple(round(claim.better(seed) - claim.worse(seed), 6) for seed in seeds))
    n_above = sum(value > 0 for value in found.values)
    if n_above == len(seeds):
        return "holds", found
    return ("does not hold" if found.mean <= 0 else f"in {n_above} of {len(seeds)} seeds"), found


# -- as text ------------------------------------------------------------------------------------------------


def addition_table(seeds: Sequence[Seed]) -> str:
    """Accuracy of every merge, plain and penalised: untuned, and at the best λ."""
    lines = [
        "| merge | λ = 1 | best λ | λ within 2 points | with penalty: λ = 1 | best λ | λ within 2 points |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in seeds[0]["regimes"][PLAIN]["merges"]:
        cells = [row]
        for regime in (PLAIN, PENALTY):
            cells += [
                str(over(seeds, at(regime, row, 1.0))),
                str(over(seeds, tuned(regime, row))),
                str(over(seeds, width(regime, row))),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def negation_table(seeds: Sequence[Seed]) -> str:
    """Accuracy on the target and on the control."""
    lines = [
        "| negation | target ↓ | control | with penalty: target ↓ | control |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in seeds[0]["regimes"][PLAIN]["negations"]:
        cells = [row]
        for regime in (PLAIN, PENALTY):
            cells += [str(over(seeds, negated(regime, row, what))) for what in ("target", "control")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tangent_table(seeds: Sequence[Seed]) -> str:
    """Task arithmetic by way of fine-tuning."""
    lines = [
        "| fine-tuning | experts | λ = 1 | best λ | λ within 2 points | drop, λ 0.3 to 2 | negation ↓ |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for regime in REGIMES:
        if regime not in seeds[0]["regimes"]:
            continue
        figures = [
            experts(regime),
            at(regime, ARITHMETIC, 1.0),
            tuned(regime, ARITHMETIC),
            width(regime, ARITHMETIC),
            drop(regime, ARITHMETIC),
            negated(regime, ARITHMETIC, "target"),
        ]
        lines.append(f"| {' | '.join([regime, *(str(over(seeds, one)) for one in figures)])} |")
    return "\n".join(lines)


def claims_table(seeds: Sequence[Seed]) -> str:
    """Every claim, and whether it held."""
    lines = ["| claim | verdict | difference over seeds |", "| --- | --- | --- |"]
    for claim in claims(seeds):
        said, found = verdict(seeds, claim)
        lines.append(f"| {claim.text} | {said} | {found.mean:+.1f} ± {found.deviation:.1f} {claim.unit} |")
    return "\n".join(lines)


def text(about: str, seeds: Sequence[Seed]) -> str:
    """All tables."""
    start = over(seeds, lambda seed: statistics.fmean(seed["base"]))
    kept = over(seeds, negated(PLAIN, ARITHMETIC, "base_control"))
    head = (
        f"{about}; {len(seeds)} seeds, mean ± standard deviation of test accuracy in percent. Base {start}, "
        f"experts on their own task {over(seeds, experts(PLAIN))}, with penalty "
        f"{over(seeds, experts(PENALTY))}; base on the control {kept}."
    )
    parts = [head, addition_table(seeds), negation_table(seeds), tangent_table(seeds), claims_table(seeds)]
    return "\n\n".join(parts) + "\n"


# -- as a picture -------------------------------------------------------------------------------------------

_SHOWN = (ARITHMETIC, "TIES", "STA, abs(g τ)", "Fisher, exact", "RegMean", "MaTS")


def draw(about: str, seeds: Sequence[Seed], path: Path) -> None:
    """Accuracy over λ: of some merges, and of task arithmetic by way of fine-tuning; bands are one deviation.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for row in _SHOWN:
        _curve(left, seeds, PLAIN, row, row)
    for regime in REGIMES:
        if regime in seeds[0]["regimes"]:
            _curve(right, seeds, regime, ARITHMETIC, regime)
    left.set_title("methods, plain fine-tuning")
    right.set_title("task arithmetic, by way of fine-tuning")
    left.set_ylabel("test accuracy, mean over tasks, %")
    base = over(seeds, lambda seed: statistics.fmean(seed["base"])).mean
    for axes in (left, right):
        axes.axhline(base, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel("λ")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{about}; {len(seeds)} seeds", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axes: Any, seeds: Sequence[Seed], regime: str, row: str, label: str) -> None:
    scales = seeds[0]["scales"]
    points = [over(seeds, at(regime, row, scale)) for scale in scales]
    means = [point.mean for point in points]
    (line,) = axes.plot(scales, means, label=label, linewidth=1.4)
    low = [point.mean - point.deviation for point in points]
    high = [point.mean + point.deviation for point in points]
    axes.fill_between(scales, low, high, alpha=0.12, color=line.get_color())
