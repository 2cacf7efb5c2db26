"""Inputs and the error bound of the method tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tvfast.methods import METHODS


def grid(*shape: int, seed: int = 0, width: int = 64) -> Tensor:
    """Multiples of 1/64 with many ties and zeros: float32 arithmetic on them is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-width, width + 1, shape, generator=generator) / 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def models_for(name: str, base: Tensor, n: int = 3, scale: float = 1.0) -> list[Tensor]:
    """As many models as the method takes, at most n: the base and normal task vectors."""
    most = METHODS[name].n_models[1]
    return [
        base + scale * normal(*base.shape, seed=10 + k) for k in range(n if most is None else min(n, most))
    ]


def scores_for(name: str, base: Any, n: int = 3) -> dict[str, Any]:
    """`scores` or `instruct`, for as many models as `models_for` makes; nothing where neither is read."""
    if METHODS[name].needs_instruct:
        return {"instruct": _tuned(base), "outside": "ranked"}
    if not METHODS[name].needs_scores:
        return {}

    def score(shape: tuple[int, ...], seed: int) -> Tensor:
        return grid(*shape, seed=seed).abs()

    if isinstance(base, Tensor):
        return {"scores": [score(tuple(base.shape), 30 + k) for k in range(n)]}
    return {"scores": [{key: score(tuple(t.shape), 30 + k) for key, t in base.items()} for k in range(n)]}


def _tuned(base: Any) -> Any:
    """An instruct model; integers are the base's."""
    if not isinstance(base, Tensor):
        return {key: _tuned(tensor) for key, tensor in base.items()}
    return base + normal(*base.shape, seed=9).to(base.dtype) if base.is_floating_point() else base


def exact_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.view(torch.int32).equal(right.view(torch.int32))
    )


def bound(
    base: Tensor, models: Sequence[Tensor], out: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """Forward-error bound of a merge in float32 (the undivided one, which is the larger)."""
    b = base.double()
    used = weights or [1.0] * len(models)
    total = sum(abs(w) * (m.double() - b).abs() for w, m in zip(used, models, strict=True))
    return (len(models) + 4) * 2.0**-24 * (total + b.abs() + out.double().abs()) + 2.0**-149
