"""The weights of a model that is being trained: copied out, put back, compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tvfast._leaves import Weights, named_tensors
from tvfast.errors import ShapeError, StateDictError
from tvfast.ops.host import crc32c

State = dict[str, Tensor]
"""Tensors by name; each memory once, under the first of its names."""


def tensors_of(model: Weights) -> tuple[State, dict[str, str]]:
    """The live tensors, and further names of the same memory: alias -> first name.

    Found anew at each call, because training moves parameters to other devices and memory.
    """
    found: State = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in named_tensors(model, "model").items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            found[name] = tensor.detach()
    return found, aliases


def copied(model: Weights) -> State:
    """New tensors with the model's values, on its devices."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors_of(model)[0].items()
    }


def load(model: Weights, state: Mapping[str, Tensor], what: str) -> None:
    """Overwrite the model's tensors.

    Args:
        state: by name; an alias of the model may be missing.
        what: stands for the state in messages.

    Raises:
        StateDictError: it lacks a tensor of the model.
        ShapeError: it has one of another shape.
    """
    live, _ = tensors_of(model)
    for name, tensor in live.items():
        if name not in state:
            raise StateDictError(
                f"{what} has no tensor {name!r}; expected one for every tensor of the model."
            )
        if state[name].shape != tensor.shape:
            raise ShapeError(
                f"{what}: tensor {name!r} has shape {list(state[name].shape)}, the model's has "
                f"{list(tensor.shape)}; expected equal ones."
            )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(state[name])


def checksum(model: Weights) -> int:
    """CRC-32C of all values in order of name."""
    total = 0
    for _, tensor in sorted(tensors_of(model)[0].items()):
        host = tensor.to("cpu").contiguous()
        total = crc32c(host.data_ptr(), host.nbytes, total)
    return total


def drop_gradients(model: Weights) -> None:
    """Gradients are memory, and those of one task are nothing to the next."""
    if isinstance(model, nn.Module):
        model.zero_grad(set_to_none=True)


@contextmanager
def modes_kept(model: Weights) -> Iterator[None]:
    """Puts every module back into training or evaluation, as it was."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
