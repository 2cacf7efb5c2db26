"""Ties at a threshold, and where two readings of one method part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast
from tvfast.errors import UnknownNameError
from tvfast.methods.scalars import float32

# -- ties at the threshold -------------------------------------------------------------------------


@pytest.mark.parametrize(("tie", "kept"), [("index", 50), ("ge", 1000)])
def test_exact_tie_rules(tie: str, kept: int) -> None:
    out = tvfast.merge(torch.zeros(1000), [torch.ones(1000)], method="ties", density=0.05, tie=tie)
    assert int(out.count_nonzero()) == kept
    assert bool((out[:kept] == 1).all())


def test_hashed_ties_keep_the_density_in_every_quarter() -> None:
    out = tvfast.merge(torch.zeros(1 << 16), [torch.ones(1 << 16)], method="ties", density=0.25)
    for quarter in out.view(4, -1).count_nonzero(dim=1).tolist():
        assert abs(quarter - 4096) < 5 * math.sqrt(16384 * 0.25 * 0.75)


def test_hashed_ties_depend_on_seed_and_name() -> None:
    base, model = torch.zeros(1000), torch.ones(1000)

    def kept(seed: int, name: str) -> Tensor:
        return tvfast.merge({name: base}, [{name: model}], method="ties", density=0.5, seed=seed)[name]

    assert kept(0, "a").equal(kept(0, "a"))
    assert not kept(0, "a").equal(kept(1, "a"))
    assert not kept(0, "a").equal(kept(0, "b"))


def test_index_ties_over_the_whole_model_run_in_order_of_name() -> None:
    base = {"b": torch.zeros(10), "a": torch.zeros(7)}
    model = {"b": torch.ones(10), "a": torch.ones(7)}
    out = tvfast.merge(base, [model], method="ties", dialect="paper", density=0.5, tie="index")
    assert out["a"].tolist() == [1.0] * 7  # int(17 * 0.5) + 1 = 9 in all
    assert out["b"].tolist() == [1.0] * 2 + [0.0] * 8


def test_scope_takes_the_place_of_the_dialect_s() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    model = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}

    def kept(**arguments: str) -> list[list[float]]:
        out = tvfast.merge(base, [model], method="ties", density=0.5, **arguments)
        return [out["a"].tolist(), out["b"].tolist()]

    by_tensor = [[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 7.0, 8.0]]
    assert kept() == kept(scope="tensor") == by_tensor
    assert kept(scope="model") == [[0.0] * 4, [5.0, 6.0, 7.0, 8.0]]
    assert kept(dialect="paper") == [[0.0, 0.0, 0.0, 4.0], [5.0, 6.0, 7.0, 8.0]]  # int(d n) + 1
    assert kept(dialect="paper", scope="tensor") == [[0.0, 2.0, 3.0, 4.0], [0.0, 6.0, 7.0, 8.0]]
    with pytest.raises(UnknownNameError, match="did you mean 'model'"):
        kept(scope="models")


@pytest.mark.parametrize("tie", ["ge", "index", "hash"])
def test_density_0_keeps_nothing_but_nan(tie: str) -> None:
    model = torch.tensor([1.0, -2.0, math.inf, math.nan, 0.0])
    out = tvfast.merge(torch.zeros(5), [model], method="ties", density=0.0, tie=tie)
    assert torch.isnan(out).tolist() == [False, False, False, True, False]
    assert out.nan_to_num().count_nonzero() == 0


@pytest.mark.parametrize("tie", ["ge", "index", "hash"])
def test_nan_uses_up_rank_and_survives(tie: str) -> None:
    model = torch.tensor([math.nan, math.nan, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, math.inf, 0.25])
    out = tvfast.merge(torch.zeros(10), [model], method="ties", density=0.4, tie=tie)
    assert torch.isnan(out).nonzero().view(-1).tolist() == [0, 1]
    assert out[2:].nonzero().view(-1).tolist() == [0, 6]  # 5 and infinity
    out = tvfast.merge(torch.zeros(10), [model], method="ties", density=0.2, tie=tie)
    assert out[2:].count_nonzero() == 0


@pytest.mark.parametrize("tie", ["ge", "index", "hash"])
def test_band_whose_ends_are_the_same_value(tie: str) -> None:
    model = torch.full((1000,), 2.0)
    out = tvfast.merge(torch.zeros(1000), [model], method="breadcrumbs", density=0.5, gamma=0.25, tie=tie)
    kept = out != 0
    if tie == "index":
        assert kept.nonzero().view(-1).tolist() == list(range(250, 750))
    elif tie == "ge":
        assert bool(kept.all())
    else:
        assert abs(int(kept.sum()) - 500) < 5 * math.sqrt(250)


# -- traps between dialects ------------------------------------------------------------------------


def test_ties_counts_of_kept_entries() -> None:
    """int(d K), at least one; int(d K) + 1 in the original; per tensor against over the model."""
    model = torch.arange(1.0, 11.0)
    counts = {
        dialect: int(
            tvfast.merge(
                torch.zeros(10), [model], method="ties", dialect=dialect, density=0.2
            ).count_nonzero()
        )
        for dialect in ("mergekit", "peft", "paper", "mergelm", "sd_mecha")
    }
    assert counts == {"mergekit": 2, "peft": 2, "paper": 3, "mergelm": 3, "sd_mecha": 3}
    least = tvfast.merge(torch.zeros(10), [model], method="ties", density=0.01)
    assert least.nonzero().view(-1).tolist() == [9]


def test_ties_zero_vote_is_positive_in_mergekit_and_the_majority_in_the_paper() -> None:
    models = [torch.tensor([1.0, -3.0, -3.0]), torch.tensor([-1.0, -3.0, -3.0])]
    base = torch.zeros(3)
    assert tvfast.merge(base, models, method="ties").tolist() == [1.0, -3.0, -3.0]
    assert tvfast.merge(base, models, method="ties", dialect="paper").tolist() == [-1.0, -3.0, -3.0]
    assert tvfast.merge(base, models, method="ties", dialect="sd_mecha")[0] == 0.0


def test_ties_majority_is_taken_over_all_tensors() -> None:
    base = {"a": torch.zeros(1), "b": torch.zeros(4)}
    models = [{"a": torch.tensor([s]), "b": torch.full((4,), -2.0)} for s in (1.0, -1.0)]
    assert tvfast.merge(base, models, method="ties", dialect="paper")["a"].tolist() == [-1.0]


def test_ties_votes_are_weighted_in_mergekit_only() -> None:
    models, base = [torch.tensor([1.0]), torch.tensor([-2.0])], torch.zeros(1)
    assert tvfast.merge(base, models, method="ties", weights=[3, 1]).tolist() == [1.0]
    assert tvfast.merge(base, models, method="ties", dialect="peft", weights=[3, 1]).tolist() == [-2.0]


def test_ties_divides_by_weights_count_or_nothing() -> None:
    models, base = [torch.tensor([4.0]), torch.tensor([1.0])], torch.zeros(1)

    def merged(**options: Any) -> float:
        return float(tvfast.merge(base, models, method="ties", weights=[1, 3], **options))

    assert merged() == 7 / 4
    assert merged(dialect="peft") == 7 / 2
    assert merged(normalize=False) == 7
    assert merged(dialect="fusion_bench_sum") == 7
    assert merged(dialect="paper", normalize=False) == 7
    assert merged(dialect="fusion_bench_max") == 4


@pytest.mark.parametrize(
    ("name", "dialect"),
    [("ties", "mergekit"), ("ties", "paper"), ("ties", "peft"), ("sce", "mergekit"), ("della", "mergekit")],
)
def test_exact_zeros_are_no_members(name: str, dialect: str) -> None:
    models = [torch.tensor([4.0, 1.0]), torch.tensor([0.0, 1.0])]
    out = tvfast.merge(torch.zeros(2), models, method=name, dialect=dialect)
    assert float(out[0]) == 4.0


def test_breadcrumbs_without_outliers_is_a_trim() -> None:
    """The peer's slice [a:-0] once kept nothing."""
    model = torch.arange(1.0, 11.0)
    for options in ({"gamma": 0.0}, {"gamma": 0.09}):
        out = tvfast.merge(torch.zeros(10), [model], method="breadcrumbs", density=0.3, **options)
        assert out.nonzero().view(-1).tolist() == [7, 8, 9]


