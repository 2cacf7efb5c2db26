"""mergekit's `run_merge` through `tvfast.merge_checkpoints`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tvfast
from tvfast.dtypes import BY_RECIPE_NAME
from tvfast.errors import CheckpointError, RecipeError, UnknownNameError
from tvfast.integrations._patching import Function, Integration, NotServed
from tvfast.recipe import Recipe


def run_merge(integration: Integration) -> Function:
    """Reads, merges and writes; what the engine refuses before it reads is left to mergekit."""

    def run(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> None:
        if not integration.options.get("engine"):
            raise NotServed("engine=False")
        for option, wanted in _SERVED.items():
            if getattr(options, option, wanted) != wanted:
                raise NotServed(f"the option {option}")
        with TemporaryDirectory(prefix="tvfast-") as folder:
            path = Path(folder) / "mergekit_config.yml"
            path.write_text(merge_config.to_yaml(), encoding="utf-8")
            try:
                recipe = _with_options(tvfast.load_recipe(path), options)
                tvfast.plan(recipe)
            except (RecipeError, UnknownNameError, CheckpointError) as error:
                raise NotServed(f"the engine: {error}") from error
            tvfast.merge_checkpoints(
                recipe,
                out_path,
                device=_device(options),
                threads=getattr(options, "num_threads", None) or 0,
                overwrite=True,
                seed=getattr(options, "random_seed", None),
                nonfinite="propagate",
            )

    return run


# Options that would change what is read or written, where they are not as here.
_SERVED = {"safe_serialization": True, "unsafe_truncate_embeddings": False, "transformers_cache": None}


def _with_options(recipe: Recipe, options: Any) -> Recipe:
    """The recipe with what mergekit keeps apart from it."""
    shard_bytes = getattr(options, "out_shard_size", None)
    merged_as = getattr(options, "lora_merge_dtype", None)
    if merged_as is not None and (name := str(merged_as).removeprefix("torch.")) in BY_RECIPE_NAME:
        recipe = replace(recipe, lora_merge_dtype=BY_RECIPE_NAME[name])
    return replace(
        recipe,
        shard_bytes=shard_bytes or recipe.shard_bytes,
        copy_tokenizer=getattr(options, "copy_tokenizer", True),
        card=getattr(options, "write_model_card", True),
    )


def _device(options: Any) -> str:
    return "cuda" if str(getattr(options, "device", "cpu")).startswith("cuda") else "cpu"
