"""What the adapters of both mergekit versions share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations._patching import Function, Integration, NotServed
from tvfast.integrations._tables import (
    Merge,
    check_served,
    drawn_seed,
    entry,
    merge_by,
    method,
    number,
    scalars,
)
from tvfast.methods.scalars import float32
from tvfast.methods.slerp import coefficients
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.program import Divisor, Program

# (sparsifier, consensus) -> our method; mergekit's names for both are strings.
_METHODS = {
    (None, None): "task_arithmetic",
    ("magnitude", "sum"): "ties",
    ("random", None): "dare_linear",
    ("random", "sum"): "dare_ties",
    ("magnitude_outliers", None): "breadcrumbs",
    ("magnitude_outliers", "sum"): "breadcrumbs_ties",
    ("della_magprune", None): "della_linear",
    ("della_magprune", "sum"): "della",
}
_RANDOM = ("random", "della_magprune")
_SMALLEST_PRODUCT = 1e-6  # of two norms, which Model Stock divides by


def _word(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))


def merge_task_vectors(
    integration: Integration,
    sparsifier: Any,
    consensus: Any,
    base: Tensor,
    models: Sequence[Tensor],
    per_model: Mapping[str, Sequence[float]],
    *,
    normalize: bool,
    rescale: bool,
    scale: float,
) -> Tensor:
    """mergekit's generalised task arithmetic: base + lambda * the merged task vectors."""
    kind = _word(sparsifier)
    name = _METHODS.get((kind, _word(consensus)))
    if name is None:
        raise NotServed("a combination of sparsifier and consensus that has no name")
    # Where draws are ours, a tensor with other strides has to get the same ones.
    base, *models = (tensor.contiguous() for tensor in (base, *models))
    check_served([base, *models])
    _check_sparsifier(integration, kind, base)
    weights = [number(weight, "a weight") for weight in per_model["weight"]]
    parameters: dict[str, Any] = {
        "weights": weights,
        "normalize": bool(normalize),
        "scale": number(scale, "lambda"),
    }
    whole = kind is None
    if kind is not None:
        densities = [_density(density) for density in per_model["density"]]
        whole = all(density >= 1.0 for density in densities) and _word(consensus) is None
        parameters |= {"density": densities, "rescale": bool(rescale)}
        for extra in ("gamma", "epsilon"):
            if extra in per_model:
                parameters[extra] = [number(value, extra) for value in per_model[extra]]
        parameters |= {"seed": drawn_seed()} if kind in _RANDOM else {"tie": "index"}
    return merge_by(method(name, **parameters), base, models, finite=not whole)


def _check_sparsifier(integration: Integration, kind: str | None, like: Tensor) -> None:
    if kind in _RANDOM and integration.rng == "peer":
        raise NotServed("mergekit's own draws")
    if kind == "della_magprune":
        if like.dim() > 2:
            raise NotServed("ranks along an inner dimension")
        if like.shape[-1:].numel() == 1:
            raise NotServed("rows of one entry")


def _density(density: Any) -> float:
    found = number(density, "density")
    if found < 0.0:
        raise NotServed("a negative density")
    return min(found, 1.0)


def sparsify(integration: Integration) -> Function:
    """`mergekit.sparsify.sparsify` of both versions."""

    def sparsified(
        tensor: Tensor,
        density: float,
        method: Any,
        gamma: float = 0,
        epsilon: float = 0,
        rescale_norm: Any = None,
    ) -> Tensor:
        kind = _word(method)
        tensor = tensor.contiguous()
        check_served([tensor])
        if not 0.0 < number(density, "density") < 1.0:
            raise NotServed("everything or nothing is kept")
        if _word(rescale_norm) not in (None, "l1"):
            raise NotServed("a norm other than L1")
        if kind is None or ((kind, None) not in _METHODS and kind != "magnitude"):
            raise NotServed("an unknown sparsifier")
        _check_sparsifier(integration, kind, tensor)
        n = tensor.numel()
        if kind not in _RANDOM and (int(density * n) == 0 or int(density * n) == n):
            raise NotServed("everything or nothing is kept")
        if kind == "magnitude_outliers" and int(number(gamma, "gamma") * n) == 0:
            raise NotServed("no outliers are dropped")
        return _sparsified(kind, tensor, density, gamma, epsilon, rescale_norm is not None)

    return sparsified


