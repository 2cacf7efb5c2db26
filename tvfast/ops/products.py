"""Kronecker products applied to matrices: dense, block-diagonal and square-root factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from tvfast.factored import LARGEST_BLOCK, BlockDiagonal, KroneckerProduct, ProductPanel
from tvfast.ops import _check as check
from tvfast.ops._reference_products import unpacked
from tvfast.ops._tracing import traceable
from tvfast.ops._views import DTYPES, check_plain
from tvfast.ops.raw import ProductSum, product_backend_for
from tvfast.program import DType, View

_PANEL_COLUMNS = 512
"""Columns of P that torch multiplies at a time: at 4096 rows and more its matrix product loses nothing by
panels of this width (EPYC, MKL), and the two panels are all that is in memory besides the output."""

_CAST_ROWS = 1024
"""Rows of an operand of another dtype that are cast at a time."""


@dataclass(frozen=True, slots=True)
class _Factor:
    """One side of the product: a dense matrix, or the diagonal blocks of one."""

    role: str
    tensors: list[Tensor]
    side: int
    block: int  # the side if dense
    packed: bool
    is_dense: bool = False

    def span(self, number: int) -> slice:
        return slice(number * self.block, min((number + 1) * self.block, self.side))

    def matrix(self, number: int, dtype: torch.dtype) -> Tensor:
        span = self.span(number)
        size = span.stop - span.start
        stored = self.tensors[number].detach().to(dtype)
        return unpacked(stored, size) if self.packed else stored.view(size, size)


@traceable
def kron(
    x: Tensor,
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    *,
    block: int | None = None,
    out: Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
    packed: bool = False,
    square_root: bool = False,
    n_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """The Kronecker product B (x) A applied to a matrix, and the quadratic form it defines.

    P = B X A and <X, P> = tr(B X A Xᵀ); for symmetric A and B that is vec(X)ᵀ (B (x) A) vec(X), vec by rows,
    and its gradient is 2 P.

    Args:
        x: X, [o, i], for instance the task vector of a linear layer; any float dtype; not modified.
        a: A, [i, i], the second moment of the layer's inputs; or its diagonal blocks, see `block`; or its
            square root L_A, [i, S_A].
        b: B, [o, o], the second moment of the gradients at its outputs; or its diagonal blocks; or its
            square root L_B, [o, S_B].
        block: size s of the diagonal blocks where `a` or `b` is given in blocks: a sequence of ceil(i / s)
            matrices, [s, s] each but the last, which is [r, r] with r = i - s * (ceil(i / s) - 1); where s
            divides i also one tensor [i / s, s, s]. A factor that is one matrix stays dense.
        out: [o, i], contiguous; shares no memory with the rest. Overwritten with scale * P, and then of the
            dtype of the computation; or added to.
        scale: the number by which P is multiplied before it is written; the value is not.
        accumulate: add scale * P to `out`, which may then be float32, bfloat16 or float16 whatever the
            operands are: a gradient takes 2 * penalty * P in place.
        packed: the blocks are lower triangles of symmetric matrices, by rows (the order of
            `torch.tril_indices`): [s (s + 1) / 2] each, or one tensor [i / s, s (s + 1) / 2].
        square_root: `a` and `b` are square roots: A = L_A L_Aᵀ, B = L_B L_Bᵀ, which are never formed.
        n_threads: of the kernels, 0: all cores the process may use; torch's products have torch's setting.

    Returns:
        (P, value): P is `out` if given, otherwise a new tensor of scale * P; value = <X, P> has shape [].
        Both in float64 if an operand is, otherwise in float32 (`out` as it is), on the operands' device.

    Raises:
        ArgumentError: blocks without `block`, a block size below 1, `accumulate` without `out`, both
            `square_root` and `block` or `packed`, `scale` or `n_threads`.
        ShapeError, DTypeError, DeviceError, LayoutError: operands or `out` do not fit.

    Notes:
        The value is summed in the order-independent accumulator over exact products, and rounded once; on a
        GPU that waits for the device.
        Factors of at most 128 a side, or in blocks of at most 128: one fused pass that reads X once and needs
        some tiles of scratch per thread; chains of fused multiply-adds, so the bits depend on neither threads
        nor instruction set (docs/numerics.md, "Products"). Otherwise two matrix products by torch, which sets
        their order of summation, in panels of 512 columns; value, scale and output are taken from a panel
        while it is in the cache. Scratch is two panels, or for square roots X L_A, and casts of parts of
        operands that are not of the dtype of the computation. Not recorded by autograd: use 2 P.

    Source: the penalty of one linear layer in TAK (Porrello et al. 2026, arXiv:2602.17385).
    """
    check.tensor("x", x)
    if x.dim() != 2:
        raise ShapeError(f"x has shape {list(x.shape)}; expected [o, i].")
    if square_root and (block is not None or packed):
        raise ArgumentError("square_root was given with block or packed; expected roots [o, S] and [i, S].")
    n_threads = check.threads(n_threads)
    (factor,) = check.weights_of(scale, 1, "scale")
    n_out, n_in = x.shape
    parse = _root if square_root else _blocks
    left, right = parse("b", b, n_out, block, packed), parse("a", a, n_in, block, packed)
    operands = [("x", x)] + [(side.role, one) for side in (right, left) for one in side.tensors]
    _check_operands(operands)
    dtype = torch.float64 if any(one.dtype == torch.float64 for _, one in operands) else torch.float32
    if out is not None:
        allowed = [dtype, *(other for other in DTYPES if accumulate and other != dtype)]
        check.output(out, x, "x", operands, dtypes=allowed)
    elif accumulate:
        raise ArgumentError("accumulate is set and out is None; expected the tensor that is added to.")
    result = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out.detach()
    target = _Target(result, factor, accumulate, n_threads)
    matrix = x.detach()
    if square_root:
        value = _by_roots(matrix, right.tensors[0], left.tensors[0], dtype, target)
    else:
        found = _fused(matrix, right, left, dtype, target)
        value = _by_panels(matrix, right, left, dtype, target) if found is None else found
    return (result if out is None else out), torch.tensor(value, dtype=dtype, device=x.device)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a product goes."""

    out: Tensor
    scale: float
    accumulate: bool
    n_threads: int

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether a matrix product in `dtype` may be written into `out` itself."""
        return not self.accumulate and self.scale == 1.0 and self.out.dtype == dtype


def _check_operands(operands: Sequence[tuple[str, Tensor]]) -> None:
    device = operands[0][1].device
    for role, one in operands:
        if not one.is_floating_point():
            raise DTypeError(f"{role} has dtype {one.dtype}; expected a float dtype.")
        check_plain(one, "", role)
        if one.device != device:
            raise DeviceError(f"{role} is on {one.device}, x on {device}; expected one device.")


def _fused(x: Tensor, right: _Factor, left: _Factor, dtype: torch.dtype, target: _Target) -> float | None:
    """<X, P> by the kernels for blocks, or None if the operands are not for them."""
    tensors = [x, target.out, *right.tensors, *left.tensors]
    if max(right.block, left.block) > LARGEST_BLOCK:
        return None
    if dtype != torch.float32 or any(one.dtype not in DTYPES for one in tensors):
        return None
    product = KroneckerProduct(
        name="tensor",
        x=_view(x),
        n_out=left.side,
        n_in=right.side,
        a=_block_diagonal(right),
        b=_block_diagonal(left),
        out=_view(target.out),
        scale=target.scale,
        accumulate=target.accumulate,
    )
    return product_backend_for([product]).kron([product], target.n_threads)[0]


def _block_diagonal(factor: _Factor) -> BlockDiagonal:
    blocks = tuple(_view(one.detach()) for one in factor.tensors)
    return BlockDiagonal(blocks=blocks, side=factor.side, block=factor.block, packed=factor.packed)


def _by_panels(x: Tensor, right: _Factor, left: _Factor, dtype: torch.dtype, target: _Target) -> float:
    """X A and B (X A), some columns at a time."""
    total = _product_sum(x, dtype, target)
    n_out, n_in = x.shape
    width = _PANEL_COLUMNS
    if not right.is_dense:
        width = max(1, _PANEL_COLUMNS // right.block) * right.block
    half_panel = torch.empty(n_out, min(width, n_in), dtype=dtype, device=x.device)
    for start in range(0, n_in, width):
        columns = slice(start, min(start + width, n_in))
        half = half_panel[:, : columns.stop - start]
        if right.is_dense:
            _multiply(x, right.tensors[0].detach()[:, columns].to(dtype), half)
        else:
            for number in range(start // right.block, -(-columns.stop // right.block)):
                span = right.span(number)
                place = half[:, span.start - start : span.stop - start]
                _multiply(x[:, span], right.matrix(number, dtype), place)
        panel = _panel_of(target, columns, dtype)
        if left.is_dense:
            _multiply(left.tensors[0].detach(), half, panel)
        else:
            for number in range(len(left.tensors)):
                span = left.span(number)
                _multiply(left.matrix(number, dtype), half[span], panel[span])
        _finish(total, x, panel, columns, target)
    return total.value()


def _by_roots(x: Tensor, right: Tensor, left: Tensor, dtype: torch.dtype, target: _Target) -> float:
    """M = L_Bᵀ X L_A, <X, P> = <M, M>, and P = L_B (M L_Aᵀ), some columns at a time."""
    total = _product_sum(x, dtype, target)
    root_a, root_b = right.detach().to(dtype), left.detach().to(dtype)
    half = torch.empty(x.shape[0], root_a.shape[1], dtype=dtype, device=x.device)
    _multiply(x, root_a, half)
    middle = root_b.T @ half
    del half
    squared = _panel(middle, middle, None, target)
    total.add(squared, target.n_threads)
    writing = _product_sum(x, dtype, target)
    for start in range(0, x.shape[1], _PANEL_COLUMNS):
        columns = slice(start, min(start + _PANEL_COLUMNS, x.shape[1]))
        panel = _panel_of(target, columns, dtype)
        torch.matmul(root_b, middle @ root_a[columns].T, out=panel)
        if not target.takes(dtype):
            _finish(writing, x, panel, columns, target)
    return total.value()


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left right; rows of `left` are cast to the dtype of `right` some at a time."""
    if left.dtype == right.dtype:
        torch.matmul(left, right, out=out)
        return
    for start in range(0, left.shape[0], _CAST_ROWS):
        rows = slice(start, start + _CAST_ROWS)
        torch.matmul(left[rows].to(right.dtype), right, out=out[rows])


