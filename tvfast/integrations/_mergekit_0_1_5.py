"""mergekit 0.1.5: groups of tensors with bound parameters, and batches of equal shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations._mergekit import karcher, merge_task_vectors, model_stock, slerp_pairs
from tvfast.integrations._patching import Function, Hook, Integration, NotServed, same
from tvfast.integrations._tables import Merge, check_served, entry, merge_by, method, number, scalars
from tvfast.methods import METHODS
from tvfast.methods.linear import sum_of_weights
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.program import Divisor, Members, Program, Reduce

_METHODS = "mergekit.merge_methods"
_PER_MODEL = ("weight", "density", "gamma", "epsilon")


def hooks(integration: Integration) -> list[Hook]:
    """What is replaced in this version."""
    return [
        Hook(
            "task_vectors",
            f"{_METHODS}.generalized_task_arithmetic",
            "GeneralizedTaskArithmeticMerge.merge_group",
            lambda original: _merge_group(integration),
        ),
        Hook("slerp", f"{_METHODS}.slerp", "slerp", same(_slerp)),
        Hook("linear", f"{_METHODS}.linear", "linear_merge.implementation", same(_linear)),
        Hook("sce", f"{_METHODS}.sce", "sce_merge.implementation", same(_sce)),
        Hook(
            "model_stock",
            f"{_METHODS}.model_stock",
            "model_stock_merge_method.implementation",
            same(_model_stock),
        ),
        *(hook for hook in _SPHERICAL if hook.name in METHODS),
    ]


def _merge_group(integration: Integration) -> Function:
    def merge_group(me: Any, group: Any, /, **parameters: Any) -> Tensor:
        entries = group.non_base
        if not entries:
            raise NotServed("no task vectors")
        return merge_task_vectors(
            integration,
            me.sparsification_method,
            me.consensus_method,
            group.base.tensor,
            [one.tensor for one in entries],
            {key: parameters[key].values_for(entries) for key in _PER_MODEL if key in parameters},
            normalize=parameters["normalize"],
            rescale=parameters["rescale"],
            scale=parameters["lambda"],
        )

    return merge_group


def _slerp(t: Tensor, v0: Tensor, v1: Tensor, dot_threshold: float = 0.9995, eps: float = 1e-8) -> Tensor:
    if (dot_threshold, eps) != (0.9995, 1e-8):
        raise NotServed("thresholds of the caller's")
    check_served([v0, v1])
    if v0.dim() < 1 or not isinstance(t, Tensor) or t.numel() != v0.shape[0]:
        raise NotServed("another number of outputs than of t")
    if t.requires_grad and torch.is_grad_enabled():
        raise NotServed("gradients are recorded")
    ts = [number(value, "t") for value in t.reshape(-1).to(torch.float32).tolist()]
    return slerp_pairs(ts, v0, v1, on_huge_pages(torch.empty_like(v0)))


def _linear(batch: Any, weight: Tensor, normalize: bool = True) -> Tensor:
    tensors: tuple[Tensor, ...] = batch.tensors
    check_served(tensors)
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotServed("gradients are recorded")
    if tensors[0].dim() < 1 or weight.shape != (tensors[0].shape[0], len(tensors)):
        raise NotServed("another number of weights than one per output and tensor")
    out = on_huge_pages(torch.empty_like(tensors[0]))
    program = Program(reduce=Reduce.FUSED_SUM, divisor=Divisor.WEIGHT if normalize else Divisor.NONE)
    numbers = []
    for row in weight.to(torch.float32).tolist():
        weights = [number(value, "a weight") for value in row]
        total = sum_of_weights(weights)
        if normalize and total == 0.0:
            raise NotServed("weights of sum 0")
        # No finite divisor is at least infinity, so this one takes its place.
        numbers.append(scalars(weights, divisor_floor=float("inf"), divisor_fill=total))
    entries = [
        entry([tensor[index] for tensor in tensors], out[index], name=str(index))
        for index in range(len(numbers))
    ]
    # The divisor is a given one, so who is a member decides about the sign of a sum of zeros alone.
    Merge(entries, numbers).combine(replace(program, members=Members.STRICT))
    return out


def _sce(group: Any, int8_mask: bool = False, select_topk: float = 1.0) -> Tensor:
    models = [one.tensor for one in group.non_base]
    if not models:
        raise NotServed("no task vectors")
    check_served([group.base.tensor, *models])
    share = number(select_topk, "select_topk")
    if share <= 0.0:
        raise NotServed("nothing is selected")
    made = method("sce", select_topk=min(share, 1.0), tie="index")
    return merge_by(made, group.base.tensor, models)


def _model_stock(group: Any, filter_wise: bool = False) -> Tensor:
    if filter_wise:
        raise NotServed("an angle for every row")
    return model_stock(group.base.tensor, [one.tensor for one in group.non_base], guard_singular=True)


def _nuslerp(group: Any, weight: Any, nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True) -> Tensor:
    if not nuslerp_flatten:
        raise NotServed("an angle for every row")
    entries = group.non_base
    models = [one.tensor for one in entries]
    base = group.base.tensor if group.base else None
    check_served(models if base is None else [base, *models])
    weights = [number(value, "a weight") for value in weight.values_for(entries)]
    return merge_by(method("nuslerp", weights=weights), base, models)


def _multislerp(group: Any, weight: Any, normalize_weights: bool = True, eps: float = 1e-8) -> Tensor:
    entries = group.non_base
    models = [one.tensor for one in entries]
    base = group.base.tensor if group.base else None
    if len(models) < 2:
        raise NotServed("one model")
    check_served(models if base is None else [base, *models])
    weights = [number(value, "a weight") for value in weight.values_for(entries)]
    made = method(
        "multislerp",
        weights=weights,
        normalize_weights=bool(normalize_weights),
        eps=number(eps, "eps"),
    )
    return merge_by(made, base, models)


_SPHERICAL = (
    Hook("nuslerp", f"{_METHODS}.nuslerp", "nuslerp_merge_method.implementation", same(_nuslerp)),
    Hook("multislerp", f"{_METHODS}.multislerp", "multislerp.implementation", same(_multislerp)),
    Hook("karcher", f"{_METHODS}.karcher", "karcher_merge_tensors", same(karcher)),
)
