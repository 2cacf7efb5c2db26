"""B X A and <X, B X A> for factors of any form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tvfast import ops
from tvfast.factors.forms import Blocks, Dense, Factor, Root


def kron_value(x: Tensor, a: Factor, b: Factor) -> tuple[Tensor, Tensor]:
    """P = B X A and <X, P> = vec(X)ᵀ (B (x) A) vec(X), vec by rows.

    Args:
        x: X, [o, i], contiguous, float32, float64 or bfloat16; not modified.
        a: A, of side i, of the device and dtype of X.
        b: B, of side o.

    Returns:
        P, [o, i], new, of the dtype of X; the value, of shape [], at least float32.

    Notes:
        Dense factors, blocks and square roots are `tvfast.ops.kron`; with roots the cost is 2 S o i per
        product with one, and no matrix has the side o or i twice. The larger temporary is of X's size.
    """
    operands = _operands(x, a, b)
    if operands is not None:
        return ops.kron(x, **operands)
    product = b.left(a.right(x))
    return product, inner(x, product)


def add_kron(x: Tensor, a: Factor, b: Factor, out: Tensor, scale: float) -> Tensor:
    """Adds scale · B X A to a contiguous `out` of any float dtype, rounded once; returns <X, B X A>.

    Args and Notes: as `kron_value`, whose product is not in memory as a whole here.
    """
    operands = _operands(x, a, b)
    if operands is not None:
        return ops.kron(x, **operands, out=out, scale=scale, accumulate=True)[1]
    product, value = kron_value(x, a, b)
    out.add_(product, alpha=scale)
    return value


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<X, Y>, of shape [], at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.dot(x.to(wide).flatten(), y.to(wide).flatten())


def _operands(x: Tensor, a: Factor, b: Factor) -> dict[str, Any] | None:
    """Factors as arguments of `tvfast.ops.kron`; None where it does not take them."""
    if x.dtype not in (torch.float32, torch.float64):
        return None
    if isinstance(a, Root) and isinstance(b, Root):
        return {"a": a.root.contiguous(), "b": b.root.contiguous(), "square_root": True}
    if not isinstance(a, Dense | Blocks) or not isinstance(b, Dense | Blocks):
        return None
    blocks = {factor.block for factor in (a, b) if isinstance(factor, Blocks)}
    if len(blocks) > 1:
        return None
    return {"a": _operand(a), "b": _operand(b), "block": next(iter(blocks), None)}


def _operand(factor: Dense | Blocks) -> Tensor | list[Tensor]:
    return factor.matrix.contiguous() if isinstance(factor, Dense) else factor.blocks()
