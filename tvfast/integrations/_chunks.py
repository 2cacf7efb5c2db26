"""Parts of tensors that stay in the cache, for arithmetic that torch does."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK = 1 << 18
"""Elements. Several of them in float32 fit a cache of the second level or a share of the third."""


def flat_chunks(n_elements: int) -> Iterator[slice]:
    """Parts of a flat tensor; all but the last are whole vectors, so that torch treats each entry alike."""
    for start in range(0, n_elements, CHUNK):
        yield slice(start, min(start + CHUNK, n_elements))


def row_chunks(tensor: Tensor) -> Iterator[slice]:
    """Rows along the last dimension, in multiples of 64, so that bit planes can be cut there."""
    columns = max(1, tensor.shape[-1] if tensor.dim() else 1)
    n_rows = tensor.numel() // columns
    step = max(64, CHUNK // columns // 64 * 64)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
