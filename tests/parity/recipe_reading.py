"""What a recipe says about one output tensor: a second reading, independent of the code under test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DEFAULTS = {"density": 1.0, "gamma": 0.01, "select_topk": 1.0}


@dataclass(frozen=True)
class Place:
    """One output tensor: its slice, the tensor of each model, how far along the slice's gradient it is."""

    slice: Mapping[str, Any]
    sources: Mapping[str, str]
    along: float


def members_of(recipe: Mapping[str, Any]) -> list[str]:
    """Every model that the recipe merges, the base included."""
    parts = [*recipe.get("models", ()), *(s for part in recipe.get("slices", ()) for s in part["sources"])]
    return sorted(
        {part["model"] for part in parts} | ({recipe["base_model"]} if "base_model" in recipe else set())
    )


def place_of(recipe: Mapping[str, Any], name: str, n_layers: int) -> Place:
    """Slices in order of the output's layers; `models` is one slice over all layers of the models.

    A base that no slice lists is read at the tensor's own name.
    """
    slices = recipe.get("slices") or [
        {"sources": [{**model, "layer_range": [0, n_layers]} for model in recipe["models"]]}
    ]
    parts = name.split(".")
    if "layers" not in parts:
        chosen = slices[0] if "embed_tokens" in name else slices[-1]
        return Place(chosen, {source["model"]: name for source in chosen["sources"]}, 0.0)
    at = parts.index("layers") + 1
    layer = int(parts[at])
    for chosen in slices:
        start, end = chosen["sources"][0]["layer_range"]
        if layer < end - start:
            sources = {
                source["model"]: ".".join(
                    [*parts[:at], str(source["layer_range"][0] + layer), *parts[at + 1 :]]
                )
                for source in chosen["sources"]
            }
            return Place(chosen, sources, layer / (end - start - 1) if end - start > 1 else 1.0)
        layer -= end - start
    raise ValueError(f"{name} lies in no slice of the recipe")


def value_of(recipe: Mapping[str, Any], place: Place, key: str, model: str | None = None) -> Any:
    """The first setting that applies: of the source, of the slice, of the recipe, the default."""
    scopes = [place.slice.get("parameters"), recipe.get("parameters")]
    name = next(iter(place.sources.values()))
    if model is not None:
        name = place.sources[model]
        own = next(source for source in place.slice["sources"] if source["model"] == model)
        scopes.insert(0, own.get("parameters"))
    for scope in scopes:
        found = _setting((scope or {}).get(key), name, place.along)
        if found is not None:
            return found
    return _DEFAULTS[key]


def _setting(setting: Any, name: str, along: float) -> Any:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not any(isinstance(part, Mapping) for part in setting):
        place = along * (len(setting) - 1)
        below = math.floor(place)
        above = min(below + 1, len(setting) - 1)
        return (1 - (place - below)) * setting[below] + (place - below) * setting[above]
    for part in setting:
        if part.get("filter", "*") == "*" or part["filter"] in name:
            return _setting(part["value"], name, along)
    return None
