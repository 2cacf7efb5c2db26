"""The models of a recipe: checkpoints with the factors of their codes, and with their adapters."""

from __future__ import annotations

from collections.abc import Mapping

from tvfast.checkpoint.adapter import open_adapter, with_adapter
from tvfast.checkpoint.factors import with_factors
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.recipe import Recipe


def open_models(recipe: Recipe, made: Mapping[str, Checkpoint] | None = None) -> dict[str, Checkpoint]:
    """Every checkpoint that a recipe needs, by the names it has there. No tensor is read.

    Args:
        made: by path, those that need not be opened.

    Raises:
        CheckpointError: a checkpoint or adapter that is missing, damaged or incomplete, or codes without
            factors.
        AdapterError: an adapter of another kind, or of another base.
        ShapeError: an adapter's factors do not fit its base.
    """
    bases: dict[str, Checkpoint] = {}
    found: dict[str, Checkpoint] = {}
    for model in recipe.model_paths():
        path, adapter = recipe.parts_of(model)
        if path not in bases:
            found_there = (made or {}).get(path) or open_checkpoint(path)
            bases[path] = with_factors(found_there, missing_is_one=recipe.on_missing_scale == "one")
        found[model] = bases[path]
        if adapter is not None:
            found[model] = with_adapter(bases[path], open_adapter(adapter), dtype=recipe.lora_merge_dtype)
    return found
