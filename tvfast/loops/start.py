"""Where a loop begins: weights in memory, or a checkpoint."""

from __future__ import annotations

import os
from typing import TypeAlias

import torch

from tvfast._leaves import Weights, named_tensors
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.engine.reading import tensor_in_memory
from tvfast.errors import CheckpointError
from tvfast.loops.live import State
from tvfast.loops.state import DTYPES

Start: TypeAlias = Weights | str | os.PathLike[str]


def weights_at(start: Start) -> tuple[State, str]:
    """The tensors, and what stands for them in messages.

    Raises:
        CheckpointError: a damaged checkpoint, or a type that torch has not.
        ArgumentError: no weights.
    """
    if not isinstance(start, str | os.PathLike):
        return {name: tensor.detach() for name, tensor in named_tensors(start, "start").items()}, "start"
    checkpoint = open_checkpoint(start)
    found: State = {}
    for name, stored in checkpoint.tensors.items():
        dtype = DTYPES.get(stored.operand)
        if dtype is None:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} is stored as {stored.operand}; expected one of "
                f"{', '.join(DTYPES)}."
            )
        tensor = torch.empty(stored.shape, dtype=dtype)
        if tensor.numel():
            with tensor_in_memory(stored) as data:
                tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
        found[name] = tensor
    return found, checkpoint.path
