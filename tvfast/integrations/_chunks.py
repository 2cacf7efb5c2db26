"""Parts of tensors that stay in the cache, for arithmetic that torch does."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

CHUNK = 1 << 17
"""Elements. Several of them in float32 fit a cache of the second level or a share of the third."""


def flat_chunks(n_elements: int) -> Iterator[slice]:
    """Parts of a flat tensor; all but the last are whole vectors, so that torch treats each entry alike."""
    for start in range(0, n_elements, CHUNK):
        yield slice(start, min(start + CHUNK, n_elements))


def row_chunks(tensor: Tensor) -> Iterator[slice]:
    """Rows along the last dimension; parts begin at multiples of 64 entries, where bit planes can be cut."""
    columns = max(1, tensor.shape[-1] if tensor.dim() else 1)
    n_rows = tensor.numel() // columns
    least = 64 // math.gcd(64, columns)
    step = max(1, CHUNK // columns // least) * least
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