def test_dare_ties_of_the_paper_elects_without_weights_and_takes_the_mean() -> None:
    models, base = [torch.tensor([1.0]), torch.tensor([-2.0])], torch.zeros(1)
    assert tvfast.merge(base, models, method="dare_ties", weights=[3, 1]).tolist() == [3.0]
    assert tvfast.merge(base, models, method="dare_ties", dialect="paper", weights=[3, 1]).tolist() == [-2.0]


def test_one_density_per_model() -> None:
    models = [torch.arange(1.0, 11.0), torch.arange(16.0, 176.0, 16.0)]
    out = tvfast.merge(torch.zeros(10), models, method="ties", density=[0.1, 0.3], normalize=False)
    assert out.tolist() == [0.0] * 7 + [128.0, 144.0, 170.0]


def test_float64_thresholds_are_exact() -> None:
    model = torch.randn(1001, dtype=torch.float64)
    for tie in ("ge", "index", "hash"):
        out = tvfast.merge(
            torch.zeros(1001, dtype=torch.float64), [model], method="ties", density=0.2, tie=tie
        )
        assert int(out.count_nonzero()) == 200


def test_float32_rounds_once() -> None:
    assert float32(1e-7) == float(torch.tensor(1e-7))
    assert float32(1e300) == math.inf
