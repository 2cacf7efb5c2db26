"""What ranks say to one another: reductions and gathers of small tensors, each over all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tvfast.sharded.notes import Note


@dataclass(frozen=True, slots=True)
class Communicator:
    """The ranks that merge together.

    Attributes:
        ranks: global ranks, ascending.
        rank: this one's global rank.
        groups: one group of all ranks; or, where there is none, one for each dimension of their mesh.
        device: where tensors have to be to be sent.
        note: of a rank that fails while others wait for it.
    """

    ranks: tuple[int, ...]
    rank: int
    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device
    note: Note = field(default_factory=Note, compare=False)

    def telling(self) -> AbstractContextManager[None]:
        """What is raised in here ends the call on the other ranks as well, where they wait for this one."""
        return self.note.leaving(self.rank)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the CPU; integers, whose sums know no order."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def most(self, values: Tensor) -> Tensor:
        """The largest over ranks, on the CPU."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor) -> Tensor:
        """[rank, ...] what every rank has, in one order of ranks everywhere, on the CPU."""
        found = values.to(self.device).unsqueeze(0).contiguous()
        for group in self.groups:
            parts = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
            self.note.wait(dist.all_gather(parts, found, group=group, async_op=True))
            found = torch.cat(parts)
        return found.cpu()

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank has, in the order of `gather`; slow, for errors."""
        found = [value]
        for group in self.groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = [item for part in parts for item in part]
        return found

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        held = values.to(self.device, copy=True)
        for group in self.groups:
            self.note.wait(dist.all_reduce(held, op=operation, group=group, async_op=True))
        return held.cpu()


def communicator_of(meshes: Iterable[DeviceMesh]) -> Communicator:
    """The ranks of the largest mesh; all there are, if it does not contain the others."""
    found = sorted(meshes, key=lambda mesh: -mesh.size())
    largest = found[0]
    ranks = set(_ranks(largest))
    rank = dist.get_rank()
    covers = all(ranks.issuperset(_ranks(mesh)) for mesh in found)
    if not covers or len(ranks) == dist.get_world_size():
        groups: Sequence[dist.ProcessGroup] = [dist.distributed_c10d._get_default_group()]
        ranks = set(range(dist.get_world_size()))
    else:
        groups = [largest.get_group(dim) for dim in range(largest.ndim)]
    kind = largest.device_type
    device = (
        torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
    )
    return Communicator(tuple(sorted(ranks)), rank, tuple(groups), device)


def _ranks(mesh: DeviceMesh) -> list[int]:
    return [int(rank) for rank in mesh.mesh.flatten()]
