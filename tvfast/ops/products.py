"""Primitives on gradients and curvature factors: torch calls in chunks and blocks, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from tvfast.ops import _check as check
from tvfast.ops._views import DTYPES, check_plain, check_same

_KINDS = {"product": "product", "square": "square", "delta": "delta"}
_CHUNK = 1 << 18  # elements; at most four float32 scratch tensors of 1 MiB each


def score(
    gradient: Tensor,
    weight: Tensor | None = None,
    *,
    kind: str = "product",
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Importance of every entry from the gradient of one sample, added to what earlier samples left.

    |g * θ| for kind="product", |g * (θ - θ₀)| for "delta", g² for "square" (the empirical Fisher's diagonal).

    Args:
        gradient: g, any shape, contiguous, float32, bfloat16 or float16; not modified.
        weight: θ of the same shape, any of the dtypes. Not read for "square".
        kind: "product", "delta" or "square".
        base: θ₀ of the same shape, any of the dtypes; for "delta" only.
        out: float32 accumulator of the same shape; the scores are added to it, not written over it.

    Returns:
        float32, the gradient's shape and device: `out` if given, otherwise a new tensor that holds this
        sample only.

    Raises:
        UnknownNameError: `kind`.
        ArgumentError: a tensor that `kind` needs is missing, or one that it does not read was given.
        ShapeError, DTypeError, DeviceError, LayoutError: tensors do not fit together, or overlap `out`.

    Notes:
        float32, one rounding per operation: the subtraction, the product, the addition. The absolute value
        is taken per call, so call it once per sample: at a converged θ the mean gradient is near zero, and
        its scores with it. Scratch is 4 MiB.

    Source: |g * θ|: Tian et al. 2024, arXiv:2411.16139 (STA), per sample; g²: Matena & Raffel 2021,
        arXiv:2111.09832.
    """
    form = check.choice("kind", kind, _KINDS)
    check.tensor("gradient", gradient)
    inputs = [("gradient", gradient)]
    for role, one, needed in (("weight", weight, form != "square"), ("base", base, form == "delta")):
        if needed and one is None:
            raise ArgumentError(
                f"kind={kind!r} reads {role}, and it is None; pass a tensor of the gradient's shape."
            )
        if not needed and one is not None and role == "base":
            raise ArgumentError(f"kind={kind!r} does not read base; expected None, or kind='delta'.")
        if needed and one is not None:
            inputs.append((role, check.tensor(role, one)))
    for role, one in inputs:
        check_plain(one, "", role)
        if one.dtype not in DTYPES:
            raise DTypeError(
                f"{role} has dtype {one.dtype}; expected float32, bfloat16 or float16. Cast it first."
            )
        check_same("", role, one, "gradient", gradient)
    if out is None:
        result = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
    else:
        check.output(out, gradient, "gradient", inputs, dtypes=[torch.float32])
        result = out.detach()
    flat = [one.detach().view(-1) for _, one in inputs]
    total = result.view(-1)
    for start in range(0, total.numel(), _CHUNK):
        g, *factors = (one[start : start + _CHUNK].to(torch.float32) for one in flat)
        factor = g if form == "square" else factors[0] if form == "product" else factors[0] - factors[1]
        total[start : start + _CHUNK] += (g * factor).abs_()
    return result if out is None else out


def kron(
    x: Tensor,
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    *,
    block: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Kronecker product B (x) A applied to a matrix, and the quadratic form it defines.

    P = B X A and <X, P> = tr(B X A Xᵀ); for symmetric A and B that is vec(X)ᵀ (B (x) A) vec(X), vec by rows,
    and its gradient is 2 P.

    Args:
        x: X, [o, i], for instance the task vector of a linear layer; any float dtype; not modified.
        a: A, [i, i], the second moment of the layer's inputs; or its diagonal blocks, see `block`.
        b: B, [o, o], the second moment of the gradients at its outputs; or its diagonal blocks.
        block: size s of the diagonal blocks where `a` or `b` is given in blocks: a sequence of ceil(i / s)
            matrices, [s, s] each but the last, which is [r, r] with r = i - s * (ceil(i / s) - 1); where s
            divides i also one tensor [i / s, s, s]. A factor that is one matrix stays dense.
        out: P, [o, i], contiguous, of the dtype of the computation; overwritten; shares no memory with the
            rest.

    Returns:
        (P, value): P is `out` if given, otherwise new; value has shape []. Both in float64 if an operand is,
        otherwise in float32, on the operands' device.

    Raises:
        ArgumentError: blocks without `block`, or a block size below 1.
        ShapeError, DTypeError, DeviceError, LayoutError: operands or `out` do not fit.

    Notes:
        Two matrix products by torch, which sets their order of summation; scratch is X A, of X's size, and
        copies of operands that are not of the dtype of the computation. Not recorded by autograd: use 2 P.

    Source: the penalty of one linear layer in TAK (Porrello et al. 2026, arXiv:2602.17385).
    """
    check.tensor("x", x)
    if x.dim() != 2:
        raise ShapeError(f"x has shape {list(x.shape)}; expected [o, i].")
    n_out, n_in = x.shape
    left = _blocks("b", b, n_out, block)
    right = _blocks("a", a, n_in, block)
    operands = [("x", x)] + [("a", one) for one in right] + [("b", one) for one in left]
    for role, one in operands:
        if not one.is_floating_point():
            raise DTypeError(f"{role} has dtype {one.dtype}; expected a float dtype.")
        check_plain(one, "", role)
        if one.device != x.device:
            raise DeviceError(f"{role} is on {one.device}, x on {x.device}; expected one device.")
    dtype = torch.float64 if any(one.dtype == torch.float64 for _, one in operands) else torch.float32
    if out is not None:
        check.output(out, x, "x", operands, dtypes=[dtype])
    matrix = x.detach().to(dtype)
    half = torch.empty(n_out, n_in, dtype=dtype, device=x.device)
    start = 0
    for one in right:
        columns = slice(start, start + one.shape[0])
        half[:, columns] = matrix[:, columns] @ one.detach().to(dtype)
        start = columns.stop
    product = torch.empty_like(half) if out is None else out.detach()
    start = 0
    for one in left:
        rows = slice(start, start + one.shape[0])
        torch.matmul(one.detach().to(dtype), half[rows], out=product[rows])
        start = rows.stop
    value = torch.dot(matrix.reshape(-1), product.view(-1))
    return (product if out is None else out), value


def _blocks(role: str, factor: Tensor | Sequence[Tensor], size: int, block: int | None) -> list[Tensor]:
    """The diagonal blocks of a factor in order; a dense one is a single block."""
    if isinstance(factor, Tensor) and factor.dim() == 2:
        if tuple(factor.shape) != (size, size):
            raise ShapeError(f"{role} has shape {list(factor.shape)}; expected [{size}, {size}] to fit x.")
        return [factor]
    if block is None:
        raise ArgumentError(
            f"{role} is given in blocks and block is None; expected the block size, or one matrix."
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ArgumentError(f"block is {block!r}; expected a positive integer.")
    found = check.models_of(role, factor)
    expected = [min(block, size - start) for start in range(0, size, block)]
    shapes = [tuple(one.shape) for one in found]
    if shapes != [(s, s) for s in expected]:
        raise ShapeError(
            f"{role} has {len(found)} blocks of shapes {sorted(set(shapes))}; expected {len(expected)}: "
            f"[{block}, {block}] each, the last [{expected[-1]}, {expected[-1]}], to fit a side of {size}."
        )
    return found
