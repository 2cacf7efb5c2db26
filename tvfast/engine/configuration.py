"""The `config.json` of the output: the donor's, with what a merge changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvfast.checkpoint.reading import Checkpoint
from tvfast.engine.layers import counts, layer_count, parts_of, words
from tvfast.engine.modules import ModuleRows
from tvfast.errors import RecipeError
from tvfast.recipe import Module, Recipe, Slice

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
    for counted in list(_counted(config, recipe, checkpoints)):  # all are found before any is changed
        _set_layers(config, counted, checkpoints)
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


@dataclass(frozen=True, slots=True)
class _Counted:
    """A number of a configuration that says how many layers there are, and the slices that change it."""

    keys: tuple[str, ...]
    n_layers: int
    slices: tuple[Slice, ...]
    keys_in: Callable[[Mapping[str, Any]], tuple[str, ...] | None]  # of another model


def _counted(
    config: Mapping[str, Any], recipe: Recipe, checkpoints: Mapping[str, Checkpoint]
) -> Iterator[_Counted]:
    """
    Raises:
        RecipeError: which number counts a module's layers cannot be told, or one counts those of two modules.
    """
    if recipe.modules:
        rows = ModuleRows(recipe, checkpoints)
        outputs: dict[tuple[str, ...], int] = {}
        for module in recipe.modules:
            n_layers = rows.n_layers(module, donor_of(recipe, checkpoints)) if module.stacked else None
            keys = None if n_layers is None else _keys_of(config, module, n_layers, recipe)
            if keys is not None and n_layers is not None:
                n_output = _n_output(module)
                other = outputs.setdefault(keys, n_output)
                if other != n_output:
                    raise RecipeError(
                        f"{recipe.where}: {module.place}: makes {n_output} layers and another {other}, "
                        f"and config.json may count both as {'.'.join(keys)}; expected as many in both."
                    )
                yield _Counted(keys, n_layers, module.slices, partial(_same_keys, keys))
        return
    count = layer_count(config)
    if recipe.stacked and count is not None:
        yield _Counted(count.keys, count.n_layers, recipe.slices, _keys_of_count)


def _n_output(module: Module) -> int:
    return sum(part.n_layers or 0 for part in module.slices)


def _keys_of_count(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    count = layer_count(config)
    return None if count is None else count.keys


def _same_keys(keys: tuple[str, ...], config: Mapping[str, Any]) -> tuple[str, ...] | None:
    part: Any = config
    for key in keys[:-1]:
        part = part.get(key) if isinstance(part, Mapping) else None
    return keys if isinstance(part, Mapping) else None


def _keys_of(
    config: Mapping[str, Any], module: Module, n_layers: int, recipe: Recipe
) -> tuple[str, ...] | None:
    """Where a configuration counts the layers of a module; None: nowhere.

    Among several numbers that are right, those count that are called as the module is, and not as another.

    Raises:
        RecipeError: the number of layers changes, and several numbers may say it.
    """
    n_output = _n_output(module)
    found = [keys for keys, value in counts(config) if value == n_layers]
    others = {word for other in recipe.modules if other is not module for word in words(other.name)}
    own = words(module.name)
    scores = {keys: len(own & words(".".join(keys))) for keys in found}
    best = [keys for keys in found if scores[keys] == max(scores.values())]
    best = [keys for keys in best if scores[keys] or not others & words(".".join(keys))]
    if len(best) > 1 and n_output != n_layers:
        listed = ", ".join(".".join(keys) for keys in best)
        raise RecipeError(
            f"{recipe.where}: {module.place}: makes {n_output} layers of {n_layers}, and config.json may "
            f"count them as {listed}; expected one number that does. Keep the number of layers."
        )
    return best[0] if len(best) == 1 else None


def _set_layers(config: dict[str, Any], counted: _Counted, checkpoints: Mapping[str, Checkpoint]) -> None:
    """The number of layers, and the lists that say something of every layer."""
    part = _part(config, counted.keys)
    origins = [
        (source.model, layer)
        for piece in counted.slices
        for source in (piece.sources[piece.reference],)
        for layer in range(*(source.layers or (0, 0)))
    ]
    for key, value in part.items():
        if (
            isinstance(value, list)
            and len(value) == counted.n_layers
            and any(word in key for word in _PER_LAYER)
        ):
            part[key] = _gathered(key, value, origins, counted, checkpoints)
    part[counted.keys[-1]] = len(origins)


def _gathered(
    key: str,
    value: list[Any],
    origins: Sequence[tuple[str, int]],
    counted: _Counted,
    checkpoints: Mapping[str, Checkpoint],
) -> list[Any]:
    """One entry per layer of the output, each from the model that the layer comes from."""
    lists: dict[str, list[Any]] = {}
    for model in {model for model, _ in origins}:
        config = checkpoints[model].config
        keys = None if config is None else counted.keys_in(config)
        own = _part(config, keys).get(key) if config is not None and keys is not None else None
        lists[model] = own if isinstance(own, list) else value
    if any(layer >= len(lists[model]) for model, layer in origins):
        return value
    return [lists[model][layer] for model, layer in origins]


def _part(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The configuration that the last of `keys` is in."""
    for key in keys[:-1]:
        config = config[key]
    return config
