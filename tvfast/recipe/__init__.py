"""Recipes: mergekit's YAML, checked before any file is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from tvfast.errors import RecipeError
from tvfast.recipe.document import MAX_CHARACTERS, Value, compose_all, from_mapping, plain_data
from tvfast.recipe.keys import OWN_KEYS, method_keys
from tvfast.recipe.parsing import read_recipe
from tvfast.recipe.recipe import Module, Recipe, Slice, Source
from tvfast.recipe.resolution import Resolver
from tvfast.recipe.stages import read_stages
from tvfast.recipe.tokenizer import OtherRow, OwnRow, Tokenizer, TokenRule, ZeroRow

__all__ = [
    "Module",
    "OtherRow",
    "OwnRow",
    "Recipe",
    "Resolver",
    "Slice",
    "Source",
    "TokenRule",
    "Tokenizer",
    "ZeroRow",
    "documents_of",
    "load_recipe",
    "names_in_recipes",
    "parse_recipe",
]


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """A recipe from a file, or from the mapping that such a file would hold.

    Args:
        source: path of a YAML file in UTF-8 of at most 1 MB, or a mapping.

    Returns:
        Everything that the recipe says, checked as far as it can be without the models' files.

    Raises:
        RecipeError: there is no such file, it is no YAML, or no recipe; with file, line and key.
        UnknownNameError: a method or dialect does not exist.

    Notes:
        Paths in a recipe are relative to the working directory; nothing is opened but `source`.
    """
    if isinstance(source, Mapping):
        document = from_mapping(source, "recipe")
        return read_recipe(document, json.dumps(plain_data(document), indent=2, ensure_ascii=False) + "\n")
    path = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(path, str):
        raise RecipeError(
            f"load_recipe got a {type(path).__name__}; expected the path of a YAML file, or a mapping."
        )
    return parse_recipe(_read(path), path)


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML text.

    Args:
        text: one YAML document, or several, of which later ones name earlier ones as their models.
        where: what stands for it in messages, such as its path.

    Raises:
        RecipeError: no YAML, or no recipe; with line and key.
        UnknownNameError: a method or dialect does not exist.
    """
    documents = compose_all(text.removeprefix("\ufeff"), where)
    return read_recipe(documents[0], text) if len(documents) == 1 else read_stages(documents, text)


def documents_of(path: str) -> list[Value]:
    """The YAML documents of a file, unread: for files that hold more than a recipe.

    Raises:
        RecipeError: there is no such file, or it is no YAML; with file and line.
    """
    return compose_all(_read(path).removeprefix("\ufeff"), path)


def names_in_recipes(method: str) -> dict[str, str]:
    """What a recipe calls the parameters of a method, by our names; it cannot give those that are missing.

    Raises:
        KeyError: no such method.
    """
    names = {key.keyword: key.name for key in method_keys(method, "mergekit").values()}
    return {**names, **{name: f"tvfast.{name}" for name in sorted(OWN_KEYS)}}


def _read(path: str) -> str:
    if "\n" in path:
        raise RecipeError("load_recipe got text, not a path; expected the path of a YAML file, or a mapping.")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise RecipeError(f"{path}: {reason}; expected the path of a YAML file.") from None
    except ValueError:
        raise RecipeError(f"{path!r} is no path; expected the path of a YAML file.") from None
    if len(data) > MAX_CHARACTERS:
        raise RecipeError(f"{path}: has more than {MAX_CHARACTERS} bytes; expected a recipe.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is no UTF-8; expected a text file in UTF-8."
        ) from None
