"""From weights with DTensors to leaves: local shards with their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvfast._leaves import Leaf, Weights, check_names, is_merged, match, named_tensors
from tvfast.errors import LayoutError
from tvfast.ops._views import check_same, view
from tvfast.sharded.agreement import Description
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.layouts import alike, check_alike, described, local_of
from tvfast.sharded.shards import Part, part_of


@dataclass(frozen=True, slots=True)
class ShardedLeaf:
    """One tensor of the base with its counterparts, as the caller has them.

    Attributes:
        base, models: DTensors or plain tensors, on any rank of the same whole shape.
        leaf: their shards; None where a model is laid out otherwise than the base, or a sum is not finished.
        part: where the base's shard lies; None with `leaf`.
    """

    name: str
    base: Tensor
    models: tuple[Tensor, ...]
    leaf: Leaf | None
    part: Part | None
    aliases: list[str] = field(default_factory=list)

    @property
    def float64(self) -> bool:
        return any(tensor.dtype == torch.float64 for tensor in (self.base, *self.models))

    @property
    def n_bytes(self) -> int:
        """Of base, models and a result, all ranks together."""
        return self.base.numel() * sum(t.element_size() for t in (self.base, self.base, *self.models))


def sharded_leaves(
    base: Weights,
    models: Sequence[Weights],
    said: Description,
    *,
    redistribute: bool,
    roles: Sequence[str] = (),
) -> list[ShardedLeaf]:
    """The floating-point leaves in the order of the base; what must be equal on all ranks goes into `said`.

    Args:
        roles: what messages call the models; () for models[0], models[1], ...

    Raises:
        StateDictError, ShapeError, DeviceError, DTypeError: as `_leaves.match`.
        LayoutError: layouts differ and `redistribute` is not set; or this rank has no part of a tensor.
    """
    base_tensors = named_tensors(base, "base")
    called = list(roles) or [f"models[{k}]" for k in range(len(models))]
    model_tensors = [named_tensors(model, role) for model, role in zip(models, called, strict=True)]
    for tensors, role in zip(model_tensors, called, strict=True):
        check_names(base_tensors, tensors, role)
    together: dict[str, tuple[Tensor, ...]] = {}
    apart: dict[str, tuple[Tensor, ...]] = {}
    for name, tensor in base_tensors.items():
        counterparts = tuple(tensors[name] for tensors in model_tensors)
        said.add(f"tensor {name!r}", _in_words(tensor, counterparts))
        roled = list(zip(called, counterparts, strict=True))
        for role, counterpart in roled:
            check_same(name, role, counterpart, "base", tensor)
        _check_member(name, [("base", tensor), *roled], said.team)
        if not is_merged(name, tensor, roled, bare=isinstance(base, Tensor)):
            continue
        if not redistribute:
            check_alike(name, tensor, roled)
        if all(alike(tensor, other) for other in (tensor, *counterparts)):
            together[name] = counterparts
        else:
            apart[name] = counterparts
    found = {leaf.name: leaf for leaf in _matched(base_tensors, together, called)}
    leaves: list[ShardedLeaf] = []
    seen: dict[Any, ShardedLeaf] = {}
    for name, tensor in base_tensors.items():
        if name in found:
            part = part_of(tensor, said.team.ranks[0], said.team.rank)
            one = ShardedLeaf(name, tensor, together[name], found[name], part, found[name].aliases)
        elif name in apart:
            one = ShardedLeaf(name, tensor, apart[name], None, None)
        else:
            continue
        # What match could not see: empty shards of tied tensors, and tied tensors that lie apart.
        key = _memory(tensor)
        if key in seen and tensor.numel() > 0:
            seen[key].aliases.append(name)
            continue
        seen[key] = one
        leaves.append(one)
    said.add("tensors to merge", [leaf.name for leaf in leaves])
    return leaves


def _matched(
    base: Mapping[str, Tensor], models: Mapping[str, tuple[Tensor, ...]], roles: Sequence[str]
) -> list[Leaf]:
    if not models:
        return []
    return match(
        {name: local_of(base[name]) for name in models},
        [{name: local_of(found[k]) for name, found in models.items()} for k in range(len(roles))],
        roles,
    )


def leaf_of(name: str, base: Tensor, models: Sequence[Tensor]) -> Leaf:
    """A leaf of plain tensors that were brought together."""
    views = tuple(view(m, name, f"models[{k}]", float64=True) for k, m in enumerate(models))
    return Leaf(name, base, tuple(models), view(base, name, "base", float64=True), views)


def _check_member(name: str, roled: Sequence[tuple[str, Tensor]], team: Communicator) -> None:
    for role, tensor in roled:
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None and mesh.get_coordinate() is None:
            raise LayoutError(
                f"tensor {name!r}: {role} lies on a mesh that does not have rank {team.rank}; expected every "
                "rank of the call to hold a part. Call it on the ranks of the mesh only."
            )


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What tied tensors have in common, also where this rank's shards are empty."""
    local = local_of(tensor)
    storage = local.untyped_storage()
    return storage._cdata, local.storage_offset(), tuple(tensor.shape), tensor.dtype


def _in_words(base: Tensor, models: Sequence[Tensor]) -> str:
    """Shape, dtypes and layouts; the same on every rank where the calls are."""
    layouts = dict.fromkeys(described(tensor) for tensor in (base, *models))
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in (base, *models))
    return f"{list(base.shape)} {'/'.join(dtypes)} {'/'.join(layouts)}"
