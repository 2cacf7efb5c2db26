"""Fisher merging and RegMean as FusionBench computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations._patching import NotServed
from tvfast.integrations._tables import Merge, check_served, entry, number, scalars, view
from tvfast.methods.scalars import float32
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.ops.raw import Wants
from tvfast.program import Divisor, Program, ScoreMap, Weighting


def merging_with_fisher_weights(
    models_to_merge_param_dict: Mapping[str, list[Tensor]],
    models_to_merge_fisher_weights_list: Sequence[Mapping[str, Tensor]],
    fisher_scaling_coefficients: Tensor,
    normalize_fisher_weight: bool = True,
    minimal_fisher_weight: float = 1e-6,
) -> dict[str, Tensor]:
    """Σ_k c_k (F_k + ε) θ_k / Σ_k c_k (F_k + ε), entry by entry."""
    fishers = models_to_merge_fisher_weights_list
    n_models = len(fishers)
    floor = number(minimal_fisher_weight, "minimal_fisher_weight")
    for name, tensors in models_to_merge_param_dict.items():
        check_served([*tensors, *(fisher[name] for fisher in fishers)])
        if tensors[0].dtype != torch.float32 or len(tensors) != n_models:
            raise NotServed("16 bits, or another number of models")
    if fisher_scaling_coefficients.numel() != n_models or fisher_scaling_coefficients.is_cuda:
        raise NotServed("another number of coefficients")
    if fisher_scaling_coefficients.requires_grad and torch.is_grad_enabled():
        raise NotServed("gradients are recorded")
    if fisher_scaling_coefficients.dtype == torch.float64:
        raise NotServed("coefficients of float64")
    weights = fisher_scaling_coefficients.to(torch.float32).reshape(-1)
    if normalize_fisher_weight:
        inverse = 1.0 / (_norms(models_to_merge_param_dict, fishers) + floor)
        weights = weights * (inverse / inverse.sum())
    own = [number(weight, "a coefficient") for weight in weights.tolist()]
    if not all(weight > 0.0 for weight in own) or floor <= 0.0:
        raise NotServed("weights that may sum to 0")
    entries, merged = [], {}
    for name, tensors in models_to_merge_param_dict.items():
        merged[name] = on_huge_pages(torch.empty_like(tensors[0]))
        one = entry(tensors, merged[name], name=name)
        one.scores = tuple(view(fisher[name]) for fisher in fishers)
        one.score_maps = (ScoreMap(shift=floor, floor=-math.inf),) * n_models
        entries.append(one)
    merge = Merge(entries, [scalars(own) for _ in entries])
    merge.combine(Program(weighting=Weighting.SCORE, divisor=Divisor.WEIGHT))
    for tensor in merged.values():
        tensor.add_(0.0)  # a sum of nothing but -0 is +0 in torch
    return merged


def _norms(parameters: Mapping[str, Any], fishers: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """L2 norm of each model's Fisher weights over all tensors: float32 [K]."""
    entries = []
    for name in parameters:
        own = [fisher[name] for fisher in fishers]
        entries.append(entry(own, own[0], name=name))
    merge = Merge(entries, [scalars((1.0,) * len(fishers)) for _ in entries])
    found = merge.statistics.measure(Program(), merge.numbers, Wants.SQUARES)
    sums = [math.fsum(moments.gram[k][k] for moments in found) for k in range(len(fishers))]
    return torch.tensor([float32(math.sqrt(total)) for total in sums])


def merging_with_regmean_weights(
    models_to_merge_param_dict: Mapping[str, list[Tensor]],
    models_to_merge_regmean_weights_list: Sequence[Mapping[str, Tensor]],
    reduce_non_diagonal_ratio: float = 1.0,
    weight_transpose: bool = True,
) -> dict[str, Tensor]:
    """(Σ G_k)⁻¹ Σ G_k θ_k of linear layers, the mean of everything else; off-diagonals of G_k shrunk."""
    grams = models_to_merge_regmean_weights_list
    ratio = number(reduce_non_diagonal_ratio, "reduce_non_diagonal_ratio")
    for tensors in models_to_merge_param_dict.values():
        check_served(tensors)
        if tensors[0].dtype != torch.float32:
            raise NotServed("16 bits")
    merged: dict[str, Tensor] = {}
    averaged = {}
    for name, tensors in models_to_merge_param_dict.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in grams[0]:
            merged[name] = _solved([gram[module] for gram in grams], tensors, ratio, weight_transpose)
        else:
            merged[name] = averaged[name] = on_huge_pages(torch.empty_like(tensors[0]))
    if averaged:
        entries = [entry(models_to_merge_param_dict[name], out, name=name) for name, out in averaged.items()]
        merge = Merge(entries, [scalars((1.0,) * len(one.models)) for one in entries])
        merge.combine(Program(divisor=Divisor.COUNT))
        for out in averaged.values():
            out.add_(0.0)  # a sum of nothing but -0 is +0 in torch
    return merged


def _solved(grams: Sequence[Tensor], tensors: Sequence[Tensor], ratio: float, transpose: bool) -> Tensor:
    """The same products, sums and inverse as the peer's, without its masks and lists."""
    total: Tensor | None = None
    product: Tensor | None = None
    for gram, tensor in zip(grams, tensors, strict=True):
        reduced = reduce_non_diagonal_elements(gram, ratio)
        one = torch.matmul(reduced, tensor.transpose(0, 1) if transpose else tensor)
        total = reduced if total is None else total.add_(reduced)
        product = one if product is None else product.add_(one)
    assert total is not None
    assert product is not None
    merged = torch.matmul(torch.inverse(total), product)
    return merged.transpose(0, 1) if transpose else merged


def reduce_non_diagonal_elements(gram: Tensor, ratio: float) -> Tensor:
    """A new matrix with the off-diagonal entries multiplied by `ratio`."""
    on_diagonal = float32(float32(1.0 - ratio) + float32(ratio))
    reduced = gram * ratio
    reduced.diagonal().copy_(gram.diagonal() * on_diagonal)
    return reduced