def _panel_of(target: _Target, columns: slice, dtype: torch.dtype) -> Tensor:
    """Where a panel of P is multiplied: the output itself if it takes P as it is."""
    place = target.out[:, columns]
    return place if target.takes(dtype) else torch.empty(place.shape, dtype=dtype, device=place.device)


def _product_sum(x: Tensor, dtype: torch.dtype, target: _Target) -> ProductSum:
    if dtype == torch.float32 and x.dtype in DTYPES and target.out.dtype in DTYPES:
        probe = _panel(x[:0], x[:0].to(dtype), target.out[:0], target)
        return product_backend_for([probe]).product_sum()
    from tvfast.ops.reference import backend

    return backend(dtype).product_sum()


def _finish(total: ProductSum, x: Tensor, panel: Tensor, columns: slice, target: _Target) -> None:
    out = None if target.takes(panel.dtype) else target.out[:, columns]
    total.add(_panel(x[:, columns], panel, out, target), target.n_threads)


def _panel(x: Tensor, product: Tensor, out: Tensor | None, target: _Target) -> ProductPanel:
    return ProductPanel(
        name="tensor",
        n_rows=x.shape[0],
        n_columns=x.shape[1],
        x=_view(x),
        x_stride=x.stride(0),
        product=_view(product),
        product_stride=product.stride(0),
        out=None if out is None else _view(out),
        out_stride=0 if out is None else out.stride(0),
        scale=target.scale,
        accumulate=target.accumulate,
    )


