"""Grids and compile-time choices of `score` and `kron`: what runs their kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from tvfast.kernels.kron import finish_kernel, kron_kernel
from tvfast.kernels.lanes import BF16, F16, MIXED
from tvfast.kernels.launch import EXACT, block_of
from tvfast.kernels.score import DELTA, PRODUCT, SQUARE, factored_kernel, score_kernel
from tvfast.kernels.sums import LIMBS, WINDOWS
from tvfast.kernels.table import Kind, Launch, device_scalars
from tvfast.kernels.totals import total

from tvfast.factored import BlockDiagonal, FactoredScore, KroneckerProduct, ProductPanel
from tvfast.program import TensorScalars, View

FINISH_TILE = {"ROWS": 8, "COLUMNS": 128}
_SMALLEST_DOT = 16

TILED = {**EXACT, "num_warps": 8}
"""Options of the kernels that multiply tiles: with 4 warps their accumulators spill."""


def score_constants(kind: Kind, n_models: int) -> dict[str, Any]:
    """Compile-time arguments of `score_kernel`."""
    return {
        "DTYPE": kind.dtype,
        "HAS_BASE": kind.has_base,
        "ALIGNED": kind.aligned,
        "BLOCK": block_of(n_models),
    }


def score(launch: Launch, scalars: Sequence[TensorScalars]) -> None:
    """Adds the scores of a launch's entries."""
    own = device_scalars(launch, scalars)
    score_kernel[(launch.n_tiles,)](
        launch.fields,
        launch.stride,
        launch.first_tiles,
        len(launch.numbers),
        own.reals,
        launch.n_models,
        **score_constants(launch.kind, launch.n_models),
        **EXACT,
    )


def factored_tile(dtype: int) -> dict[str, int]:
    """What a program instance of `factored_kernel` computes; products in float32 hold more in registers."""
    wide = dtype in (BF16.value, F16.value)
    return {"ROWS": 64, "COLUMNS": 64 if wide else 32, "DEPTH": _SMALLEST_DOT}


def factored_constants(layer: FactoredScore) -> dict[str, Any]:
    """Compile-time arguments of `factored_kernel`."""
    views = [view for one in layer.samples for view in (one.gradients, one.activations)]
    kind = SQUARE if layer.model is None else PRODUCT if layer.base is None else DELTA
    dtype = _dtype_of(views)
    return {
        "KIND": kind.value,
        "BIAS": int(layer.bias_column),
        "DTYPE": dtype,
        "MODEL_DTYPE": 0 if layer.model is None else int(layer.model.dtype),
        "BASE_DTYPE": 0 if layer.base is None else int(layer.base.dtype),
        **factored_tile(dtype),
    }


def score_factored(layer: FactoredScore, device: torch.device) -> None:
    """Adds the scores of one layer; samples without tokens add nothing."""
    samples = [one for one in layer.samples if one.n_tokens > 0]
    if not samples or layer.n_out == 0 or layer.n_in == 0:
        return
    fields = [
        [
            one.gradients.address,
            int(one.gradients.dtype),
            one.activations.address,
            int(one.activations.dtype),
            one.n_tokens,
        ]
        for one in samples
    ]
    weights = torch.tensor([one.weight for one in samples], dtype=torch.float32)
    constants = factored_constants(layer)
    n_tiles = triton.cdiv(layer.n_out, constants["ROWS"]) * triton.cdiv(layer.n_in, constants["COLUMNS"])
    factored_kernel[(n_tiles,)](
        torch.tensor(fields, dtype=torch.int64).to(device),
        weights.to(device),
        len(samples),
        _address(layer.model),
        _address(layer.base),
        _address(layer.out),
        layer.n_out,
        layer.n_in,
        **constants,
        **TILED,
    )


