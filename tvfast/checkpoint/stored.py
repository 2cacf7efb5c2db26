"""Where a tensor's bytes lie, and what turns them into numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blocks:
    """Factors of a tensor of 8-bit codes: an element is the number of its code times its block's factor.

    Attributes:
        factors: one per block, row-major; None: all are 1.
        rows: of a block, over the last dimension but one.
        columns: of a block, over the last dimension.
        power_of_two: factors are powers of two.
    """

    factors: Stored | None
    rows: int
    columns: int
    power_of_two: bool = False


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a tensor: factor · B A, of [n_out, rank] and [rank, n_in].

    Attributes:
        a, b: the factors as stored, possibly with further dimensions of size 1 or of a convolution.
        rank: of both.
        factor: by which their product is multiplied.
        transposed: the tensor is [n_in, n_out], so the product is transposed.
        dtype: that the sum is rounded to.
    """

    a: Stored
    b: Stored
    rank: int
    factor: float
    transposed: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, contiguous in a file.

    Attributes:
        path, offset: of its first byte.
        starts: its first index in every dimension.
        sizes: its shape.
    """

    path: str
    offset: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of one file: contiguous, row-major, little-endian. Or one in pieces, of several files.

    Attributes:
        name: as the checkpoint calls it.
        path: of the file.
        offset: of its first byte in the file.
        n_bytes: its length.
        dtype: safetensors name of the storage type.
        shape: possibly empty.
        blocks: factors of codes; None: the bytes are the numbers.
        update: of an adapter, added to the numbers.
        pieces: disjoint boxes that make up the tensor; `offset` is then a number of the tensor, no place.
            Empty: it is whole.
    """

    name: str
    path: str
    offset: int
    n_bytes: int
    dtype: str
    shape: tuple[int, ...]
    blocks: Blocks | None = None
    update: LowRank | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def operand(self) -> str:
        """Storage type of the numbers in memory."""
        if self.update is not None:
            return self.update.dtype
        return self.dtype if self.blocks is None else "F32"

    @property
    def sides(self) -> tuple[Stored, ...]:
        """What is read beside the tensor's own bytes."""
        found = () if self.blocks is None or self.blocks.factors is None else (self.blocks.factors,)
        return found if self.update is None else (*found, self.update.a, self.update.b)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrices that a tensor holds one after the other."""
    rows = shape[-2] if len(shape) > 1 else 1
    return rows, shape[-1] if shape else 1
