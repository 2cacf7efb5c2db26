"""Every method against mergekit 0.1.5 in float32, from golden files (generate_mergekit.py).

Inputs have no ties. Where the peer's own rounding decides more than the last bit, inputs are those on
which it does not: norms are sums over a tensor, so what they scale is small against the base; slerp's
angle, where it is wide, is one that float32 and float64 agree on. Other wide angles of slerp are compared
with the peer run in float64, within the rounding error of float32 and no farther than its float32 is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.parity import random_draws
from tests.parity.comparison import (
    GOLDEN,
    N_ULPS,
    check_arc,
    check_case,
    check_checkpoint,
    load,
    peer_spread,
    ulps,
)

DETERMINISTIC = load(GOLDEN / "deterministic.npz")
CHECKPOINT = load(GOLDEN / "checkpoint.npz")
ARCS = load(GOLDEN / "arcs.npz")
RANDOM = load(GOLDEN / "random.npz")
RANKED = ("finetune", "wide", "dominant")
METHODS = {
    *("linear", "slerp", "passthrough", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "sce"),
    *("nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "ram", "ramplus_tl", "arcee_fusion"),
}
RANDOM_METHODS = {"dare_linear", "dare_ties", "della", "della_linear"}


def test_golden_files_say_what_they_are() -> None:
    for golden in (DETERMINISTIC, CHECKPOINT, RANDOM, ARCS):
        assert golden.record["peer"] == "mergekit"
        assert golden.record["version"] == "0.1.5"
    assert {case["method"] for case in DETERMINISTIC.record["cases"]} == METHODS
    assert {case["method"] for case in RANDOM.record["cases"]} == RANDOM_METHODS


def test_inputs_have_no_ties() -> None:
    for name, base in DETERMINISTIC.arrays.items():
        kind, family, _, *place = name.split("/")
        if kind != "input" or place != ["0"] or family not in RANKED:
            continue
        for other in "123":
            tau = np.abs(DETERMINISTIC.arrays[name[:-1] + other] - base)
            assert np.unique(tau).size == tau.size, f"{name}, model {other}"


@pytest.mark.parametrize("case", DETERMINISTIC.record["cases"], ids=lambda case: case["name"])
def test_merge_equals_mergekit(case: dict[str, Any]) -> None:
    check_case(DETERMINISTIC, case)


@pytest.mark.parametrize(
    "arc", ARCS.record["arcs"], ids=lambda arc: f"{arc['n']}-{arc['degrees']}-{arc['t']}"
)
def test_slerp_on_a_wide_arc_is_no_farther_from_the_formula_than_mergekit(arc: dict[str, Any]) -> None:
    check_arc(ARCS, arc)


def test_mergekit_on_a_wide_arc_is_not_within_an_ulp_of_itself() -> None:
    """Its float32 sums depend on its threads and batches: no engine can equal all of its answers."""
    assert peer_spread(ARCS) > N_ULPS


@pytest.mark.parametrize("method", CHECKPOINT.record["recipes"])
def test_merge_equals_mergekit_yaml(method: str) -> None:
    check_checkpoint(CHECKPOINT, method)


@pytest.mark.parametrize("case", RANDOM.record["cases"], ids=lambda case: case["name"])
def test_draws_are_distributed_as_mergekits(case: dict[str, Any]) -> None:
    random_draws.check(RANDOM, case)


def test_ulps_count_steps_between_floats() -> None:
    one = np.float32(1)
    up = np.nextafter(one, np.float32(2))
    least = np.nextafter(np.float32(0), one)
    assert ulps(np.array([one, one, -one, 0.0, least]), np.array([one, up, -up, -0.0, -least])).tolist() == [
        *(0, 1, 1, 1, 3),
    ]
