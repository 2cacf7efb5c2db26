"""A parameter that is split over ranks (DTensor): its rows stay where they are, where that is possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvfast.factors import Blocks, Dense, Factor, Root, inner, kron_value


def is_sharded(parameter: Tensor) -> bool:
    """Whether a tensor is a DTensor. Imports torch.distributed only if something else already has."""
    return hasattr(parameter, "device_mesh") and hasattr(parameter, "placements")


@dataclass(frozen=True, eq=False)
class Layout:
    """How a parameter lies on the ranks.

    Attributes:
        like: the parameter, or its gradient.
        rows: first and one past the last row of this rank, where only rows are split; None: it is gathered.
        chunk: rows of every rank but the last ones.
    """

    like: Any
    rows: tuple[int, int] | None
    chunk: int = 0

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor of the parameter's shape: a shard's own memory, or a slice."""
        if is_sharded(tensor):
            part: Tensor = tensor.to_local() if self.rows is not None else tensor.full_tensor()  # type: ignore[attr-defined]
            return part
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def gathered(self, part: Tensor, n_rows: int) -> Tensor:
        """All rows of a matrix whose rows are split as the parameter's are."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size([n_rows, *part.shape[1:]])
        stride = (part.shape[1], 1) if part.dim() == 2 else (1,)
        split: Any = DTensor.from_local(
            part, self.like.device_mesh, self.like.placements, run_check=False, shape=shape, stride=stride
        )
        whole: Tensor = split.full_tensor()
        return whole

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks that hold different rows."""
        if self.rows is None:
            return value
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [Partial() if p.is_shard() else Replicate() for p in self.like.placements]
        summed: Tensor = DTensor.from_local(
            value, self.like.device_mesh, placements, run_check=False
        ).full_tensor()
        return summed

    def add(self, gradient: Tensor, part: Tensor, alpha: float) -> None:
        """Add what `local` would be of a whole tensor to a gradient, in place."""
        if not is_sharded(gradient):
            gradient.add_(part, alpha=alpha)
        elif self.rows is not None:
            gradient.to_local().add_(part, alpha=alpha)  # type: ignore[attr-defined]
        else:
            gradient.to_local().add_(self._cut(part.contiguous()).to_local(), alpha=alpha)  # type: ignore[attr-defined]

    def distributed(self, part: Tensor) -> Tensor:
        """A tensor as the parameter is, from what `local` is of it."""
        if not is_sharded(self.like):
            return part
        if self.rows is None:
            return self._cut(part.contiguous())  # type: ignore[no-any-return]
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part,
            self.like.device_mesh,
            self.like.placements,
            run_check=False,
            shape=self.like.shape,
            stride=self.like.stride(),
        )

    def _cut(self, whole: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = self.like.device_mesh
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=self.like.placements)


def layout_of(parameter: Any, *, by_rows: bool) -> Layout:
    """How a parameter lies.

    Args:
        by_rows: whether its first dimension is that of the layer's outputs, so that rows may stay apart.
    """
    if not is_sharded(parameter):
        return Layout(parameter, None)
    split = [(dim, p) for dim, p in enumerate(parameter.placements) if not p.is_replicate()]
    if not by_rows or len(split) > 1 or any(not p.is_shard(0) for _, p in split):
        return Layout(parameter, None)
    n_rows = parameter.shape[0]
    if not split:
        return Layout(parameter, (0, n_rows))
    mesh_dim = split[0][0]
    mesh = parameter.device_mesh
    chunk = -(-n_rows // mesh.size(mesh_dim))  # as torch.chunk, which FSDP2 splits by
    start = min(mesh.get_local_rank(mesh_dim) * chunk, n_rows)
    stop = min(start + chunk, n_rows)
    if stop - start != parameter.to_local().shape[0]:
        return Layout(parameter, None)
    return Layout(parameter, (start, stop), chunk)


def product(x: Tensor, a: Factor, b: Factor, layout: Layout, n_out: int) -> tuple[Tensor, Tensor]:
    """P = B X A and <X, P>; with split rows, this rank's rows of P and the sum over ranks.

    X A needs no other rows. B (X A) needs them all, one gather of X's size per layer, unless B is in blocks
    that begin and end where the shards do.
    """
    if layout.rows is None or layout.rows == (0, n_out):
        return kron_value(x, a, b)
    start, stop = layout.rows
    half = a.right(x)
    if not isinstance(b, Blocks) or layout.chunk % b.block:  # the same on every rank
        result = _rows(b, layout.gathered(half, n_out), start, stop)
    elif start == stop:
        result = half
    else:
        rest = b.rest if stop == n_out else b.rest[:0, :0]
        result = Blocks(b.whole[start // b.block : stop // b.block], rest).left(half)
    return result, layout.total(inner(x, result))


def _rows(b: Factor, whole: Tensor, start: int, stop: int) -> Tensor:
    """Rows of B H."""
    if isinstance(b, Dense):
        return b.matrix[start:stop] @ whole
    if isinstance(b, Root):
        return b.root[start:stop] @ (b.root.T @ whole)
    return b.left(whole)[start:stop]
