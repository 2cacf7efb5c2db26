"""What each peer's TIES computes, restated in float64 numpy from its formula; knows nothing of `Program`.

A restatement maps task vectors [K, n] of one scope (a tensor, or all tensors of a model side by side),
weights [K] and a density to the numerator R [n] and the divisor D [n] of the merged task vector. On grid
inputs both are exact. Where a peer keeps exactly k entries, it leaves open which of those that tie with
the last one stay: here the lowest indices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Restatement = Callable[[Array, Array, float], tuple[Array, Array]]


def _exactly(taus: Array, k: int) -> Array:
    """Rows with all but the k largest magnitudes zeroed."""
    trimmed = np.zeros_like(taus)
    for row, tau in zip(trimmed, taus, strict=True):
        largest = np.argsort(-np.abs(tau), kind="stable")[:k]
        row[largest] = tau[largest]
    return trimmed


def _from_smallest(taus: Array, k: int) -> Array:
    """Rows with everything below their k-th smallest magnitude zeroed."""
    limits = np.sort(np.abs(taus), axis=1)[:, k - 1 : k]
    return np.where(np.abs(taus) >= limits, taus, 0.0)


def mergekit(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    n = taus.shape[1]
    if density < 1:
        taus = _exactly(taus, max(1, int(density * n)) if density > 0 else 0)
    votes = taus * weights[:, None]
    sign = np.where(votes.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(votes) == sign
    divisor = (agree * weights[:, None]).sum(axis=0)
    return (votes * agree).sum(axis=0), np.where(divisor == 0, 1.0, divisor)


def _peft(taus: Array, weights: Array, density: float, *, by_value: bool) -> tuple[Array, Array]:
    if density < 1:
        taus = _exactly(taus, int(density * taus.shape[1]))
    mass = (taus if by_value else np.sign(taus)).sum(axis=0)
    agree = np.sign(taus) == np.where(mass >= 0, 1.0, -1.0)
    return (taus * weights[:, None] * agree).sum(axis=0), np.maximum(agree.sum(axis=0), 1.0)


def peft(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    return _peft(taus, weights, density, by_value=True)


def peft_frequency(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    return _peft(taus, weights, density, by_value=False)


def _majority_filled(taus: Array) -> Array:
    """Sign of each column's sum; zeros take the sign of the sum of all those signs, which may be zero too."""
    signs = np.sign(taus.sum(axis=0))
    return np.where(signs == 0, np.sign(signs.sum()), signs)


def _fusion_bench(taus: Array, density: float, how: str) -> tuple[Array, Array]:
    n = taus.shape[1]
    if density < 1:  # the peer raises at 1
        taus = _from_smallest(taus, n - int(n * density))
    signs = _majority_filled(taus)
    chosen = np.where(np.where(signs > 0, taus > 0, taus < 0), taus, 0.0)
    if how == "max":
        return np.abs(chosen).max(axis=0) * signs, np.ones(n)
    count = np.maximum((chosen != 0).sum(axis=0), 1.0)
    return chosen.sum(axis=0), count if how == "mean" else np.ones(n)


def fusion_bench_sum(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    return _fusion_bench(taus, density, "sum")


def fusion_bench_mean(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    return _fusion_bench(taus, density, "mean")


def fusion_bench_max(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    return _fusion_bench(taus, density, "max")


def mergelm(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    mask_rate = round(1 - density, 15)  # what a user of the peer writes for this density
    n_masked = int(taus.shape[1] * mask_rate)
    if n_masked:  # the peer raises at 0
        taus = _from_smallest(taus, n_masked)
    signs = _majority_filled(taus)
    chosen = np.where(((signs > 0) & (taus > 0)) | ((signs < 0) & (taus < 0)), taus, 0.0)
    return chosen.sum(axis=0), np.maximum((chosen != 0).sum(axis=0), 1.0)


def _sd_mecha(taus: Array, density: float, *, by_value: bool) -> tuple[Array, Array]:
    taus = _from_smallest(taus, max(int((1 - density) * taus.shape[1]), 1))
    sign = np.sign((taus if by_value else np.sign(taus)).sum(axis=0))
    agree = np.sign(taus) == sign
    # 0 / 0, which the peer turns into 0 afterwards, is 0 / 1 here.
    return (taus * agree).sum(axis=0), np.maximum(agree.sum(axis=0), 1.0)


def sd_mecha(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    return _sd_mecha(taus, density, by_value=False)


def sd_mecha_values(taus: Array, weights: Array, density: float) -> tuple[Array, Array]:
    return _sd_mecha(taus, density, by_value=True)


RESTATEMENTS: dict[str, Restatement] = {
    "mergekit": mergekit,
    "paper": fusion_bench_mean,
    "fusion_bench_sum": fusion_bench_sum,
    "fusion_bench_mean": fusion_bench_mean,
    "fusion_bench_max": fusion_bench_max,
    "mergelm": mergelm,
    "peft": peft,
    "peft_frequency": peft_frequency,
    "sd_mecha": sd_mecha,
    "sd_mecha_values": sd_mecha_values,
}

WHOLE_MODEL = frozenset({"paper", "fusion_bench_sum", "fusion_bench_mean", "fusion_bench_max", "mergelm"})
WEIGHTED = frozenset({"mergekit", "peft", "peft_frequency"})
EXACTLY_K = WEIGHTED
