"""B X A and <X, B X A> for factors of any form."""

from __future__ import annotations

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
        Dense factors and blocks are `tvfast.ops.kron`. With roots the cost is 2 S o i per product with one:
        never a matrix of side o or i. The larger temporary is of X's size.
    """
    fused = x.dtype in (torch.float32, torch.float64) and _one_block(a, b)
    if fused and isinstance(a, Dense | Blocks) and isinstance(b, Dense | Blocks):
        block = next((f.block for f in (a, b) if isinstance(f, Blocks)), None)
        return ops.kron(x, _operand(a), _operand(b), block=block)
    if isinstance(a, Root) and isinstance(b, Root):
        narrow = torch.linalg.multi_dot([b.root.T, x, a.root])  # [S_b, S_a]
        return torch.linalg.multi_dot([b.root, narrow, a.root.T]), inner(narrow, narrow)
    product = b.left(a.right(x))
    return product, inner(x, product)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<X, Y>, of shape [], at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.dot(x.to(wide).flatten(), y.to(wide).flatten())


def _operand(factor: Dense | Blocks) -> Tensor | list[Tensor]:
    return factor.matrix if isinstance(factor, Dense) else factor.blocks()


def _one_block(a: Factor, b: Factor) -> bool:
    return not (isinstance(a, Blocks) and isinstance(b, Blocks) and a.block != b.block)
