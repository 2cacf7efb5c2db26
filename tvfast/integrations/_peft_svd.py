"""`add_weighted_adapter` with `*_svd`: leading singular vectors of a merged update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations._patching import Function, NotServed
from tvfast.integrations._tables import check_served


def without_gradients(original: Function) -> Function:
    """`LoraModel.add_weighted_adapter`, which assigns data and drops every graph that it has recorded."""

    @torch.no_grad()
    def add_weighted_adapter(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return add_weighted_adapter


def weighted_adapter(original: Function) -> Function:
    """`LoraModel._svd_generalized_task_arithmetic_weighted_adapter`, from the peer's own."""

    def adapter(
        model: Any,
        combination_type: str,
        adapters: Sequence[str],
        weights: Sequence[float],
        new_rank: int,
        target: Any,
        target_lora_A: Tensor,
        target_lora_B: Tensor,
        density: float | None,
        majority_sign_method: str,
        clamp: float | None = None,
        full_matrices: bool = True,
        driver: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        if clamp is not None:
            raise NotServed("clamped factors, which depend on the singular vectors' signs")
        if combination_type == "svd":
            factors = _factors(target, adapters, weights)
            if factors is not None and new_rank <= min(*factors[0].shape, *factors[1].shape):
                return low_rank_svd(*factors, new_rank)
        smallest = min(target_lora_A.flatten(1).shape[1], target_lora_B.flatten(1).shape[0])
        if not full_matrices or new_rank > smallest:
            raise NotServed("a dense update whose full factors are wanted")
        found = original(
            model,
            combination_type,
            adapters,
            weights,
            new_rank,
            target,
            target_lora_A,
            target_lora_B,
            density,
            majority_sign_method,
            None,
            full_matrices=False,
            driver=driver,
        )
        return found[0], found[1]

    return adapter


def low_rank_svd(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular triplets of left @ right, from two QR factorisations and one small SVD.

    Args:
        left: [m, R].
        right: [R, n].
        rank: at most min(m, R, n).

    Returns:
        (Vh [rank, n], U S [m, rank]), float32: the order in which peft wants A and B.

    Notes:
        float64 inside. O((m + n) R²) instead of O(m n min(m, n)). Singular vectors are determined up to
        their common sign, as by any SVD.
    """
    q_left, r_left = torch.linalg.qr(left.to(torch.float64))
    q_right, r_right = torch.linalg.qr(right.to(torch.float64).T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    lora_b = q_left @ (u[:, :rank] * s[:rank])
    lora_a = vh[:rank] @ q_right.T
    return lora_a.to(torch.float32).contiguous(), lora_b.to(torch.float32).contiguous()


def _factors(target: Any, adapters: Sequence[str], weights: Sequence[float]) -> tuple[Tensor, Tensor] | None:
    """([B_1 … B_K], [w_k s_k A_k] below each other) of a plain linear or embedding layer in float32."""
    from peft.tuners.lora.layer import Embedding, Linear

    computes: Callable[..., Tensor] = type(target).get_delta_weight
    found = []
    for adapter, weight in zip(adapters, weights, strict=False):  # as the peer does
        if adapter in target.lora_A and computes is Linear.get_delta_weight:
            a, b = target.lora_A[adapter].weight, target.lora_B[adapter].weight
        elif adapter in target.lora_embedding_A and computes is Embedding.get_delta_weight:
            a, b = target.lora_embedding_A[adapter], target.lora_embedding_B[adapter]
        elif adapter in target.lora_A or adapter in target.lora_embedding_A:
            return None
        else:
            continue
        try:
            with torch.no_grad():
                check_served([a.data])
                check_served([b.data])
        except NotServed:
            return None
        if a.dtype != torch.float32 or b.dtype != torch.float32 or a.device != b.device:
            return None  # peft rounds the update of each adapter to its 16-bit type
        found.append((b.data, a.data * (weight * target.scaling[adapter])))
    if not found:
        return None
    return torch.cat([b for b, _ in found], dim=1), torch.cat([a for _, a in found], dim=0)
