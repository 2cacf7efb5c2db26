"""Where a tensor may be cut, and how much of it fits."""

from __future__ import annotations

from tvfast.engine.arrange import Part, block_bytes
from tvfast.engine.tasks import Task, row_elements

CUT = 65536
"""Tensors are cut at multiples of it: whole pages of every storage type."""


def elements_within(task: Task, n_bytes: int) -> int:
    """How many elements of a tensor, its counterparts and result fit: a multiple of `CUT` and of its rows."""
    one = Part(task, 0, CUT)
    slack = block_bytes(one) - one.input_bytes - one.output_bytes
    n = max(1, (n_bytes - slack) // ((one.input_bytes + one.output_bytes) // CUT))
    row = row_elements(task)
    if row:
        return max(1, n // row) * row
    return max(1, n // CUT) * CUT


def least_piece(task: Task) -> Part:
    """The smallest piece that a tensor can be cut into."""
    return Part(task, 0, row_elements(task) or CUT)
