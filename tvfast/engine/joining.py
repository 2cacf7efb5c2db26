"""Slices of several models: whether what they are cut from makes one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tvfast.checkpoint.stored import Stored
from tvfast.errors import DTypeError, ShapeError, StateDictError
from tvfast.recipe import Recipe

_MOST = 4  # names in a message


@dataclass(frozen=True, slots=True)
class Body:
    """What one model is made of.

    Attributes:
        model: as the recipe calls it.
        outside: what is in no layer, by name.
        inside: what layers hold, by the rest of the name, of every layer that has it.
    """

    model: str
    outside: Mapping[str, Stored]
    inside: Mapping[str, list[Stored]]


def check_joined(recipe: Recipe, first: Body, other: Body) -> None:
    """Raise unless layers of the other can follow those of the first.

    Raises:
        StateDictError: they have different tensors, and the recipe does not say what that means.
        ShapeError: tensors of one name have different shapes, where all layers of each have one.
        DTypeError: they store codes in different ways, of which a configuration can tell one.
    """
    where = f"{recipe.where}: slices: {first.model} and {other.model}"
    if recipe.on_missing == "error":
        _check_names(f"{where} have different tensors outside of the layers", first.outside, other.outside)
        _check_names(f"{where} have different tensors in their layers", first.inside, other.inside)
    for name in (name for name in first.outside if name in other.outside):
        mine, its = first.outside[name].shape, other.outside[name].shape
        if recipe.tokenizer is not None and mine[1:] == its[1:]:
            continue  # rows are found by token
        if mine != its:
            raise ShapeError(_shapes(where, name, mine, its))
    for name in (name for name in first.inside if name in other.inside):
        shapes = [{stored.shape for stored in body.inside[name]} for body in (first, other)]
        if shapes[0] != shapes[1] and all(len(found) == 1 for found in shapes):
            raise ShapeError(_shapes(where, name, *map(_only, shapes)))
        ways = [{_coding(stored) for stored in body.inside[name]} for body in (first, other)]
        if recipe.output_dtype is None and ways[0] != ways[1]:
            raise DTypeError(
                f"{where} store tensors {name!r} of their layers in different ways: "
                f"{_listed(sorted(ways[0]))}, {_listed(sorted(ways[1]))}; expected one, which config.json "
                "tells. Add `dtype: bfloat16`, which makes numbers of codes."
            )


def _check_names(where: str, first: Iterable[str], other: Iterable[str]) -> None:
    mine, its = set(first), set(other)
    if mine == its:
        return
    lacking = [name for name in first if name not in its]
    besides = [name for name in other if name not in mine]
    found = [f"{verb} {_listed(names)}" for verb, names in (("lacks", lacking), ("has", besides)) if names]
    raise StateDictError(
        f"{where}: the second {' and '.join(found)}. Expected those of one architecture, because the output "
        "has one configuration; `tvfast: {on_missing: base}` joins them nevertheless."
    )


def _shapes(where: str, name: str, mine: tuple[int, ...], its: tuple[int, ...]) -> str:
    return (
        f"{where} do not fit together: {name!r} has shape {list(mine)} in the first, {list(its)} in the "
        "second; expected equal ones. If only the vocabularies differ, add `tokenizer: {source: union}`."
    )


def _coding(stored: Stored) -> str:
    """How a tensor's numbers are coded; all plain ones alike."""
    blocks = stored.blocks
    if blocks is None:
        return "plain numbers"
    if blocks.factors is None:
        return f"{stored.dtype} codes"
    named = blocks.factors.name.rpartition(".")[2]
    return f"{stored.dtype} codes with {named} of {blocks.rows} x {blocks.columns}"


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    return ", ".join(listed[:_MOST]) + more


def _only(found: set[tuple[int, ...]]) -> tuple[int, ...]:
    (one,) = found
    return one
