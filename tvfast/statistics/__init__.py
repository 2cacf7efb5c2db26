"""Statistics files: importance, Fisher information and Kronecker factors of a model, as sums and counts.

The schema is in `docs/statistics.md`. Reading and writing need no torch; `tvfast.statistics.tensors` turns
sums into tensors and back.
"""

from __future__ import annotations

from tvfast.statistics.forms import StoredForm
from tvfast.statistics.merging import merge_statistics
from tvfast.statistics.reading import StatisticsFile, open_statistics
from tvfast.statistics.records import (
    Array,
    Document,
    Entry,
    Model,
    Record,
    Role,
    Shared,
    Summary,
    tensor_name,
)
from tvfast.statistics.writing import StatisticsWriter

__all__ = [
    "Array",
    "Document",
    "Entry",
    "Model",
    "Record",
    "Role",
    "Shared",
    "StatisticsFile",
    "StatisticsWriter",
    "StoredForm",
    "Summary",
    "merge_statistics",
    "open_statistics",
    "tensor_name",
]
