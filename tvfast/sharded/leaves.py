"""From weights with DTensors to leaves: local shards with their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvfast._leaves import Leaf, Weights, check_names, is_merged, match, named_tensors
from tvfast.errors import LayoutError, StateDictError
from tvfast.ops._views import check_dtype, check_plain, check_same, view
from tvfast.ops.raw import backend_for
from tvfast.program import Entry, WorkTable
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
        BackendError: no backend can merge this rank's shards.
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
            check_plain(local_of(tensor), name, "base")
            for role, operand in [("base", tensor), *roled]:
                check_dtype(operand, name, role, float64=True)
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
            _check_tied(seen[key], name, tuple(t[name] for t in model_tensors), called)
            seen[key].aliases.append(name)
            continue
        seen[key] = one
        leaves.append(one)
    said.add("tensors to merge", [leaf.name for leaf in leaves])
    _check_backend(leaves, len(models))
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


def _check_tied(first: ShardedLeaf, name: str, models: Sequence[Tensor], roles: Sequence[str]) -> None:
    """Raise if a model has different tensors where the base has one; compares what this rank holds."""
    for role, left, right in zip(roles, first.models, models, strict=True):
        if _memory(left) == _memory(right):
            continue
        one_layout = alike(left, right) or described(left) == described(right)
        if not one_layout or left.dtype != right.dtype or not torch.equal(local_of(left), local_of(right)):
            raise StateDictError(
                f"base ties {first.name!r} and {name!r}, but they differ in {role}; expected equal tensors "
                "of one layout, because there is one result for both. Untie the base or tie the model."
            )


def _check_backend(leaves: Sequence[ShardedLeaf], n_models: int) -> None:
    """Raise if nothing on this rank can merge its shards: later, other ranks would wait for it."""
    if any(one.float64 for one in leaves):
        from tvfast.merging import float64_backend

        float64_backend()
    entries = [
        Entry(name=leaf.name, models=leaf.model_views, base=leaf.base_view)
        for one in leaves
        if (leaf := one.leaf) is not None and not one.float64
    ]
    if entries or not all(one.float64 for one in leaves):
        backend_for(WorkTable(entries, n_models))


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
    tensors = (base, *models)
    layouts = _once([described(tensor) for tensor in tensors])
    dtypes = _once([str(tensor.dtype).removeprefix("torch.") for tensor in tensors])
    return f"{list(base.shape)} {'/'.join(dtypes)} {'/'.join(layouts)}"


def _once(words: list[str]) -> list[str]:
    """One word where base and models have the same, otherwise that of each of them."""
    return words[:1] if len(set(words)) == 1 else words