def kron_tile(a_block: int, b_block: int) -> dict[str, int]:
    """What a program instance of `kron_kernel` computes: all rows of a block of P and some of its columns."""
    rows = max(_SMALLEST_DOT, triton.next_power_of_2(b_block))
    columns = max(_SMALLEST_DOT, triton.next_power_of_2(a_block))
    return {"ROWS": rows, "COLUMNS": min(columns, 32 if rows > 64 else 64), "DEPTH": _SMALLEST_DOT}


def kron_constants(product: KroneckerProduct) -> dict[str, Any]:
    """Compile-time arguments of `kron_kernel`."""
    return {
        "X_DTYPE": int(product.x.dtype),
        "DTYPE": _dtype_of([*product.a.blocks, *product.b.blocks]),
        "PACKED": product.a.packed,
        "OUT_DTYPE": 0 if product.out is None else int(product.out.dtype),
        "HAS_OUT": product.out is not None,
        "ACCUMULATE": product.accumulate,
        **kron_tile(product.a.block, product.b.block),
    }


def kron(product: KroneckerProduct, device: torch.device) -> float:
    """<X, P>, and P where the product says; waits for the device."""
    if product.n_out == 0 or product.n_in == 0:
        return 0.0
    limbs, nonfinite = empty_sum(device)
    constants = kron_constants(product)
    n_parts = triton.cdiv(product.a.block, constants["COLUMNS"])
    n_tiles = len(product.b.blocks) * len(product.a.blocks) * n_parts
    kron_kernel[(n_tiles,)](
        _address(product.x),
        _address(product.out),
        product.n_out,
        product.n_in,
        _block_table(product.a, device),
        _block_table(product.b, device),
        len(product.a.blocks),
        product.a.block,
        product.b.block,
        product.scale,
        limbs,
        nonfinite,
        **constants,
        **TILED,
    )
    return sum_of(limbs, nonfinite)


def finish_constants(panel: ProductPanel) -> dict[str, Any]:
    """Compile-time arguments of `finish_kernel`."""
    return {
        "X_DTYPE": int(panel.x.dtype),
        "OUT_DTYPE": 0 if panel.out is None else int(panel.out.dtype),
        "HAS_OUT": panel.out is not None,
        "ACCUMULATE": panel.accumulate,
        **FINISH_TILE,
    }


def finish(panel: ProductPanel, limbs: Tensor, nonfinite: Tensor) -> None:
    """Adds a panel's share to a sum of `empty_sum`, and writes its output."""
    if panel.n_rows == 0 or panel.n_columns == 0:
        return
    constants = finish_constants(panel)
    n_tiles = triton.cdiv(panel.n_rows, constants["ROWS"]) * triton.cdiv(
        panel.n_columns, constants["COLUMNS"]
    )
    finish_kernel[(n_tiles,)](
        _address(panel.x),
        panel.x_stride,
        _address(panel.product),
        panel.product_stride,
        _address(panel.out),
        panel.out_stride,
        panel.n_rows,
        panel.n_columns,
        panel.scale,
        limbs,
        nonfinite,
        **constants,
        **TILED,
    )


def empty_sum(device: torch.device) -> tuple[Tensor, Tensor]:
    """[WINDOWS, LIMBS] int64 and [1] float64: an order-independent sum before its first addend."""
    limbs = torch.zeros(WINDOWS.value, LIMBS.value, dtype=torch.int64, device=device)
    return limbs, torch.zeros(1, dtype=torch.float64, device=device)


def sum_of(limbs: Tensor, nonfinite: Tensor) -> float:
    """The sum, rounded once; waits for the device."""
    return total(limbs.tolist(), nonfinite.item())


def _address(view: View | None) -> int:
    return 0 if view is None else view.address


def _dtype_of(views: Iterable[View]) -> int:
    dtypes = {int(view.dtype) for view in views}
    return dtypes.pop() if len(dtypes) == 1 else MIXED.value


def _block_table(factor: BlockDiagonal, device: torch.device) -> Tensor:
    rows = [[block.address, int(block.dtype)] for block in factor.blocks]
    return torch.tensor(rows, dtype=torch.int64).to(device)
