"""mergekit's `run_merge` through `tvfast.merge_checkpoints`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tvfast
from tvfast.errors import CheckpointError, RecipeError, UnknownNameError
from tvfast.integrations._patching import Function, Integration, NotServed


def run_merge(integration: Integration) -> Function:
    """Reads, merges and writes; what the engine refuses before it reads is left to mergekit."""

    def run(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> None:
        if not integration.options.get("engine"):
            raise NotServed("engine=False")
        text = config_source or merge_config.to_yaml()
        with TemporaryDirectory(prefix="tvfast-") as folder:
            recipe = Path(folder) / "mergekit_config.yml"
            recipe.write_text(text, encoding="utf-8")
            try:
                tvfast.plan(tvfast.load_recipe(recipe))
            except (RecipeError, UnknownNameError, CheckpointError) as error:
                raise NotServed(f"the engine: {error}") from error
            tvfast.merge_checkpoints(
                recipe,
                out_path,
                device=_device(options),
                overwrite=True,
                seed=getattr(options, "random_seed", None),
                nonfinite="propagate",
            )

    return run


def _device(options: Any) -> str:
    return "cuda" if str(getattr(options, "device", "cpu")).startswith("cuda") else "cpu"
