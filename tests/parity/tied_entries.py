"""Entries that a trim may keep or drop at will, because their magnitude equals its threshold.

mergekit leaves the choice to an unstable sort; ours is `tie`. Everything here is computed from recipe and
inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.parity.recipe_reading import place_of, value_of
from tests.parity.shards import Array, Saved

TRIMS = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")


def trimmed(recipe: Mapping[str, Any]) -> bool:
    return recipe["merge_method"] in TRIMS


def tied(
    recipe: Mapping[str, Any],
    family: Mapping[str, Mapping[str, Saved]],
    name: str,
    n_layers: int,
) -> Array:
    """True where a choice is open, for one output tensor; `n_layers` is that of every input."""
    place = place_of(recipe, name, n_layers)
    base_model = recipe["base_model"]
    base = family[base_model][place.sources.get(base_model, name)].values()
    deltas = {
        model: family[model][source].values() - base
        for model, source in place.sources.items()
        if model != base_model
    }
    if recipe["merge_method"] == "sce":
        return _tied_in_variance(
            np.stack(list(deltas.values())), float(value_of(recipe, place, "select_topk"))
        )
    open_entries = np.zeros(base.shape, bool)
    for model, delta in deltas.items():
        density = float(value_of(recipe, place, "density", model))
        gamma = 0.0
        if recipe["merge_method"] != "ties":
            gamma = float(value_of(recipe, place, "gamma", model))
        for rank in _cuts(recipe["merge_method"], density, gamma, delta.size):
            open_entries |= _at_cut(np.abs(delta), rank)
    return open_entries


def _cuts(method: str, density: float, gamma: float, n: int) -> Iterator[int]:
    """Counts of largest entries between which the kept ones lie."""
    if density >= 1 or n == 0:
        return
    if method == "ties":
        yield max(1, int(density * n)) if density > 0 else 0
        return
    n_kept = int(density * n)
    n_smaller = max(0, n - n_kept - int(gamma * n))
    yield n - n_smaller
    yield n - n_smaller - n_kept


def _at_cut(magnitudes: Array, n_largest: int) -> Array:
    """The entries equal to the n-th largest, if not all of them fall on one side of the cut."""
    flat = magnitudes.reshape(-1)
    if not 0 < n_largest < flat.size:
        return np.zeros(magnitudes.shape, bool)
    cut = np.partition(flat, flat.size - n_largest)[flat.size - n_largest]
    n_above, n_from = int((flat > cut).sum()), int((flat >= cut).sum())
    if n_above < n_largest < n_from:
        return magnitudes == cut
    return np.zeros(magnitudes.shape, bool)


def _tied_in_variance(deltas: Array, share: float) -> Array:
    wide = deltas.astype(np.float64)
    variance = ((wide - wide.mean(0)) ** 2).mean(0).astype(np.float32)
    n_kept = int(np.float32(np.count_nonzero(variance)) * np.float32(share))
    if share >= 1:
        return np.zeros(variance.shape, bool)
    # A variance an ulp from the cut may fall on either side, since the two sums are rounded differently.
    flat = variance.reshape(-1)
    if not 0 < n_kept < flat.size:
        return np.zeros(variance.shape, bool)
    cut = np.partition(flat, flat.size - n_kept)[flat.size - n_kept]
    low, high = np.nextafter(cut, np.float32(0)), np.nextafter(cut, np.float32(np.inf))
    near: Array = (variance >= low) & (variance <= high)
    return near if int(near.sum()) > 1 else np.zeros(variance.shape, bool)
