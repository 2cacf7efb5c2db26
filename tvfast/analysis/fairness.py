"""Fairness of merges between groups: over a sweep of λ, and by injecting one group's vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from tvfast.errors import ArgumentError
from tvfast.live import LiveMerge

Groups: TypeAlias = Sequence[Any] | Mapping[str, Any]
"""A name per sample, None or NaN for none; or masks [N] by name, a sample being in several groups or none."""

SCALES = tuple(round(0.1 * k, 1) for k in range(11))
INJECTED = tuple(round(0.2 * k, 1) for k in range(6))


class Scaled(Protocol):
    """What is asked of a `LiveMerge`."""

    @property
    def n_tasks(self) -> int: ...

    def set(self, coefficients: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Fairness:
    """Of binary predictions ŷ.

    Attributes:
        accuracy: over all samples, those of no group too.
        demographic_parity_difference: max_g P(ŷ = 1 | g) - min_g P(ŷ = 1 | g).
        equalised_odds_difference: the larger of the gaps between groups of P(ŷ = 1 | y = 1, g) and
            P(ŷ = 1 | y = 0, g); a rate without samples is 0.
        accuracies, selection_rates: by group.
        counts: samples by group.
    """

    accuracy: float
    demographic_parity_difference: float
    equalised_odds_difference: float
    accuracies: dict[str, float]
    selection_rates: dict[str, float]
    counts: dict[str, int]

    @property
    def macro_accuracy(self) -> float:
        """The mean over groups."""
        return sum(self.accuracies.values()) / len(self.accuracies)

    @property
    def worst_accuracy(self) -> float:
        """Of the group where it is lowest."""
        return min(self.accuracies.values())


@dataclass(frozen=True, slots=True)
class FairnessRow:
    """One point of a sweep."""

    scale: float
    fairness: Fairness

    def as_json(self) -> dict[str, Any]:
        return {"scale": self.scale, **asdict(self.fairness)}


def fairness(labels: Any, predictions: Any, groups: Groups) -> Fairness:
    """Accuracy and fairness of binary predictions.

    Args:
        labels, predictions: [N] of 0 and 1, tensors or arrays.
        groups: who belongs to which.

    Raises:
        ArgumentError: other lengths or values, or fewer than two groups with samples.
        ImportError: fairlearn is not installed.

    Source: Naganuma et al. 2025, arXiv:2505.24262; computed by fairlearn, a sample counting once in each of
        its groups.
    """
    metrics = _fairlearn()
    y, found = _binary(labels, "labels"), _binary(predictions, "predictions")
    if len(y) != len(found):
        raise ArgumentError(f"{len(found)} predictions for {len(y)} labels; expected one each.")
    rows, names = _members(groups, len(y))
    if len(set(names)) < 2:
        raise ArgumentError(f"{len(set(names))} groups have samples; expected at least two to compare.")
    truth, said, member = y[rows], found[rows], np.array(names)
    by_group = metrics.MetricFrame(
        metrics={"accuracy": _accuracy, "rate": metrics.selection_rate, "count": metrics.count},
        y_true=truth,
        y_pred=said,
        sensitive_features=member,
    ).by_group
    parity = metrics.demographic_parity_difference(truth, said, sensitive_features=member)
    odds = metrics.equalized_odds_difference(truth, said, sensitive_features=member)
    return Fairness(
        accuracy=_accuracy(y, found),
        demographic_parity_difference=float(parity),
        equalised_odds_difference=float(odds),
        accuracies={str(name): float(value) for name, value in by_group["accuracy"].items()},
        selection_rates={str(name): float(value) for name, value in by_group["rate"].items()},
        counts={str(name): int(value) for name, value in by_group["count"].items()},
    )


def fairness_sweep(
    live: Scaled,
    predict: Callable[[], Any],
    labels: Any,
    groups: Groups,
    *,
    scales: Sequence[float] = SCALES,
) -> list[FairnessRow]:
    """Fairness of θ(λ) = θ₀ + λ Σ_g τ_g over λ, τ_g the vector of a model that was fine-tuned on group g.

    Args:
        live: a `LiveMerge` of the groups' vectors. Left at the last λ.
        predict: predictions of the live model on the samples of `labels`: [N] of 0 and 1.
        labels, groups: of the samples.
        scales: λ; the authors' by default.

    Raises:
        ArgumentError, ImportError: as `fairness`.
    """
    return [_row(live, [float(scale)] * live.n_tasks, scale, predict, labels, groups) for scale in scales]


def injection_sweep(
    model: Any,
    group: Any,
    base: Any,
    predict: Callable[[], Any],
    labels: Any,
    groups: Groups,
    *,
    scales: Sequence[float] = INJECTED,
) -> list[FairnessRow]:
    """Fairness of θ(λ) = θ_SFT + λ (θ_g - θ₀) over λ: one group's vector, added to a model that all were
    trained on.

    Args:
        model: θ_SFT, as `LiveMerge` takes it; overwritten while the sweep runs, and put back bit for bit.
        group: θ_g, fine-tuned on the group alone; base: θ₀.
        predict: predictions of `model`, [N] of 0 and 1.
        labels, groups, scales: as in `fairness_sweep`.

    Raises:
        ArgumentError, ImportError: as `fairness`; weights that do not fit together, as `LiveMerge`.

    Notes:
        Computed as θ_SFT + λ (θ_g - θ_SFT) - λ (θ₀ - θ_SFT), in float32: no difference is stored.
    """
    with LiveMerge(model, models=[group, base]) as live:
        return [_row(live, [float(scale), -float(scale)], scale, predict, labels, groups) for scale in scales]


def fairest(rows: Sequence[FairnessRow]) -> FairnessRow:
    """The authors' choice of λ: where demographic parity is best, or equalised odds; of two that differ, the
    one with the smaller sum of both. Ties go to the first. Choose on validation data.

    Raises:
        ArgumentError: no rows.
    """
    if not rows:
        raise ArgumentError("there are no rows to choose from; expected at least one.")
    candidates = (
        min(rows, key=lambda row: row.fairness.demographic_parity_difference),
        min(rows, key=lambda row: row.fairness.equalised_odds_difference),
    )
    return min(
        candidates,
        key=lambda row: row.fairness.demographic_parity_difference + row.fairness.equalised_odds_difference,
    )


def _row(
    live: Scaled,
    weights: list[float],
    scale: float,
    predict: Callable[[], Any],
    labels: Any,
    groups: Groups,
) -> FairnessRow:
    live.set(weights)
    return FairnessRow(float(scale), fairness(labels, predict(), groups))


def _fairlearn() -> Any:
    try:
        import fairlearn.metrics
    except ImportError:
        raise ImportError(
            "fairness needs fairlearn, which is not installed; run pip install 'tvfast[analysis]'."
        ) from None
    return fairlearn.metrics


def _binary(values: Any, what: str) -> np.ndarray[Any, Any]:
    found = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if found.ndim != 1 or not np.isin(found, (0, 1)).all():
        others = " and other values than 0 and 1" if found.ndim == 1 else ""
        raise ArgumentError(f"{what} have shape {list(found.shape)}{others}; expected [N] of 0 and 1.")
    return found.astype(np.int64)


def _members(groups: Groups, n: int) -> tuple[list[int], list[str]]:
    """A row for every sample and group it is in: positions of samples, and names."""
    if isinstance(groups, Mapping):
        masks = {name: np.asarray(mask).astype(bool) for name, mask in groups.items()}
        wrong = [name for name, mask in masks.items() if mask.shape != (n,)]
        if wrong:
            raise ArgumentError(
                f"group {wrong[0]!r} has a mask of {list(masks[wrong[0]].shape)}; expected [{n}]."
            )
        pairs = [(int(row), name) for name, mask in masks.items() for row in np.flatnonzero(mask)]
    else:
        if len(groups) != n:
            raise ArgumentError(
                f"{len(groups)} groups for {n} labels; expected a name each, None for no group."
            )
        import pandas as pd  # fairlearn stands on it

        plain = groups.tolist() if hasattr(groups, "tolist") else groups  # numbers of tensors and arrays
        named = pd.Series(list(plain), dtype=object).notna()
        pairs = [(row, str(name)) for row, name in enumerate(plain) if named[row]]
    return [row for row, _ in pairs], [name for _, name in pairs]


def _accuracy(truth: Any, found: Any) -> float:
    return float((np.asarray(truth) == np.asarray(found)).mean())
