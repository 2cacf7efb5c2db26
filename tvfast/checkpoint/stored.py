"""Where a tensor's bytes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of one file: contiguous, row-major, little-endian.

    Attributes:
        name: as the checkpoint calls it.
        path: of the file.
        offset: of its first byte in the file.
        n_bytes: its length.
        dtype: safetensors name of the storage type.
        shape: possibly empty.
    """

    name: str
    path: str
    offset: int
    n_bytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)
