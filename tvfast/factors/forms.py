"""A symmetric positive semidefinite matrix as a dense one, diagonal blocks, a diagonal, or a square root."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, ShapeError

F = TypeVar("F", bound="Factor")


class Factor(ABC):
    """A symmetric positive semidefinite matrix S of side `size`.

    Factors do not change. `plus` and `minus` take a factor of the same form, side and block.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """n: S is [n, n]."""

    @abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """The tensors that hold it."""

    @abstractmethod
    def right(self, x: Tensor) -> Tensor:
        """X S, for X [..., m, n]; new."""

    @abstractmethod
    def left(self, x: Tensor) -> Tensor:
        """S X, for X [..., n, m]; new."""

    @abstractmethod
    def dense(self) -> Tensor:
        """S, [n, n]; may be the factor's own memory."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of S, [n]; new."""

    @abstractmethod
    def scaled(self: F, factor: float) -> F:
        """factor · S, factor >= 0."""

    @abstractmethod
    def plus(self: F, other: F) -> F:
        """S + S'."""

    @abstractmethod
    def minus(self: F, other: F) -> F:
        """S - S'."""

    @abstractmethod
    def leading(self: F, n: int) -> F:
        """The leading n rows and columns: a factor without its bias column."""

    @abstractmethod
    def to(self: F, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> F:
        """On a device, in a dtype."""

    def shrunk(self, share: float) -> Factor:
        """share · S + (1 - share) · diag(S): off-diagonals times `share`, the diagonal as it is."""
        if share == 1.0:
            return self
        matrix = self.dense() * share
        matrix.diagonal(dim1=-2, dim2=-1).copy_(self.diagonal())
        return Dense(matrix)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parts()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parts()).device

    @property
    def n_bytes(self) -> int:
        """Memory of its tensors."""
        return sum(part.numel() * part.element_size() for part in self.parts())

    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return all(bool(torch.isfinite(part).all()) for part in self.parts())

    def _alike(self, other: Factor) -> None:
        if type(other) is not type(self) or other.size != self.size:
            raise ShapeError(
                f"a {type(other).__name__} factor of side {other.size} was added to a {type(self).__name__} "
                f"factor of side {self.size}; expected one form and size. Collect both alike."
            )


