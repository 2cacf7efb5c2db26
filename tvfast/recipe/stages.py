"""Several recipes in one file: later ones name earlier ones as their models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tvfast.recipe.document import Value, plain_data, shortened
from tvfast.recipe.parsing import read_recipe
from tvfast.recipe.recipe import Recipe

_NAMES = ("name", "out_path")  # mergekit-multi's key, and that of mergekit-mega before it


def read_stages(documents: Sequence[Value], text: str) -> Recipe:
    """The recipe of the result: the one without a name, or the last; it holds those that it needs.

    Args:
        text: of the whole file.

    Raises:
        RecipeError: two of one name, two without, a circle, or a recipe that is wrong by itself.
        UnknownNameError: a method or dialect does not exist.
    """
    named: dict[str, tuple[Value, Recipe]] = {}
    result: tuple[Value, Recipe] | None = None
    for document in documents:
        name = _name(document)
        own_text = json.dumps(plain_data(document), indent=2, ensure_ascii=False) + "\n"
        found = document, read_recipe(document, own_text, name=name or "")
        if name is None:
            if result is not None:
                raise document.error("is the second recipe without a name; expected one, the result.")
            result = found
        elif name in named:
            raise document.error(f"the name {shortened(name)!r} is there twice; expected every name once.")
        else:
            named[name] = found
    if result is None:
        result = named.pop(next(reversed(named)))
    where, last = result
    recipes = {name: recipe for name, (_, recipe) in named.items()}
    order = list(_needed(last, recipes, where))
    unused = [name for name in named if name not in {recipe.name for recipe in order}]
    warnings = [f"{last.where}: {name!r} is not used by the result; it is not merged." for name in unused]
    return replace(last, text=text, name=None, stages=tuple(order), warnings=(*last.warnings, *warnings))


def _name(document: Value) -> str | None:
    entries = document.mapping(what="a mapping with merge_method and models")
    for key in _NAMES:
        if key in entries and entries[key].plain is not None:
            return entries[key].text("a name")
    return None


def _needed(recipe: Recipe, named: Mapping[str, Recipe], where: Value) -> Iterator[Recipe]:
    """The recipes that one needs, each after those that it needs itself.

    Raises:
        RecipeError: one needs itself.
    """
    done: set[str] = set()

    def visit(one: Recipe, above: tuple[str, ...]) -> Iterator[Recipe]:
        for name in one.uses():
            if name in above:
                circle = " -> ".join(map(shortened, (*above[above.index(name) :], name)))
                raise where.error(f"recipes need each other in a circle: {circle}.")
            if name in named and name not in done:
                yield from visit(named[name], (*above, name))
                done.add(name)
                yield named[name]

    return visit(recipe, ())
