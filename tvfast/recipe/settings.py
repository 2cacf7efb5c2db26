"""Values of parameters: a number, a gradient over the layers, or a choice by tensor name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvfast.recipe.document import Scalar, Value

_TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "off", "0"})
_CONDITION = ("filter", "value")


@dataclass(frozen=True, slots=True)
class Setting:
    """One parameter as a recipe gives it at one level.

    Attributes:
        choices: (filter, values) in order. The first whose filter is None or part of the tensor's name
            counts; several values are a gradient over the layers.
        flag: values are booleans, not numbers, and a gradient goes in steps.
    """

    choices: tuple[tuple[str | None, tuple[float, ...]], ...]
    flag: bool

    @property
    def constant(self) -> bool:
        """Whether neither tensor nor layer matters."""
        return len(self.choices) == 1 and self.choices[0][0] is None and len(self.choices[0][1]) == 1

    @property
    def values(self) -> set[float]:
        """Every number in it."""
        return {value for _, values in self.choices for value in values}

    def at(self, name: str, t: float) -> float | None:
        """The value for a tensor; None where no choice fits.

        Args:
            name: of the tensor.
            t: position of its layer, from 0 to 1.
        """
        for part, values in self.choices:
            if part is None or part in name:
                return values[0] if len(values) == 1 else self._between(values, t)
        return None

    def _between(self, values: tuple[float, ...], t: float) -> float:
        """Linear between neighbours; of flags, the one on the left."""
        scaled = t * (len(values) - 1)
        if self.flag:
            return values[int(scaled)]
        left = min(int(scaled), len(values) - 2)
        share = scaled - left
        return (1.0 - share) * values[left] + share * values[left + 1]


def read_setting(value: Value, *, flag: bool) -> Setting:
    """The setting that a recipe gives.

    Args:
        value: a scalar, a list of them, `{filter, value}` or a list of those.
        flag: true and false are expected, not numbers.

    Raises:
        RecipeError: anything else, a number that is not finite, or an empty list.
    """
    plain = value.plain
    if isinstance(plain, dict):
        return Setting((_choice(value, flag),), flag)
    if isinstance(plain, tuple):
        items = value.sequence("a list")
        if items and all(isinstance(item.plain, dict) for item in items):
            return Setting(tuple(_choice(item, flag) for item in items), flag)
    return Setting(((None, _values(value, flag)),), flag)


def _choice(value: Value, flag: bool) -> tuple[str | None, tuple[float, ...]]:
    found = value.mapping(_CONDITION)
    if "value" not in found:
        raise value.error("has no 'value'; expected filter and value, or value alone.")
    part = None
    if "filter" in found and found["filter"].plain is not None:
        part = found["filter"].plain
        if not isinstance(part, str):
            raise found["filter"].expected("a part of a tensor name; put it in quotes")
    return (None if part == "*" else part), _values(found["value"], flag)


def _values(value: Value, flag: bool) -> tuple[float, ...]:
    read = _flag if flag else _number
    if not isinstance(value.plain, tuple):
        return (read(value),)
    if not value.plain:
        raise value.expected("one value at least")
    return tuple(read(item) for item in value.sequence("a list"))


def _number(value: Value) -> float:
    """A finite number; texts such as `1e-3`, which YAML 1.1 does not read as numbers, are."""
    what = "a number, a list of numbers, or a list of {filter, value}"
    plain: Scalar | tuple[object, ...] | dict[str, object] = value.plain
    if not isinstance(plain, int | float | str):
        raise value.expected(what)
    try:
        number = float(plain)
    except (ValueError, OverflowError):
        raise value.expected(what) from None
    if not math.isfinite(number):
        raise value.expected("a finite number")
    return number


def _flag(value: Value) -> bool:
    """true or false, also as the words and digits that YAML and mergekit take for them."""
    plain = value.plain
    word = plain.lower() if isinstance(plain, str) else plain
    if isinstance(word, bool | int | float):
        if word in (0, 1):
            return bool(word)
    elif isinstance(word, str):
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    raise value.expected("true or false")
