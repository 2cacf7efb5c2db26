"""Recipes at points: the same document with other numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from tvfast.recipe import Recipe
from tvfast.recipe.document import from_mapping
from tvfast.recipe.parsing import read_recipe


class Axis(Protocol):
    """What a number of a point replaces."""

    @property
    def name(self) -> str: ...
    @property
    def parameter(self) -> str: ...
    @property
    def model(self) -> int | None: ...


def at_point(recipe: Mapping[str, Any], axes: Iterable[Axis], point: Mapping[str, float]) -> dict[str, Any]:
    """A recipe's mapping with the numbers of a point.

    A parameter of the whole recipe replaces those of single models and slices, too; those of `name[k]` are
    put in last, so that both together mean "all, but model k".
    """
    found = copy.deepcopy(dict(recipe))
    ordered = sorted(axes, key=lambda axis: axis.model is not None)
    for axis in ordered:
        number: float = point[axis.name]
        if axis.parameter == "seed":
            found["tvfast"] = {
                **(found.get("tvfast") or {}),
                "seed": int(number) if number == int(number) else number,
            }
        elif axis.model is None:
            for holder in _holders(found):
                _parameters(holder).pop(axis.parameter, None)
            _parameters(found)[axis.parameter] = number
        else:
            _parameters(found["models"][axis.model])[axis.parameter] = number
    return found


def checked_recipe(recipe: Mapping[str, Any], where: str) -> Recipe:
    """A mapping as a recipe.

    Raises:
        RecipeError, UnknownNameError: it is none.
    """
    return read_recipe(from_mapping(recipe, where), json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")


def _holders(recipe: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Everything below a recipe that has parameters of its own."""
    for key in ("models", "slices", "sources"):
        for item in recipe.get(key) or ():
            if isinstance(item, dict):
                yield item
                yield from _holders(item)


def _parameters(holder: dict[str, Any]) -> dict[str, Any]:
    """Its parameters, a mapping of its own from now on; empty ones where it had none."""
    if not isinstance(holder.get("parameters"), dict):
        holder["parameters"] = {}
    found: dict[str, Any] = holder["parameters"]
    return found