def _sparsified(
    kind: str, tensor: Tensor, density: float, gamma: float, epsilon: float, rescale: bool
) -> Tensor:
    parameters: dict[str, Any] = {"density": density, "rescale": rescale}
    if kind in _RANDOM:
        name = "dare_linear" if kind == "random" else "della_linear"
        parameters["seed"] = drawn_seed()
    else:
        name = "breadcrumbs"
        parameters |= {"gamma": gamma if kind == "magnitude_outliers" else 0.0, "tie": "index"}
    if kind == "della_magprune":
        parameters["epsilon"] = epsilon
    out = merge_by(method(name, **parameters), None, [tensor])
    return out.copysign_(tensor)  # a mask times a negative entry is -0


def slerp_pairs(ts: Sequence[float], firsts: Tensor, seconds: Tensor, out: Tensor) -> Tensor:
    """SLERP of each pair [output, ...]: whole tensors, one angle each."""
    pairs = [
        entry((first, second), one, name=str(index))
        for index, (first, second, one) in enumerate(zip(firsts, seconds, out, strict=True))
    ]
    merge = Merge(pairs, [scalars((1.0, 1.0)) for _ in pairs])
    grams = merge.statistics.gram(Program(), merge.numbers)
    if not all(math.isfinite(value) for gram in grams for row in gram for value in row):
        raise NotServed("values that are not finite")
    for tensor, gram, t in zip(merge.numbers, grams, ts, strict=True):
        for model, coefficient in zip(tensor.models, coefficients(gram, t), strict=True):
            model.weight = coefficient
    merge.combine(Program())
    return out


def model_stock(base: Tensor, models: Sequence[Tensor], *, guard_singular: bool) -> Tensor:
    """t * mean + (1 - t) * base, one angle for the tensor, in mergekit's order of operations."""
    check_served([base, *models])
    n = len(models)
    out = on_huge_pages(torch.empty_like(base, dtype=torch.float32))
    deltas = Merge([entry(models, out, base=base)], [scalars((1.0,) * n)])
    gram = deltas.statistics.gram(Program(), deltas.numbers)[0]
    if not all(math.isfinite(value) for row in gram for value in row):
        raise NotServed("values that are not finite")
    cosines = [
        max(-1.0, min(1.0, gram[j][k] / max(math.sqrt(gram[j][j] * gram[k][k]), _SMALLEST_PRODUCT)))
        for j in range(n)
        for k in range(j + 1, n)
    ]
    if not cosines:
        raise NotServed("one model")
    cosine = sum(cosines) / len(cosines)
    denominator = 1.0 + (n - 1) * cosine
    if abs(denominator) < 1e-6:
        if not guard_singular:
            raise NotServed("no finite interpolation")
        share = 0.0
    else:
        share = float32(n * cosine / denominator)
    Merge([entry(models, out)], [scalars((1.0,) * n)]).combine(Program(divisor=Divisor.COUNT))
    result = out if base.dtype == torch.float32 else on_huge_pages(torch.empty_like(base))
    weights = (share, float32(1.0 - share))
    merge = Merge([entry((out, base), result)], [scalars(weights)])
    merge.combine(Program())
    return result


def karcher(
    tensors: Sequence[Tensor], alphas: Sequence[float], max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    """mergekit's `karcher_merge_tensors`, of both versions."""
    if len(tensors) < 2:
        raise NotServed("one model")
    check_served(tensors)
    weights = [number(alpha, "a weight") for alpha in alphas]
    if not math.isclose(math.fsum(weights), 1.0, rel_tol=1e-9):
        raise NotServed("weights whose sum is not 1")
    made = method("karcher", weights=weights, max_iter=max_iter, tol=number(tol, "tol"))
    return merge_by(made, None, list(tensors))
