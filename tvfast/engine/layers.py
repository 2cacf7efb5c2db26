"""Layers, found from the names of tensors: no list of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"((?:.*?\.)?)(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LANGUAGE = ("text", "language", "llm", "decoder")  # in the names of nested configurations
_COUNTED = ("layer", "depth", "block")
_SPELLINGS = {"language": "text", "llm": "text", "visual": "vision", "image": "vision"}

# The head; what comes before the layers is everything else that has one of the words of _FIRST in its name.
_HEAD = "embed_out"
_FIRST = ("embed", "wte", "wpe", "emb_ln", "tok_")


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor inside a layer: `prefix` + `layer` + "." + `suffix` is its name."""

    prefix: str
    layer: int
    suffix: str


@dataclass(frozen=True, slots=True)
class LayerCount:
    """How many layers a configuration declares, and under which keys."""

    keys: tuple[str, ...]
    n_layers: int


def place(name: str) -> Placed | None:
    """The layer of a tensor: the first component of its name that is a number and not the last."""
    match = _LAYER.fullmatch(name)
    return None if match is None else Placed(match[1], int(match[2]), match[3])


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Stacks of layers: prefix -> number of layers, of prefixes followed by 0, 1, 2 ... without a gap."""
    found: dict[str, set[int]] = {}
    for name in names:
        placed = place(name)
        if placed is not None:
            found.setdefault(placed.prefix, set()).add(placed.layer)
    return {prefix: len(layers) for prefix, layers in found.items() if max(layers) + 1 == len(layers)}


def gradient_stacks(names: Iterable[str], config: Mapping[str, Any] | None) -> dict[str, int]:
    """The stacks along which gradients run: those as long as the configuration says of some stack.

    Without a configuration, or where it fits none, all of them.
    """
    found = stacks(names)
    declared = {n_layers for _, n_layers in counts(config or {})}
    fitting = {prefix: n for prefix, n in found.items() if n in declared}
    return fitting or found


def position(name: str, found: Mapping[str, int]) -> float:
    """Where the layer of a tensor is in its stack, 0 to 1: 1 in a stack of one, 0 outside of layers."""
    placed = place(name)
    if placed is None or placed.prefix not in found:
        return 0.0
    return share(placed.layer, found[placed.prefix])


def share(offset: int, n_layers: int) -> float:
    """Position of one of `n_layers` layers, from 0 to 1."""
    return offset / (n_layers - 1) if n_layers > 1 else 1.0


def layer_count(config: Mapping[str, Any] | None) -> LayerCount | None:
    """What `num_hidden_layers`, or a key of the same meaning, says of the model or of its language part."""
    for keys, part in _nested(config or {}):
        for key in _COUNTS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return LayerCount((*keys, key), value)
    return None


def parts_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those in it, that of the language part first."""
    return (part for _, part in _nested(config))


def _nested(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    nested = [(key, value) for key, value in config.items() if isinstance(value, Mapping)]
    nested.sort(key=lambda item: not any(word in item[0] for word in _LANGUAGE))
    yield (), config
    yield from (((key,), value) for key, value in nested)


def is_first(name: str, main: str, found: Mapping[str, int]) -> bool:
    """Whether a tensor outside of the main stack comes before it: embeddings, and all of other stacks."""
    placed = place(name)
    if placed is not None and placed.prefix in found and placed.prefix != main:
        return True
    return _HEAD not in name and any(word in name for word in _FIRST)


def counts(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every number in a configuration, nested ones too, that may count layers, with its keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from counts(value, (*above, key))
        elif isinstance(value, int) and any(word in key for word in _COUNTED):
            yield (*above, key), value


def words(name: str) -> set[str]:
    """What a name is made of, in one spelling: `language_model` and `text_config` share `text`."""
    return {_SPELLINGS.get(word, word) for word in re.split(r"[._]", name)}
