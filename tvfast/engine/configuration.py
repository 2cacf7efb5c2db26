"""The `config.json` of the output: the donor's, with what a merge changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from tvfast.checkpoint.reading import Checkpoint
from tvfast.engine.layers import layer_count, parts_of
from tvfast.recipe import Recipe

_DTYPES = ("torch_dtype", "dtype")
_VOCABULARY = "vocab_size"
_PER_LAYER = ("layer", "block")  # in the names of lists with one entry per layer


def donor_of(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str:
    """The model whose configuration the output takes: the base, or the first input, that has one."""
    paths = (path for path in recipe.model_paths() if checkpoints[path].config is not None)
    return next(paths, recipe.donor)


def patched_config(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], dtype: str | None, n_tokens: int | None = None
) -> dict[str, Any] | None:
    """The donor's configuration for the output.

    Args:
        dtype: most of the output's storage type, as `config.json` calls it; None: leave it.
        n_tokens: rows of its matrices by token; None: as many as the donor has.

    Returns:
        A new dict; None where no model has a configuration.
    """
    config = checkpoints[donor_of(recipe, checkpoints)].config
    if config is None:
        return None
    config = copy.deepcopy(config)
    if dtype is not None:
        _set_dtype(config, dtype)
    if n_tokens is not None:
        _set_vocabulary(config, n_tokens)
    if recipe.stacked:
        _set_layers(config, recipe, checkpoints)
    return config


def vocabulary_size(config: Mapping[str, Any] | None) -> int | None:
    """How many tokens a model, or its language part, has rows for; None: the configuration does not say."""
    for part in parts_of(config or {}):
        value = part.get(_VOCABULARY)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def ties_embeddings(config: Mapping[str, Any] | None) -> bool:
    """Whether a model reads its head from its embeddings."""
    parts = [config or {}, *(part for part in (config or {}).values() if isinstance(part, Mapping))]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def _set_vocabulary(config: dict[str, Any], n_tokens: int) -> None:
    """Wherever the old number is."""
    before = vocabulary_size(config)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    having = [part for part in parts if before is not None and part.get(_VOCABULARY) == before]
    for part in having or [config]:
        part[_VOCABULARY] = n_tokens


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    n_set = 0
    for part in parts:
        for key in _DTYPES:
            if key in part:
                part[key] = dtype
                n_set += 1
    if not n_set:
        config[_DTYPES[0]] = dtype


def _set_layers(config: dict[str, Any], recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
    """The number of layers, and the lists that say something of every layer."""
    count = layer_count(config)
    if count is None:
        return
    part = _part(config, count.keys)
    origins = [
        (source.model, layer)
        for piece in recipe.slices
        for source in (piece.sources[piece.reference],)
        for layer in range(*(source.layers or (0, 0)))
    ]
    for key, value in part.items():
        if (
            isinstance(value, list)
            and len(value) == count.n_layers
            and any(word in key for word in _PER_LAYER)
        ):
            part[key] = _gathered(key, value, origins, checkpoints)
    part[count.keys[-1]] = len(origins)


def _gathered(
    key: str, value: list[Any], origins: Sequence[tuple[str, int]], checkpoints: Mapping[str, Checkpoint]
) -> list[Any]:
    """One entry per layer of the output, each from the model that the layer comes from."""
    lists: dict[str, list[Any]] = {}
    for model in {model for model, _ in origins}:
        config = checkpoints[model].config
        count = layer_count(config)
        own = _part(config, count.keys).get(key) if config is not None and count is not None else None
        lists[model] = own if isinstance(own, list) else value
    if any(layer >= len(lists[model]) for model, layer in origins):
        return value
    return [lists[model][layer] for model, layer in origins]


def _part(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The configuration that the last of `keys` is in."""
    for key in keys[:-1]:
        config = config[key]
    return config
