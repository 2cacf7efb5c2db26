"""Gradients and curvature of linear layers in factored form, as plain data: what `score` and `kron` work on.

Twin of csrc/core/factored.hpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvfast.program import View

LARGEST_BLOCK = 128
"""Diagonal blocks up to this side are multiplied by the fused kernels."""


class Operand(Protocol):
    """What the choice of a backend needs to know of one piece of work."""

    @property
    def name(self) -> str: ...

    def views(self) -> Iterator[tuple[str, View]]:
        """Role and memory of every tensor that is read or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoredSample:
    """One sample of a linear layer, R = `n_tokens`: its weight gradient is G = sum over r of e_r a_rᵀ."""

    gradients: View  # e, [R, n_out]: gradients at the layer's outputs
    activations: View  # a, [R, n_in], or [R, n_in - 1] with a bias column
    n_tokens: int
    weight: float = 1.0  # of the sample in the sum of scores


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoredScore:
    """Scores of a layer from per-sample gradients in factored form, added to `out`.

    |θ ⊙ G|, with a base |(θ - θ₀) ⊙ G|, without a model G².
    """

    name: str
    samples: tuple[FactoredSample, ...]
    n_out: int
    n_in: int
    out: View  # [n_out, n_in] float32
    model: View | None = None  # θ, [n_out, n_in]
    base: View | None = None  # θ₀
    bias_column: bool = False  # the last of the n_in columns is the bias: its activation is 1

    @property
    def n_activations(self) -> int:
        """Columns that activations have in memory."""
        return self.n_in - self.bias_column

    def views(self) -> Iterator[tuple[str, View]]:
        yield "out", self.out
        if self.model is not None:
            yield "weight", self.model
        if self.base is not None:
            yield "base", self.base
        for j, sample in enumerate(self.samples):
            yield f"gradient[{j}]", sample.gradients
            yield f"activations[{j}]", sample.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDiagonal:
    """The diagonal blocks of a square matrix; the last is smaller where `block` does not divide `side`."""

    blocks: tuple[View, ...]
    side: int
    block: int
    packed: bool = False  # each block is the lower triangle of a symmetric matrix, by rows

    def span(self, number: int) -> slice:
        """Rows, and columns, of one block."""
        return slice(number * self.block, min((number + 1) * self.block, self.side))


@dataclass(frozen=True, slots=True, kw_only=True)
class KroneckerProduct:
    """P = B X A for block-diagonal A and B: `out` becomes scale * P, or what it was plus that."""

    name: str
    x: View  # [n_out, n_in]
    n_out: int
    n_in: int
    a: BlockDiagonal
    b: BlockDiagonal
    out: View | None = None  # [n_out, n_in]; None: only the dot product is wanted
    scale: float = 1.0
    accumulate: bool = False

    def views(self) -> Iterator[tuple[str, View]]:
        yield "x", self.x
        if self.out is not None:
            yield "out", self.out
        for role, factor in (("a", self.a), ("b", self.b)):
            for number, block in enumerate(factor.blocks):
                yield f"{role}[{number}]", block


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductPanel:
    """Some columns of a product P that is in memory, [n_rows, n_columns], next to those of X and of `out`.

    Addresses are those of the first element; strides are elements from row to row.
    """

    name: str
    n_rows: int
    n_columns: int
    x: View
    x_stride: int
    product: View  # float32
    product_stride: int
    out: View | None = None  # becomes scale * P, or what it was plus that; may be `product` itself
    out_stride: int = 0
    scale: float = 1.0
    accumulate: bool = False

    def views(self) -> Iterator[tuple[str, View]]:
        yield "x", self.x
        yield "product", self.product
        if self.out is not None:
            yield "out", self.out


Work = Sequence[Operand]
