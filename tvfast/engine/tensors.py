"""Merges whole tensors in memory with torch; imported only by a run that has such work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tvfast.engine.source import Loaded
from tvfast.engine.tasks import Task
from tvfast.factors.records import Curvature, curvature_of
from tvfast.methods.base import TensorJob

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def merge_part(loaded: Loaded, index: int) -> str:
    """Merge one part, a whole tensor, into its place in the block; a line for the report, or "".

    Raises:
        StatisticsError: statistics that are not finite, changed, or of a zero count.
        SolveError: the tensor's equations have no solution.

    Notes:
        On one thread: torch's products depend on how many there are, and the output must not.
    """
    torch.set_num_threads(1)
    task = loaded.parts[index].task
    work = task.tensor
    assert work is not None
    inputs = [
        _tensor(loaded, position, stored.operand, task)
        for stored, position in zip(task.inputs, loaded.arrangement.inputs[index], strict=True)
    ]
    base = inputs[0] if task.base is not None else None
    models = tuple(inputs if base is None else inputs[1:])
    curvature: list[Curvature] = [
        curvature_of(file.read(parameter, kind), file.path) for file, parameter, kind in work.statistics
    ]
    with torch.no_grad():
        result = work.method.merge([TensorJob(task.name, base, models, tuple(curvature))])[0]
        out = _tensor(loaded, loaded.arrangement.outputs[index], task.result, task)
        out.copy_(result.tensor)
        if out.untyped_storage().data_ptr() != _address(loaded, loaded.arrangement.outputs[index]):
            _write(loaded, loaded.arrangement.outputs[index], out)
    return f"{work.method.info.name}: {result.note}." if result.note else ""


def _address(loaded: Loaded, at: int) -> int:
    return loaded.block.address + at


def _tensor(loaded: Loaded, at: int, dtype: str, task: Task) -> Tensor:
    """A tensor in the block; a copy where its place is not aligned to its elements, as files may have it."""
    found = _TORCH[dtype]
    n_bytes = task.n_elements * found.itemsize
    view = loaded.block.view[at : at + n_bytes]
    buffer = bytearray(view) if _address(loaded, at) % found.itemsize else view
    return torch.frombuffer(buffer, dtype=found).reshape(task.shape)


def _write(loaded: Loaded, at: int, tensor: Tensor) -> None:
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    loaded.block.view[at : at + len(data)] = data


@contextmanager
def restored_threads() -> Iterator[None]:
    """Afterwards torch computes on as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
