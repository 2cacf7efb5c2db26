"""State dicts and modules of FusionBench as rows of a work table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.integrations._patching import NotServed
from tvfast.integrations._tables import check_served
from tvfast.ops._huge_pages import on_huge_pages

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of the base, its counterparts, and whether an earlier name has the same memory."""

    name: str
    base: Tensor
    models: tuple[Tensor, ...]
    repeated: bool


def leaves(base: StateDict, models: Sequence[StateDict]) -> list[Leaf]:
    """Floating-point tensors in the base's order.

    Raises:
        NotServed: other names in a model; tensors that kernels do not merge; memory shared in the base and
            not in a model.
    """
    if not models or any(model.keys() != base.keys() for model in models):
        raise NotServed("different names, or no models")
    found: list[Leaf] = []
    places: dict[tuple[Any, ...], Leaf] = {}
    for name, tensor in base.items():
        own = tuple(model[name] for model in models)
        if not tensor.is_floating_point() or not all(one.is_floating_point() for one in own):
            raise NotServed("tensors of integers")
        check_served([tensor, *own])
        first = places.get(_memory(tensor))
        if first is not None and [*map(_memory, first.models)] != [*map(_memory, own)]:
            raise NotServed("tensors that the base ties and a model does not")
        found.append(Leaf(name, tensor, own, first is not None))
        places.setdefault(_memory(tensor), found[-1])
    return found


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def check_modules(*models: Any) -> None:
    """Raise unless all are modules in memory; lazy state dicts are left to the peer."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise NotServed(f"a {type(model).__name__}")


def states(*models: nn.Module) -> list[dict[str, Tensor]]:
    """State dicts that share the modules' memory."""
    return [dict(model.state_dict()) for model in models]


def resident(pool: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The pretrained model and the others of a pool that holds them in memory already.

    Raises:
        NotServed: it would load them one at a time.
    """
    own = pool if isinstance(pool, dict) else getattr(pool, "_models", None)
    if own is None or not all(isinstance(own[name], nn.Module) for name in own):
        raise NotServed("models that are loaded one at a time")
    if "_pretrained_" not in own:
        raise NotServed("no pretrained model")
    names = [name for name in own if not name.startswith("_")]
    return own["_pretrained_"], [own[name] for name in names]


def empty_like(leaf_models: Sequence[Tensor]) -> Tensor:
    """A contiguous tensor for a merge of these."""
    return on_huge_pages(torch.empty_like(leaf_models[0], memory_format=torch.contiguous_format))
