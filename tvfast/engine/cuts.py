"""Where a tensor may be cut, and how much of it fits."""

from __future__ import annotations

from tvfast.engine.arrange import Part, element_bytes
from tvfast.engine.tasks import Task, step_elements

CUT = 65536
"""Tensors are cut at multiples of it: whole pages of every storage type."""


def elements_within(task: Task, n_bytes: int) -> int:
    """How many elements of a tensor, its counterparts and result fit: whole steps, or a multiple of `CUT`."""
    linear, fixed = element_bytes(task)
    n = max(1, (n_bytes - fixed) // (linear // CUT))
    step = step_elements(task)
    if step:
        return max(1, n // step) * step
    return max(1, n // CUT) * CUT


def least_piece(task: Task) -> Part:
    """The smallest piece that a tensor can be cut into."""
    return Part(task, 0, step_elements(task) or CUT)
