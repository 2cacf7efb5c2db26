"""mergekit 0.1.4: one task per method and tensor."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations._mergekit import karcher, merge_task_vectors, model_stock, slerp_pairs
from tvfast.integrations._patching import Function, Hook, Integration, NotServed, same
from tvfast.integrations._tables import check_served, merge_by, method, number
from tvfast.methods import METHODS
from tvfast.ops._huge_pages import on_huge_pages

_METHODS = "mergekit.merge_methods"
_SPHERICAL = (Hook("karcher", f"{_METHODS}.karcher", "karcher_merge_tensors", same(karcher)),)


def hooks(integration: Integration) -> list[Hook]:
    """What is replaced in this version."""
    return [
        Hook(
            "task_vectors",
            f"{_METHODS}.generalized_task_arithmetic",
            "GTATask.execute",
            lambda original: _execute(integration),
        ),
        Hook("slerp", f"{_METHODS}.slerp", "slerp", same(_slerp)),
        Hook("model_stock", f"{_METHODS}.model_stock", "ModelStockMergeTask.execute", same(_model_stock)),
        *(hook for hook in _SPHERICAL if hook.name in METHODS),
        Hook("sce", f"{_METHODS}.registry", "execute", same(_sce), within=_sce_task),
    ]


def _sce_task(registry: ModuleType) -> Any:
    """The task class that mergekit's decorator made of its function, which no name leads to."""
    make_task = registry.REGISTERED_MERGE_METHODS["sce"].make_task
    return inspect.getclosurevars(inspect.unwrap(make_task)).nonlocals["tt_cls"]


def _operands(task: Any, tensors: dict[Any, Tensor]) -> tuple[Tensor, dict[Any, Tensor]]:
    """The base and the others in order; vocabularies that differ are cut by mergekit itself."""
    if task.base_model not in tensors:
        raise NotServed("no base")
    models = {key: tensor for key, tensor in tensors.items() if key != task.base_model}
    if not models:
        raise NotServed("no task vectors")
    return tensors[task.base_model], models


def _execute(integration: Integration) -> Function:
    def execute(me: Any, tensors: dict[Any, Tensor], **_kwargs: Any) -> Tensor:
        base, models = _operands(me, tensors)
        own = [dict(me.tensor_parameters.data[key].items()) for key in models]
        per_model = {name: [values[name] for values in own] for name in own[0]}
        kind = getattr(me.method.sparsification_method, "value", None)
        if kind is not None:
            _check_counts(kind, per_model, base.numel())
        return merge_task_vectors(
            integration,
            kind,
            me.method.consensus_method,
            base,
            list(models.values()),
            per_model,
            normalize=me.normalize,
            rescale=me.rescale_norm is not None,
            scale=me.lambda_,
        )

    return execute


def _check_counts(kind: str, per_model: dict[str, list[float]], n: int) -> None:
    """Where this version asserts, or keeps nothing because nothing was to be dropped."""
    for index, density in enumerate(per_model["density"]):
        if density >= 1:
            continue
        if kind == "magnitude" and int(density * n) == 0:
            raise NotServed("nothing is kept")
        if kind == "magnitude_outliers":
            n_dropped = min(int(per_model["gamma"][index] * n), n - int(density * n))
            if n_dropped == 0:
                raise NotServed("no outliers are dropped")


def _slerp(t: Any, v0: Any, v1: Any, DOT_THRESHOLD: float = 0.9995, eps: float = 1e-8) -> Tensor:
    if (DOT_THRESHOLD, eps) != (0.9995, 1e-8):
        raise NotServed("thresholds of the caller's")
    with torch.no_grad():  # mergekit leaves autograd through numpy
        check_served([v0, v1])
    if v0.device.type != "cpu":
        raise NotServed("a result that mergekit returns on the CPU")
    first, second = v0.detach(), v1.detach()
    out = on_huge_pages(torch.empty(first.shape, dtype=torch.float32))
    slerp_pairs([number(t, "t")], first.unsqueeze(0), second.unsqueeze(0), out.unsqueeze(0))
    return out


def _model_stock(me: Any, tensors: dict[Any, Tensor]) -> Tensor:
    base, models = _operands(me, tensors)
    if me.filter_wise or len(models) < 2:
        raise NotServed("an angle for every row, or of nothing")
    return model_stock(base, list(models.values()), guard_singular=False)


def _sce(me: Any, tensors: dict[Any, Tensor], **_kwargs: Any) -> Tensor:
    base, models = _operands(me, tensors)
    check_served([base, *models.values()])
    share = number(me.parameters["select_topk"], "select_topk")
    if share <= 0.0:
        raise NotServed("nothing is selected")
    made = method("sce", select_topk=min(share, 1.0), tie="index")
    return merge_by(made, base, list(models.values()))
