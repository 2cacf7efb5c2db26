"""Values of a recipe that are integers, sizes in bytes, ranges of layers, storage types or lists of names."""

from __future__ import annotations

import re

from tvfast.dtypes import BY_RECIPE_NAME
from tvfast.recipe.document import Value

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmbgt]|[kmgt]i?b)?\s*", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "b": 3, "g": 3, "t": 4}
_MOST_BYTES = 2**62
_WHAT_SIZE = "a size such as 5B, 500M, 2GB or a number of bytes"


def layer_range(value: Value) -> tuple[int, int]:
    what = "[first, one past the last], two integers"
    items = value.sequence(what)
    if len(items) != 2:
        raise value.expected(what)
    first, last = (_integer(item) for item in items)
    if not 0 <= first < last:
        raise value.error(f"is [{first}, {last}]; expected 0 <= first < last, counted from 0.")
    return first, last


def _integer(value: Value) -> int:
    plain = value.plain
    if isinstance(plain, str) and re.fullmatch(r"\s*[+-]?\d{1,9}\s*", plain):
        plain = int(plain)
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise value.expected("an integer")
    return plain


def n_bytes(value: Value) -> int:
    """Bytes; the suffixes k, m and b are mergekit's: thousand, million and billion."""
    plain = value.plain
    if isinstance(plain, str):
        match = _SIZE.fullmatch(plain)
        if match is None:
            raise value.expected(_WHAT_SIZE)
        unit = (match[2] or "").lower()
        factor = (1024 if "i" in unit else 1000) ** _POWERS.get(unit[:1], 0)
        plain = round(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise value.expected(_WHAT_SIZE)
    if not 1 <= plain <= _MOST_BYTES:
        raise value.error(f"is {plain} bytes; expected at least 1 and at most {_MOST_BYTES}.")
    return plain


def dtype(value: Value | None) -> str | None:
    """The safetensors name of a storage type; None: not given."""
    if value is None or value.plain is None:
        return None
    what = f"one of {', '.join(BY_RECIPE_NAME)}"
    word = value.text(what).removeprefix("torch.")
    if word not in BY_RECIPE_NAME:
        raise value.expected(what)
    return BY_RECIPE_NAME[word]


def seed(value: Value | None) -> int:
    """An integer of 64 bits, 0 where there is none."""
    if value is None or value.plain is None:
        return 0
    found = value.plain
    if isinstance(found, bool) or not isinstance(found, int) or not -(2**63) <= found < 2**64:
        raise value.expected("an integer of 64 bits")
    return found


def beginnings(value: Value) -> tuple[str, ...]:
    """Beginnings of tensors' names: one, or a list of them."""
    what = "the beginning of tensors' names such as model.visual, or a list of them"
    if isinstance(value.plain, str):
        return (value.text(what),)
    items = value.sequence(what)
    if not items:
        raise value.expected(what)
    return tuple(item.text(what) for item in items)
