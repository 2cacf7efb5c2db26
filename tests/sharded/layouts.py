"""Layouts as plain data, so that they can be drawn in one process and made in others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Split = tuple[str, int, int]
"""("shard", dim, 0), ("strided", dim, split factor), ("replicate", 0, 0) or ("partial", 0, 0)."""

MESHES = ((1,), (2,), (3,), (4,), (2, 2), (1, 2), (3, 1))


@dataclass(frozen=True)
class Layout:
    """Of one tensor on a mesh; None: a plain tensor."""

    splits: tuple[Split, ...] | None

    def place(self, tensor: Tensor, mesh: Any) -> Tensor:
        """The tensor, which every rank has, laid out: each rank keeps its part."""
        from torch.distributed.tensor import distribute_tensor

        if self.splits is None:
            return tensor.clone()
        return distribute_tensor(tensor.clone(), mesh, self.placements(), src_data_rank=None)

    def placements(self) -> list[Any]:
        from torch.distributed.tensor import Partial, Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        made = {
            "shard": lambda dim, _: Shard(dim),
            "strided": lambda dim, factor: _StridedShard(dim, split_factor=factor),
            "replicate": lambda *_: Replicate(),
            "partial": lambda *_: Partial(),
        }
        return [made[kind](dim, factor) for kind, dim, factor in self.splits or ()]


def mesh_of(shape: Sequence[int]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=("dp", "tp")[: len(shape)])


def weights(
    shapes: Mapping[str, Sequence[int]], dtype: str, seed: int, n_models: int
) -> list[dict[str, Tensor]]:
    """A base and models near it, everywhere the same; differences of 16-bit weights tie."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    base = {name: 0.02 * torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}
    found = [base]
    found += [
        {
            name: tensor + 2e-3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        for _ in range(n_models)
    ]
    return [{name: tensor.to(kind) for name, tensor in one.items()} for one in found]


def factors_of(name: str, shape: Sequence[int], seed: int) -> Any:
    """Kronecker factors of a matrix, positive definite; everywhere the same."""
    from tvfast.factors import Dense
    from tvfast.factors.records import Curvature

    generator = torch.Generator().manual_seed(seed)
    a, b = (
        Dense(roots @ roots.T / n)
        for n in reversed(shape)
        for roots in [torch.randn(n, n + 3, generator=generator)]
    )
    return Curvature(name, tuple(shape), a, b, None, None, False, 10.0)