def _view(tensor: Tensor) -> View:
    """Rows that need not follow one another; float64 is marked as in `_views.view`."""
    return View(tensor.data_ptr(), tensor.numel(), DTYPES.get(tensor.dtype, DType.F32), tensor)


def _root(
    role: str, factor: Tensor | Sequence[Tensor], size: int, block: int | None, packed: bool
) -> _Factor:
    root = check.tensor(role, factor)
    if root.dim() != 2 or root.shape[0] != size:
        raise ShapeError(f"{role} has shape {list(root.shape)}; expected a square root [{size}, S] to fit x.")
    return _Factor(role, [root], size, size, packed=False, is_dense=True)


def _blocks(
    role: str, factor: Tensor | Sequence[Tensor], size: int, block: int | None, packed: bool
) -> _Factor:
    """The diagonal blocks of a factor in order; a dense one is a single block."""
    if isinstance(factor, Tensor) and factor.dim() == 2 and (not packed or factor.shape == (size, size)):
        if tuple(factor.shape) != (size, size):
            raise ShapeError(f"{role} has shape {list(factor.shape)}; expected [{size}, {size}] to fit x.")
        return _Factor(role, [factor], size, max(1, size), packed=False, is_dense=True)
    if block is None:
        raise ArgumentError(
            f"{role} is given in blocks and block is None; expected the block size, or one matrix."
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ArgumentError(f"block is {block!r}; expected a positive integer.")
    found = check.models_of(role, factor)
    sides = [min(block, size - start) for start in range(0, size, block)]
    expected = [(s * (s + 1) // 2,) if packed else (s, s) for s in sides]
    shapes = [tuple(one.shape) for one in found]
    if shapes != expected:
        raise ShapeError(
            f"{role} has {len(found)} blocks of shapes {sorted(set(shapes))}; expected {len(expected)}: "
            f"{list(expected[0])} each, the last {list(expected[-1])}, to fit a side of {size}."
        )
    return _Factor(role, found, size, block, packed)
