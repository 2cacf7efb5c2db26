"""Fairness by its definition, over sweeps and injections."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tvfast
from tvfast import analysis
from tvfast.errors import ArgumentError

pytest.importorskip("fairlearn", reason="fairness is computed by fairlearn")
pd = pytest.importorskip("pandas", reason="fairlearn stands on it")


def rate(found: Any, rows: Any) -> float:
    return float(found[rows].mean()) if rows.any() else 0.0


def by_definition(y: Any, said: Any, masks: dict[str, Any]) -> tuple[float, float]:
    """Gaps of selection rates, and the larger of the gaps of both conditional rates."""

    def gap(condition: Any) -> float:
        rates = [rate(said, mask & condition) for mask in masks.values() if mask.any()]
        return max(rates) - min(rates)

    everywhere = np.ones(len(y), dtype=bool)
    return gap(everywhere), max(gap(y == 1), gap(y == 0))


def test_it_is_the_definition_also_where_groups_overlap() -> None:
    generator = np.random.default_rng(0)
    for n_groups in (2, 3, 5):
        y, said = generator.integers(0, 2, 60), generator.integers(0, 2, 60)
        masks = {f"g{k}": generator.random(60) < 0.4 for k in range(n_groups)}
        masks["nobody"] = np.zeros(60, dtype=bool)
        found = analysis.fairness(torch.tensor(y), torch.tensor(said), masks)
        parity, odds = by_definition(y, said, masks)
        assert found.demographic_parity_difference == pytest.approx(parity)
        assert found.equalised_odds_difference == pytest.approx(odds)
        assert found.accuracy == pytest.approx((y == said).mean())
        assert found.counts == {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}
        for name in found.counts:
            assert found.accuracies[name] == pytest.approx((y == said)[masks[name]].mean())
            assert found.selection_rates[name] == pytest.approx(said[masks[name]].mean())
        assert found.worst_accuracy == min(found.accuracies.values())
        assert found.macro_accuracy == pytest.approx(np.mean(list(found.accuracies.values())))


def test_a_name_per_sample_and_samples_of_no_group() -> None:
    found = analysis.fairness([1, 0, 1, 0, 1], [1, 0, 0, 1, 0], ["a", "a", "b", "b", None])
    assert found.counts == {"a": 2, "b": 2}
    assert found.accuracy == 2 / 5
    assert found.accuracies == {"a": 1.0, "b": 0.0}
    assert (found.demographic_parity_difference, found.equalised_odds_difference) == (0.0, 1.0)


@pytest.mark.parametrize("missing", [None, math.nan, np.nan, pd.NA, pd.NaT])
def test_what_tables_hold_for_no_group_is_none(missing: Any) -> None:
    groups = pd.Series(["a", "a", "b", "b", missing], dtype=object)
    for given in (groups, groups.to_numpy(), groups.to_list()):
        assert analysis.fairness([1, 0, 1, 0, 1], [1, 0, 0, 1, 0], given).counts == {"a": 2, "b": 2}


def test_groups_may_be_numbers_in_tensors() -> None:
    groups = torch.tensor([3, 3, 10, 10])
    assert analysis.fairness([1, 0, 1, 0], [1, 0, 0, 1], groups).counts == {"3": 2, "10": 2}


@pytest.mark.parametrize(
    ("labels", "predictions", "groups", "message"),
    [
        ([0, 2], [0, 1], ["a", "b"], "labels have shape .2. and other values than 0 and 1"),
        ([0, 1], [0.0, 0.5], ["a", "b"], "predictions have shape .2. and other values"),
        ([0, 1], [[0], [1]], ["a", "b"], "predictions have shape .2, 1."),
        ([0, 1], [0], ["a", "b"], "1 predictions for 2 labels"),
        ([0, 1], [0, 1], ["a"], "1 groups for 2 labels"),
        ([0, 1], [0, 1], ["a", "a"], "1 groups have samples; expected at least two"),
        ([0, 1], [0, 1], {"a": [True], "b": [True, False]}, "group 'a' has a mask of .1.; expected .2."),
    ],
)
def test_wrong_arguments(labels: Any, predictions: Any, groups: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        analysis.fairness(labels, predictions, groups)


class Judge(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight > 1.0).long()


X = torch.tensor([0.5, 1.5, 3.0, 0.4, 0.6, 0.9])
LABELS, GROUPS = [0, 1, 1, 0, 1, 1], ["a", "a", "a", "b", "b", "b"]


def test_a_sweep_and_the_choice(tmp_path: Path) -> None:
    model = Judge(0.0)
    deltas = [{"weight": torch.tensor([1.0])}, {"weight": torch.tensor([1.0])}]
    with tvfast.LiveMerge(model, deltas=deltas) as live:
        rows = analysis.fairness_sweep(live, lambda: model(X), LABELS, GROUPS, scales=[0.0, 0.4, 0.9, 5.0])
    assert [row.scale for row in rows] == [0.0, 0.4, 0.9, 5.0]
    for row in rows:
        expected = analysis.fairness(LABELS, Judge(2 * row.scale)(X), GROUPS)
        assert row.fairness == expected
    assert rows[0].fairness.demographic_parity_difference == 0.0
    assert analysis.fairest(rows) is rows[0]
    assert analysis.fairest(rows[1:]) is rows[2]
    assert rows[1].as_json()["scale"] == 0.4
    with pytest.raises(ArgumentError, match="no rows"):
        analysis.fairest([])
    pytest.importorskip("matplotlib")
    analysis.draw_fairness(rows, tmp_path / "rows.png", title="x")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_the_choice_between_two_that_differ() -> None:
    def row(scale: float, parity: float, odds: float) -> analysis.FairnessRow:
        return analysis.FairnessRow(scale, analysis.Fairness(1.0, parity, odds, {}, {}, {}))

    assert analysis.fairest([row(0.0, 0.1, 0.9), row(1.0, 0.5, 0.2), row(2.0, 0.3, 0.3)]).scale == 1.0
    assert analysis.fairest([row(0.0, 0.1, 0.4), row(1.0, 0.5, 0.2)]).scale == 0.0


def test_injection_adds_the_groups_own_vector() -> None:
    """θ_SFT + λ (θ_g - θ₀), and θ_SFT again afterwards."""
    model, group, base = Judge(0.8), Judge(1.7), Judge(0.3)
    seen: list[float] = []

    def predict() -> Tensor:
        seen.append(float(model.weight.detach()))
        return model(X)

    rows = analysis.injection_sweep(model, group, base, predict, LABELS, GROUPS)
    assert [row.scale for row in rows] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert seen == pytest.approx([0.8 + scale * 1.4 for scale in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)], rel=1e-6)
    assert float(model.weight.detach()) == float(torch.tensor(0.8))
