"""From tensors, lists, state dicts and modules to named leaves whose names, shapes and devices agree."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tvfast.errors import ArgumentError, DTypeError, StateDictError
from tvfast.ops._views import check_same, view, where
from tvfast.program import View

Weights: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Any] | nn.Module
"""What a merge takes as a base or a model."""

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Name components that torch.compile, FSDP and activation checkpointing insert."""

_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of the base with its counterparts; `aliases` are further names of the same memory."""

    name: str
    base: Tensor
    models: tuple[Tensor, ...]
    base_view: View
    model_views: tuple[View, ...]
    aliases: list[str] = field(default_factory=list)

    @property
    def float64(self) -> bool:
        """Whether any of the tensors needs float64 arithmetic."""
        return any(tensor.dtype == torch.float64 for tensor in (self.base, *self.models))


def model_list(models: Any, role: str = "models") -> list[Weights]:
    """`models`, or what comes one per model, as a list.

    Raises:
        ArgumentError: a single model instead of several, or no iterable.
    """
    expected = "a list of models" if role == "models" else "a list, one per model"
    if isinstance(models, Tensor | Mapping | str) or (
        isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    ):
        raise ArgumentError(
            f"{role} is a {type(models).__name__}; expected {expected}. Pass [{role.rstrip('s')}] for one."
        )
    try:
        return list(models)
    except TypeError:
        raise ArgumentError(f"{role} is a {type(models).__name__}; expected {expected}.") from None


def any_sharded(*weights: Any) -> bool:
    """Whether a tensor of a tensor, list, dict or module is a DTensor; in lists of those too."""
    loaded = sys.modules.get("torch.distributed.tensor")
    if loaded is None:
        return False  # there is none in this process
    for one in weights:
        if isinstance(one, nn.Module):
            # Unlike parameters(), it has the shards of a module of FSDP2 between a forward pass and the next.
            found = any_sharded(one.state_dict(keep_vars=True))
        elif isinstance(one, Mapping):
            found = any_sharded(*one.values())
        elif isinstance(one, list | tuple):
            found = any_sharded(*one)
        else:
            found = isinstance(one, loaded.DTensor)
        if found:
            return True
    return False


def named_tensors(weights: Weights, role: str) -> dict[str, Tensor]:
    """Tensors by name, wrapper prefixes stripped: "tensor" for a bare one, the index in a list.

    A module brings its parameters and persistent buffers.

    Raises:
        ArgumentError: something that is no tensor, list, dict or module, or holds something else.
        StateDictError: two names are equal without their wrapper prefixes.
    """
    if isinstance(weights, Tensor):
        return {"tensor": weights}
    if isinstance(weights, nn.Module):
        found: dict[Any, Any] = weights.state_dict(keep_vars=True)
    elif isinstance(weights, Mapping):
        found = dict(weights)
    elif isinstance(weights, list | tuple):
        found = {str(index): tensor for index, tensor in enumerate(weights)}
    else:
        raise ArgumentError(
            f"{role} is a {type(weights).__name__}; expected a tensor, a list or dict "
            "of tensors, or an nn.Module."
        )
    named: dict[str, Tensor] = {}
    for original, stripped in strip_wrappers(found).items():
        value = found[original]
        if stripped.endswith("_extra_state"):
            continue
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{role}[{original!r}] is a {type(value).__name__}; expected a tensor.")
        if stripped in named:
            raise StateDictError(
                f"{role} has {original!r} and another tensor named {stripped!r} without wrapper prefixes; "
                "expected names that stay distinct. Rename one of them."
            )
        named[stripped] = value
    return named


def strip_wrappers(names: Iterable[Any]) -> dict[Any, str]:
    """Each name without wrapper components; a leading "module." goes only where every name has it (DDP)."""
    stripped = {
        name: ".".join(part for part in str(name).split(".") if part not in WRAPPERS) for name in names
    }
    while stripped and all(name.startswith("module.") for name in stripped.values()):
        stripped = {original: name.removeprefix("module.") for original, name in stripped.items()}
    return stripped


def match(
    base: Weights, models: Sequence[Weights], roles: Sequence[str] = (), first: str = "base"
) -> list[Leaf]:
    """The floating-point leaves of the base with their counterparts; aliases are one leaf.

    Integer and boolean leaves are left out, but must have the base's shape. A bare tensor must be
    floating-point.

    Args:
        roles: what messages call the models; models[0], models[1] ... by default.
        first: what they call the base.

    Raises:
        StateDictError: different sets of names, or tensors that the base ties and a model has different.
        ShapeError, DeviceError, DTypeError: a model's tensor does not fit the base's.
        LayoutError: a tensor that is not plain contiguous memory.
    """
    base_tensors = named_tensors(base, first)
    called = list(roles) or [f"models[{k}]" for k in range(len(models))]
    model_tensors = [named_tensors(model, role) for model, role in zip(models, called, strict=True)]
    for tensors, role in zip(model_tensors, called, strict=True):
        check_names(base_tensors, tensors, role, first)
    leaves: list[Leaf] = []
    by_memory: dict[tuple[Any, ...], Leaf] = {}
    for name, tensor in base_tensors.items():
        counterparts = tuple(tensors[name] for tensors in model_tensors)
        roled = list(zip(called, counterparts, strict=True))
        merged = is_merged(name, tensor, roled, bare=isinstance(base, Tensor), first=first)
        for role, counterpart in roled:
            check_same(name, role, counterpart, first, tensor)
        if not merged:
            continue
        base_view = view(tensor, name, first, float64=True)
        model_views = [view(m, name, role, float64=True) for role, m in roled]
        leaf = Leaf(name, tensor, counterparts, base_view, tuple(model_views))
        key = _memory(tensor)
        if key in by_memory:
            _check_tied(by_memory[key], leaf, called, first)
            by_memory[key].aliases.append(name)
        else:
            leaves.append(leaf)
            if tensor.numel() > 0:
                by_memory[key] = leaf
    return leaves


def check_names(
    base: Mapping[str, Tensor], model: Mapping[str, Tensor], role: str, first: str = "base"
) -> None:
    missing = [name for name in base if name not in model]
    extra = [name for name in model if name not in base]
    if missing or extra:
        found = [f"lacks {_names(missing)}"] * bool(missing) + [
            f"has {_names(extra)} that {first} lacks"
        ] * bool(extra)
        raise StateDictError(
            f"{role} {' and '.join(found)}; expected the names of {first}, no more and no fewer."
        )


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensors ({shown}{more})" if len(names) > 1 else f"the tensor {shown}"


def is_merged(
    name: str, base: Tensor, models: Sequence[tuple[str, Tensor]], *, bare: bool, first: str = "base"
) -> bool:
    """Whether a leaf is floating-point everywhere; False for integers and booleans in a container."""
    for role, tensor in [(first, base), *models]:
        if tensor.is_complex() or (tensor.is_floating_point() != base.is_floating_point()):
            raise DTypeError(
                f"{where(name, role)} has dtype {tensor.dtype}, {first} has {base.dtype}; expected real "
                "floating-point tensors, or integers everywhere. Cast it first."
            )
    if bare and not base.is_floating_point():
        raise DTypeError(f"{where(name, first)} has dtype {base.dtype}; expected a floating-point tensor.")
    return base.is_floating_point()


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What tied tensors have in common."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def _check_tied(one: Leaf, two: Leaf, roles: Sequence[str], first: str) -> None:
    # Comparing values reads both tensors; it happens only where a base is tied and a model is not.
    for role, left, right in zip(roles, one.models, two.models, strict=True):
        if _memory(left) != _memory(right) and not torch.equal(left, right):
            raise StateDictError(
                f"{first} ties {one.name!r} and {two.name!r}, but they differ in {role}; expected "
                "equal tensors, because there is one result for both. Untie {first}, or tie {role}."
            )
