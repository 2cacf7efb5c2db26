"""Random methods against mergekit's distribution: our draws, its moments, what chance allows between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.parity.comparison import Array, Golden, merged

N_DRAWS = 1000
SIGMAS = 6.0  # a few thousand comparisons in all: chance exceeds it once in 10^5 suites


def operands(golden: Golden, n_models: int) -> tuple[Array, list[Array]]:
    base, *models = (golden.arrays[f"input/{place}"] for place in range(n_models + 1))
    return base, models


def draw(golden: Golden, case: Mapping[str, Any], seed: int) -> Array:
    """Our merge of the case with one seed."""
    base, models = operands(golden, case["models"])
    return merged(case["method"], {"a": base}, [{"a": m} for m in models], case["parameters"], seed=seed)["a"]


class Draws:
    """Moments of the change over `N_DRAWS` of our seeds, and how often each entry changed."""

    def __init__(self, golden: Golden, case: Mapping[str, Any]) -> None:
        base, _ = operands(golden, case["models"])
        powers = np.zeros((3, *base.shape))
        self.kept = np.zeros(base.shape, np.int64)
        for seed in range(N_DRAWS):
            out = draw(golden, case, seed)
            change = out.astype(np.float64) - base
            powers += [change, change**2, change**4]
            self.kept += out != base
        self.mean, self.square, self.fourth = powers / N_DRAWS


def check_moments(golden: Golden, case: Mapping[str, Any], mine: Draws) -> None:
    """Mean and mean square of every entry's change, in standard errors of the difference of two samples."""
    mean, square, fourth = golden.arrays[f"moments/{case['name']}"]
    share = 1 / N_DRAWS + 1 / case["draws"]
    for what, found, wanted, variance in (
        ("mean", mine.mean, mean, square - mean**2),
        ("mean square", mine.square, square, fourth - square**2),
    ):
        sigma = np.sqrt(np.maximum(variance, 0) * share)
        # An entry that never varies differs by the rounding of the merge alone.
        z = np.abs(found - wanted) / (sigma + 1e-6 * np.sqrt(square + 1e-12))
        assert z.max() < SIGMAS, f"{case['name']}: {what} of an entry is {z.max():.1f} sigma from mergekit's"
        spread = float((z**2).mean())
        limit = 1 + SIGMAS * np.sqrt(2 / z.size)
        assert spread < limit, (
            f"{case['name']}: {what}s are too far from mergekit's: mean z^2 {spread:.2f} > {limit:.2f}"
        )


def check_keep_rates(golden: Golden, case: Mapping[str, Any], mine: Draws) -> None:
    """How often entries survive, by rank of magnitude in their row, against mergekit and the formula."""
    base, (model,) = operands(golden, 1)
    ranks = np.abs(model - base).argsort(axis=1).argsort(axis=1)
    n_ranks = base.shape[1]
    theirs = golden.arrays[f"kept/{case['name']}"]
    density, epsilon = case["parameters"]["density"], case["parameters"].get("epsilon", 0.0)
    for bucket in range(8):
        inside = ranks * 8 // n_ranks == bucket
        p = density - epsilon + 2 * epsilon * ranks[inside] / (n_ranks - 1)
        variance = float((p * (1 - p)).sum())
        formula = (mine.kept[inside].sum() / N_DRAWS - p.sum()) / np.sqrt(variance / N_DRAWS)
        both = variance * (1 / N_DRAWS + 1 / case["draws"])
        peer = (mine.kept[inside].sum() / N_DRAWS - theirs[inside].sum() / case["draws"]) / np.sqrt(both)
        for what, z in (("the formula", formula), ("mergekit", peer)):
            assert abs(z) < SIGMAS, (
                f"{case['name']}: ranks of bucket {bucket} survive {z:.1f} sigma off {what}"
            )


def check_l1(golden: Golden, case: Mapping[str, Any]) -> None:
    """Survivors of one draw are scaled by |tau| / |kept tau| in the L1 norm, rounded once: to the bit."""
    base, (model,) = operands(golden, 1)
    tau = model - base
    for seed in range(20):
        out = draw(golden, case, seed)
        kept = out != base
        total, survivors = (np.abs(x).astype(np.float64).sum() for x in (tau, tau[kept]))
        ratio = np.float32(total / survivors)
        np.testing.assert_array_equal(out, np.where(kept, base + tau * ratio, base))


def check(golden: Golden, case: Mapping[str, Any]) -> None:
    """Moments, and where one model of weight 1 shows its mask, keep rates and L1 norms."""
    mine = Draws(golden, case)
    check_moments(golden, case, mine)
    if case["models"] == 1:
        check_keep_rates(golden, case, mine)
        check_l1(golden, case)
