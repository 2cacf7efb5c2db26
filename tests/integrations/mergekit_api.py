"""mergekit's own functions, of either version, as `cases` calls them. Imported by mergekit's interpreter."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_METHODS = "mergekit.merge_methods"


def _sparsify(tensor: Tensor, density: float, kind: str, norm: str | None, own: dict[str, Any]) -> Tensor:
    module = importlib.import_module("mergekit.sparsify")
    rescale = None if norm is None else module.RescaleNorm(norm)
    found: Tensor = module.sparsify(
        tensor, density, module.SparsificationMethod(kind), rescale_norm=rescale, **own
    )
    return found


def _karcher(models: list[Tensor]) -> Tensor:
    module = importlib.import_module(f"{_METHODS}.karcher")
    found: Tensor = module.karcher_merge_tensors(models, [1.0 / len(models)] * len(models))
    return found


def api() -> Any:
    return _old() if version("mergekit") == "0.1.4" else _new()


def _new() -> Any:
    base_module = importlib.import_module(f"{_METHODS}.base")
    registry = importlib.import_module(f"{_METHODS}.registry")

    def run(name: str, base: Tensor, models: list[Tensor], parameters: dict[str, Any]) -> Tensor:
        group = base_module.TensorGroup.from_tensors([base, *models], base_index=0, name="tensor")
        (found,) = registry.get(name)((group,), parameters=parameters)
        return found  # type: ignore[no-any-return]

    def spherical(name: str, base: Tensor | None, models: list[Tensor], weights: list[float]) -> Tensor:
        index = None if base is None else 0
        group = base_module.TensorGroup.from_tensors(
            models if base is None else [base, *models], base_index=index
        )
        (found,) = registry.get(name)((group,), parameters={"weight": weights})
        return found  # type: ignore[no-any-return]

    return SimpleNamespace(
        spherical=spherical,
        karcher=_karcher,
        task_vectors=run,
        sparsify=_sparsify,
        slerp=lambda t, a, b: run("slerp", a, [b], {"t": t}),
        sce=lambda base, models, share: run("sce", base, models, {"select_topk": share}),
        model_stock=lambda base, models: run("model_stock", base, models, {}),
    )


def _old() -> Any:
    arithmetic = importlib.import_module(f"{_METHODS}.generalized_task_arithmetic")
    registry = importlib.import_module(f"{_METHODS}.registry")
    stock = importlib.import_module(f"{_METHODS}.model_stock")
    slerp = importlib.import_module(f"{_METHODS}.slerp")
    weight = SimpleNamespace(name="tensor", is_embed=False, optional=False)

    def task_vectors(name: str, base: Tensor, models: list[Tensor], parameters: dict[str, Any]) -> Tensor:
        method = registry.REGISTERED_MERGE_METHODS[name]
        defaults = {
            one.name: one.default_value for one in (*method.parameters(), *method.tensor_parameters())
        }
        chosen = defaults | parameters
        names = [one.name for one in method.tensor_parameters()]
        own = {
            index: {
                key: chosen[key][index] if isinstance(chosen[key], list) else chosen[key] for key in names
            }
            for index in range(len(models))
        }
        rescale = arithmetic.RescaleNorm.l1 if chosen["rescale"] else None
        task = arithmetic.GTATask.model_construct(
            method=method,
            base_model="base",
            weight_info=weight,
            tensor_parameters=SimpleNamespace(data=own),
            int8_mask=False,
            normalize=chosen["normalize"],
            lambda_=chosen["lambda"],
            rescale_norm=rescale,
        )
        return task.execute(tensors={"base": base, **dict(enumerate(models))})  # type: ignore[no-any-return]

    def model_stock(base: Tensor, models: list[Tensor]) -> Tensor:
        task = stock.ModelStockMergeTask.model_construct(base_model="base", weight_info=weight)
        return task.execute({"base": base, **dict(enumerate(models))})  # type: ignore[no-any-return]

    return SimpleNamespace(
        task_vectors=task_vectors,
        karcher=_karcher,
        sparsify=_sparsify,
        slerp=lambda t, a, b: torch.as_tensor(slerp.slerp(t, a, b)),
        model_stock=model_stock,
    )