@dataclass(frozen=True, eq=False)
class Dense(Factor):
    """The matrix itself, [n, n]; with leading dimensions a batch of them."""

    matrix: Tensor

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    def parts(self) -> Iterator[Tensor]:
        yield self.matrix

    def right(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def left(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def dense(self) -> Tensor:
        return self.matrix

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1).clone()

    def scaled(self, factor: float) -> Dense:
        return Dense(self.matrix * factor)

    def plus(self, other: Dense) -> Dense:
        self._alike(other)
        return Dense(self.matrix + other.matrix)

    def minus(self, other: Dense) -> Dense:
        self._alike(other)
        return Dense(self.matrix - other.matrix)

    def leading(self, n: int) -> Dense:
        return Dense(self.matrix[..., :n, :n].contiguous())

    def lifted(self, added: float) -> Dense:
        """S + added · I."""
        matrix = self.matrix.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(added)
        return Dense(matrix)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.matrix.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Diagonal(Factor):
    """A diagonal matrix by its diagonal, [n]."""

    values: Tensor

    @property
    def size(self) -> int:
        return self.values.shape[-1]

    def parts(self) -> Iterator[Tensor]:
        yield self.values

    def right(self, x: Tensor) -> Tensor:
        return x * self.values

    def left(self, x: Tensor) -> Tensor:
        return x * self.values[:, None]

    def dense(self) -> Tensor:
        return torch.diag(self.values)

    def diagonal(self) -> Tensor:
        return self.values.clone()

    def shrunk(self, share: float) -> Factor:
        return self

    def scaled(self, factor: float) -> Diagonal:
        return Diagonal(self.values * factor)

    def plus(self, other: Diagonal) -> Diagonal:
        self._alike(other)
        return Diagonal(self.values + other.values)

    def minus(self, other: Diagonal) -> Diagonal:
        self._alike(other)
        return Diagonal(self.values - other.values)

    def leading(self, n: int) -> Diagonal:
        return Diagonal(self.values[:n])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Diagonal:
        return Diagonal(self.values.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Blocks(Factor):
    """Diagonal blocks.

    Attributes:
        whole: [n // b, b, b].
        rest: [r, r], r = n - b * (n // b); [0, 0] where b divides n.
    """

    whole: Tensor
    rest: Tensor

    @property
    def block(self) -> int:
        """b, the side of a block."""
        return self.whole.shape[-1]

    @property
    def size(self) -> int:
        return self.whole.shape[0] * self.block + self.rest.shape[0]

    def parts(self) -> Iterator[Tensor]:
        yield self.whole
        yield self.rest

    def blocks(self) -> Tensor | list[Tensor]:
        """As `tvfast.ops.kron` takes them."""
        return [*self.whole, self.rest] if self.rest.shape[0] else self.whole

    def right(self, x: Tensor) -> Tensor:
        n_whole, b = self.whole.shape[:2]
        cut = n_whole * b
        out = torch.empty(*x.shape[:-1], self.size, dtype=x.dtype, device=x.device)
        split = x[..., :cut].reshape(*x.shape[:-1], n_whole, b).movedim(-2, 0)
        out[..., :cut] = (split.flatten(1, -2) @ self.whole).movedim(0, -2).reshape(*x.shape[:-1], cut)
        out[..., cut:] = x[..., cut:] @ self.rest
        return out

    def left(self, x: Tensor) -> Tensor:
        n_whole, b = self.whole.shape[:2]
        cut = n_whole * b
        out = torch.empty_like(x)
        split = x[..., :cut, :].reshape(*x.shape[:-2], n_whole, b, x.shape[-1])
        out[..., :cut, :] = (self.whole @ split).flatten(-3, -2)
        out[..., cut:, :] = self.rest @ x[..., cut:, :]
        return out

    def dense(self) -> Tensor:
        matrix = self.whole.new_zeros(self.size, self.size)
        start = 0
        for part in (*self.whole, self.rest):
            stop = start + part.shape[0]
            matrix[start:stop, start:stop] = part
            start = stop
        return matrix

    def diagonal(self) -> Tensor:
        return torch.cat([self.whole.diagonal(dim1=-2, dim2=-1).flatten(), self.rest.diagonal()])

    def shrunk(self, share: float) -> Factor:
        if share == 1.0:
            return self
        return Blocks(
            Dense(self.whole).shrunk(share).dense(),
            Dense(self.rest).shrunk(share).dense(),
        )

    def scaled(self, factor: float) -> Blocks:
        return Blocks(self.whole * factor, self.rest * factor)

    def plus(self, other: Blocks) -> Blocks:
        self._alike(other)
        return Blocks(self.whole + other.whole, self.rest + other.rest)

    def minus(self, other: Blocks) -> Blocks:
        self._alike(other)
        return Blocks(self.whole - other.whole, self.rest - other.rest)

    def leading(self, n: int) -> Blocks:
        n_whole = n // self.block
        side = n - n_whole * self.block
        last = self.whole[n_whole] if n_whole < len(self.whole) else self.rest
        return Blocks(self.whole[:n_whole], last[:side, :side].contiguous())

    def lifted(self, added: float) -> Blocks:
        """S + added · I."""
        return Blocks(Dense(self.whole).lifted(added).matrix, Dense(self.rest).lifted(added).matrix)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Blocks:
        return Blocks(self.whole.to(device=device, dtype=dtype), self.rest.to(device=device, dtype=dtype))

    def _alike(self, other: Factor) -> None:
        super()._alike(other)
        if isinstance(other, Blocks) and other.block != self.block:
            raise ShapeError(
                f"a factor of blocks of {other.block} was added to one of blocks of {self.block}; expected "
                "one block size. Collect both alike."
            )


@dataclass(frozen=True, eq=False)
class Root(Factor):
    """A square root L, [n, S]: the matrix is L Lᵀ. A sum puts roots side by side."""

    root: Tensor

    @property
    def size(self) -> int:
        return self.root.shape[0]

    def parts(self) -> Iterator[Tensor]:
        yield self.root

    def right(self, x: Tensor) -> Tensor:
        return (x @ self.root) @ self.root.T

    def left(self, x: Tensor) -> Tensor:
        return self.root @ (self.root.T @ x)

    def dense(self) -> Tensor:
        return self.root @ self.root.T

    def diagonal(self) -> Tensor:
        return self.root.square().sum(1)

    def scaled(self, factor: float) -> Root:
        return Root(self.root * factor**0.5)

    def plus(self, other: Root) -> Root:
        self._alike(other)
        return Root(torch.cat([self.root, other.root], dim=1))

    def minus(self, other: Root) -> Root:
        raise ArgumentError(
            "a square root cannot be subtracted from another; expected dense factors or blocks. Add the "
            "roots that are to stay instead."
        )

    def leading(self, n: int) -> Root:
        return Root(self.root[:n])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Root:
        return Root(self.root.to(device=device, dtype=dtype))


def block_shapes(size: int, block: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Shapes of `Blocks.whole` and `Blocks.rest`."""
    n_whole, rest = divmod(size, block)
    return (n_whole, block, block), (rest, rest)


def pack(matrix: Tensor) -> Tensor:
    """The upper triangles of [..., n, n] by rows, [..., n (n + 1) / 2]; new."""
    n = matrix.shape[-1]
    packed = matrix.new_empty(*matrix.shape[:-2], n * (n + 1) // 2)
    start = 0
    for row in range(n):
        packed[..., start : start + n - row] = matrix[..., row, row:]
        start += n - row
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """The symmetric matrices [..., n, n] of upper triangles; new.

    Raises:
        ShapeError: there are not n (n + 1) / 2 elements.
    """
    if packed.shape[-1] != n * (n + 1) // 2:
        raise ShapeError(
            f"a packed triangle has {packed.shape[-1]} elements; expected {n * (n + 1) // 2} for a side "
            f"of {n}."
        )
    matrix = packed.new_empty(*packed.shape[:-1], n, n)
    start = 0
    for row in range(n):
        part = packed[..., start : start + n - row]
        matrix[..., row, row:] = part
        matrix[..., row:, row] = part
        start += n - row
    return matrix
