"""NaN and infinity in what is merged, and in what comes of it: errors that name the tensor."""

from __future__ import annotations

from collections.abc import Iterable

from tvfast import dtypes
from tvfast.checkpoint.stored import Stored
from tvfast.engine.source import Loaded
from tvfast.errors import MergeError
from tvfast.ops.host import first_nonfinite
from tvfast.program import DType, Entry


def check_finite(loaded: Loaded, indices: Iterable[int] | None = None) -> None:
    """Raise if an input holds NaN or infinity.

    Args:
        indices: of the parts that are looked at; None: of all.

    Raises:
        MergeError: naming the tensor, the file, the element and what to do.
    """
    for index in range(len(loaded.parts)) if indices is None else indices:
        part = loaded.parts[index]
        for k, stored in enumerate(part.task.inputs):
            if stored.operand not in dtypes.MERGEABLE or part.n == 0:
                continue
            at = loaded.block.address + loaded.arrangement.inputs[index][k]
            found = first_nonfinite(at, part.n, DType[stored.operand])
            if found >= 0:
                raise MergeError(
                    f"{stored.path}: tensor {stored.name!r}{_made_of(stored)} holds NaN or infinity at "
                    f"element {part.start + found} (shape {list(stored.shape)}); expected finite numbers. "
                    "Give another checkpoint, or pass --nonfinite propagate to let it through."
                )


def _made_of(stored: Stored) -> str:
    """What else its numbers are made of."""
    if stored.update is not None:
        return f" with the adapter of {stored.update.a.path}"
    return " with its scales" if stored.blocks is not None and stored.blocks.factors is not None else ""


def check_range(loaded: Loaded, indices: Iterable[int] | None = None) -> None:
    """Raise if a result of finite inputs does not fit its storage type.

    Args:
        indices: of the parts that are looked at; None: of all.

    Raises:
        MergeError: naming the tensor, the element and what to do.
    """
    for index in range(len(loaded.parts)) if indices is None else indices:
        part, at = loaded.parts[index], loaded.arrangement.outputs[index]
        task = part.task
        if not task.is_merged or task.result not in dtypes.MERGEABLE or part.n == 0:
            continue
        found = first_nonfinite(loaded.block.address + at, part.n, DType[task.result])
        if found >= 0:
            raise MergeError(
                f"tensor {task.name!r}: element {part.start + found} of the result (shape "
                f"{list(task.shape)}) is too large for {dtypes.RECIPE_NAMES[task.result]}. Choose "
                "another out_dtype, or pass --nonfinite propagate to store infinity."
            )


def reads_all(entry: Entry, loaded: Loaded, index: int) -> bool:
    """Whether kernels read every input of a part, those included that its method leaves alone."""
    read = {view.address for view in (entry.base, *entry.models, *entry.scores) if view is not None}
    return all(loaded.block.address + at in read for at in loaded.arrangement.inputs[index])
