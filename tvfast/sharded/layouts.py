"""How tensors are laid out over ranks, and bringing one to the layout of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tvfast.errors import LayoutError
from tvfast.ops._views import where
from tvfast.sharded.shards import is_shard, local_slice

Placements = tuple[Any, ...]


def meshes_of(weights: Any) -> Iterator[DeviceMesh]:
    """The meshes of the tensors in a tensor, list, dict or module, or in a list of those."""
    if isinstance(weights, DTensor):
        yield weights.device_mesh
    elif isinstance(weights, nn.Module):
        # Unlike parameters(), it has the shards of a module of FSDP2 between a forward pass and the next.
        yield from meshes_of(weights.state_dict(keep_vars=True))
    elif isinstance(weights, Mapping):
        for value in weights.values():
            yield from meshes_of(value)
    elif isinstance(weights, list | tuple):
        for value in weights:
            yield from meshes_of(value)


def local_of(tensor: Tensor) -> Tensor:
    """The shard of a DTensor, sharing its memory; a plain tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local


def is_whole(tensor: Tensor) -> bool:
    """Whether every rank of the mesh has all of the tensor."""
    return not isinstance(tensor, DTensor) or all(
        isinstance(placement, Replicate) or (is_shard(placement) and n == 1)
        for placement, n in zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    )


def is_partial(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(isinstance(p, Partial) for p in tensor.placements)


def alike(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape have the same elements on every rank."""
    if is_partial(left) or is_partial(right):
        return False
    if is_whole(left) and is_whole(right):
        return True
    if not (isinstance(left, DTensor) and isinstance(right, DTensor)):
        return False
    return left.device_mesh == right.device_mesh and _plain(left) == _plain(right)


def check_alike(name: str, base: Tensor, others: Sequence[tuple[str, Tensor]]) -> None:
    """Raise unless every other tensor, which messages call by its role, is laid out as the base's.

    Raises:
        LayoutError: naming the tensor, its placements and what to do.
    """
    for role, tensor in [("base", base), *others]:
        if is_partial(tensor):
            raise LayoutError(
                f"{where(name, role)} has placements {described(tensor)}, sums that are not finished; "
                "expected shards or replicas. Pass redistribute=True to have it redistributed for the merge."
            )
        if not alike(base, tensor):
            raise LayoutError(
                f"{where(name, role)} has placements {described(tensor)}, base has {described(base)}; "
                "expected equal ones on one mesh. Pass redistribute=True to have it redistributed for that."
            )


def described(tensor: Tensor) -> str:
    """Placements and mesh in words; they are the same on every rank."""
    if not isinstance(tensor, DTensor):
        return "none (a plain tensor)"
    mesh = tensor.device_mesh
    sizes = "x".join(str(n) for n in mesh.shape)
    names = f" {','.join(mesh.mesh_dim_names)}" if mesh.mesh_dim_names else ""
    return f"[{', '.join(map(str, _plain(tensor)))}] on a mesh of {sizes}{names}"


def settled(tensor: DTensor) -> Placements:
    """The tensor's placements with replicas for unfinished sums."""
    return tuple(Replicate() if isinstance(p, Partial) else p for p in tensor.placements)


def rows_together(tensor: DTensor, placements: Placements) -> Placements:
    """Placements under which every row, along the last dimension, is on one rank; a vector is one row."""
    last = tensor.dim() - 1
    across = Shard(0) if last > 0 else Replicate()
    return tuple(across if is_shard(p) and p.dim % tensor.dim() == last else p for p in placements)


def splits_rows(tensor: Tensor) -> bool:
    """Whether some row of the tensor is spread over ranks."""
    return (
        isinstance(tensor, DTensor)
        and not is_whole(tensor)
        and any(
            is_shard(p) and n > 1 and p.dim % tensor.dim() == tensor.dim() - 1
            for p, n in zip(tensor.placements, tensor.device_mesh.shape, strict=True)
        )
    )


def brought(tensor: Tensor, like: Tensor, placements: Placements) -> Tensor:
    """This rank's elements of a tensor under placements on the mesh of `like`; collective."""
    with torch.no_grad():
        if not isinstance(like, DTensor):
            return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()
        if isinstance(tensor, DTensor) and tensor.device_mesh == like.device_mesh:
            return local_of(tensor.redistribute(placements=placements)).contiguous()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return local_slice(whole, like.device_mesh, placements)


def as_dtensor(local: Tensor, like: DTensor, placements: Placements) -> DTensor:
    """A DTensor of the shape of `like` from this rank's elements."""
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def return_to(local: Tensor, out: Tensor, like: DTensor, placements: Placements) -> None:
    """Writes elements laid out with `placements` into the shard `out` of `like`; collective."""
    with torch.no_grad():
        target = settled(like)
        moved = as_dtensor(local, like, placements).redistribute(placements=target)
        out.copy_(term_of(local_of(moved), like))


def term_of(own: Tensor, like: DTensor) -> Tensor:
    """This rank's term of a result whose sum is not finished; elsewhere the result itself."""
    coordinates = like.device_mesh.get_coordinate() or ()
    for placement, at in zip(like.placements, coordinates, strict=True):
        if isinstance(placement, Partial) and placement.reduce_op == "sum" and at > 0:
            return torch.zeros_like(own)  # the first rank's term is the sum
    return own


def _plain(tensor: DTensor) -> Placements:
    """Placements with dimensions counted from the first, and replicas where a mesh dimension has one rank."""
    found: list[Any] = []
    for placement, n in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
        if is_shard(placement) and n == 1:
            found.append(Replicate())
        elif isinstance(placement, Shard):
            found.append(Shard(placement.dim % tensor.dim()))
        else:
            found.append(placement)
    return tuple(found)


def team_meshes(*weights: Any) -> list[DeviceMesh]:
    """The different meshes of the tensors of a call."""
    found: list[DeviceMesh] = []
    for mesh in meshes_of(list(weights)):
        if mesh not in found:
            found.append(mesh)
    return found
