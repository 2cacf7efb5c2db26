"""Merges at points: into live weights where the recipe allows, as files otherwise."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import tvfast
from tvfast.live import LiveMerge
from tvfast.methods import ProgramMethod
from tvfast.recipe import Recipe, Resolver
from tvfast.sweeping.loading import check_finite, load_module, load_tensors
from tvfast.sweeping.table import FILES, NEW, REUSED

_MOST_REMEMBERED = 8
"""Settings whose thresholds are kept; methods that draw by rank keep a bit per entry and task for each."""


class Merges(Protocol):
    """What hands the function one merge after another."""

    def at(self, recipe: Recipe) -> tuple[Any, str]:
        """The merge by a recipe, valid until the next call, and how it was made."""

    def close(self) -> None:
        """Removes what only the function was to see."""


def why_files(recipe: Recipe) -> str | None:
    """Why a recipe cannot be merged into live weights; None: it can."""
    part = recipe.slices[0]
    reasons = {
        "it has slices": recipe.stacked,
        "it has modules": bool(recipe.modules),
        "it has several stages": bool(recipe.stages),
        "it changes the vocabulary": recipe.tokenizer is not None,
        "it has adapters": bool(recipe.adapters),
        "models may lack tensors": recipe.on_missing != "error",
        "models may lack statistics": recipe.on_missing_stats != "error",
        "it compares with an instruct model": recipe.instruct is not None,
        "numbers differ between layers or tensors": not Resolver(recipe, 0).is_constant(part),
    }
    for reason, stands in reasons.items():
        if stands:
            return reason
    method = _method(recipe, recipe.seed)
    if not isinstance(method, ProgramMethod):
        return f"{recipe.method!r} solves equations for whole tensors"
    if "weights" in method.unused or "weights" not in _names(method):
        return f"{recipe.method!r} has no weights"
    return None


class LiveMerges:
    """Base and models in memory, merged into one set of live weights again and again.

    A `LiveMerge` is kept for every setting of what coefficients do not change, so its thresholds are measured
    once: two points whose methods differ in weights and scale alone share one.

    Args:
        recipe: at any point; its models are loaded.
        as_module: whether transformers' model is given, otherwise tensors by name.
        device, threads: where to merge.

    Raises:
        CheckpointError: a model cannot be read, or is not finite where the recipe does not let that pass.
    """

    def __init__(self, recipe: Recipe, *, as_module: bool, device: str, threads: int) -> None:
        part = recipe.slices[0]
        operands = Resolver(recipe, 0).operands(part)
        paths = [part.sources[k].model for k in operands]
        stats = [part.sources[k].stats for k in operands]
        self._stats = [path for path in stats if path is not None] or None
        self._threads, self._as_module = threads, as_module
        self._models = [_state(path, recipe, as_module, device) for path in paths]
        base = None if part.base is None else part.sources[part.base].model
        self._base = _state(base, recipe, as_module, device) if recipe.reads_base and base else None
        self._live = _live(recipe, self._base or self._models[0], as_module, device)
        self._merges: OrderedDict[Hashable, LiveMerge] = OrderedDict()

    def at(self, recipe: Recipe) -> tuple[Any, str]:
        method = _method(recipe, recipe.seed)
        settings = {name: getattr(method, name) for name in _names(method)}
        weights, scale = settings.pop("weights"), settings.pop("scale", 1.0)
        key = (recipe.method, *sorted(settings.items(), key=lambda item: item[0]))
        live = self._merges.get(key)
        made = REUSED
        if live is None:
            made, live = NEW, self._new(recipe.method, settings)
            self._merges[key] = live
            if len(self._merges) > _MOST_REMEMBERED:
                self._merges.popitem(last=False)
        self._merges.move_to_end(key)
        live.set(1.0 if weights is None else weights, scale=scale)
        if isinstance(self._live, nn.Module):
            return self._live.eval(), made
        return dict(self._live), made

    def close(self) -> None:
        self._merges.clear()

    def _new(self, method: str, settings: Mapping[str, Any]) -> LiveMerge:
        return LiveMerge(
            self._live,
            models=self._models,
            method=method,
            base=self._base,
            stats=self._stats,
            n_threads=self._threads,
            **settings,
        )


class FileMerges:
    """Every merge as a checkpoint in one folder, which the next one replaces.

    Args:
        folder: of the checkpoint.
        receives: "model", "state_dict" or "folder": what the function is given of it.
        device: where what is read goes; threads: of the merge.
    """

    def __init__(self, folder: Path, *, receives: str, device: str, threads: int) -> None:
        self._folder, self._receives, self._device, self._threads = folder, receives, device, threads

    def at(self, recipe: Recipe) -> tuple[Any, str]:
        tvfast.merge_checkpoints(
            recipe, self._folder, device=self._device, threads=self._threads, overwrite=True
        )
        if self._receives == "folder":
            return str(self._folder), FILES
        if self._receives == "model":
            return load_module(str(self._folder), recipe.output_dtype, self._device), FILES
        return load_tensors(str(self._folder), self._device), FILES

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _method(recipe: Recipe, seed: int) -> Any:
    """The method of every tensor of a recipe whose numbers do not differ between tensors."""
    part = recipe.slices[0]
    return Resolver(recipe, seed).method(part, [""] * len(part.sources), "", 0.0)


def _names(method: Any) -> list[str]:
    return [parameter.name for parameter in method.info.parameters]


def _state(path: str, recipe: Recipe, as_module: bool, device: str) -> dict[str, Tensor]:
    """A model's tensors as they are stored."""
    if as_module:
        found = {
            name: tensor.detach() for name, tensor in load_module(path, None, device).state_dict().items()
        }
    else:
        found = load_tensors(path, device)
    if recipe.nonfinite == "error":
        check_finite(path, found)
    return found


def _live(
    recipe: Recipe, like: Mapping[str, Tensor], as_module: bool, device: str
) -> nn.Module | dict[str, Tensor]:
    """What merges are written into: of the output's type."""
    if as_module:
        return load_module(recipe.donor, recipe.output_dtype, device).requires_grad_(False)
    dtype = None if recipe.output_dtype is None else _torch(recipe.output_dtype)
    return {
        name: tensor.to(dtype, copy=True) if tensor.is_floating_point() and dtype else tensor.clone()
        for name, tensor in like.items()
    }


def _torch(dtype: str) -> torch.dtype:
    from tvfast.sweeping.loading import TORCH

    return TORCH[dtype]
