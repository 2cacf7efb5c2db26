"""Adapter to the C++ kernels of `score` and `kron`: dataclasses to addresses and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvfast import _C_cpu
from tvfast.factored import BlockDiagonal, FactoredScore, KroneckerProduct, Operand, ProductPanel
from tvfast.program import View


def _pair(view: View | None) -> tuple[int, int]:
    return (0, 0) if view is None else (view.address, int(view.dtype))


class CppProducts:
    """The product verbs of the C++ kernels at one instruction set."""

    def __init__(self, isa: str) -> None:
        self._isa = isa

    def why_not_products(self, work: Sequence[Operand]) -> str | None:
        """A reason if a tensor is not in host memory or of a type that the kernels read."""
        for operand in work:
            for role, view in operand.views():
                where = f"tensor {operand.name!r}: {role}"
                device = getattr(view.owner, "device", None)
                if device is not None and device.type != "cpu":
                    return f"{where} is on {device}"
                if str(getattr(view.owner, "dtype", "")) == "torch.float64":
                    return f"{where} is float64"
        return None

    def score_factored(self, scores: Sequence[FactoredScore], n_threads: int = 0) -> None:
        """Samples in order; a sample's gradient is never in memory as a whole."""
        _C_cpu.score_factored([_native_score(score) for score in scores], self._isa, n_threads)

    def kron(self, products: Sequence[KroneckerProduct], n_threads: int = 0) -> list[float]:
        """Reads X once; the temporaries are some tiles per thread."""
        native = [_native_product(product) for product in products]
        return list(_C_cpu.kron(native, self._isa, n_threads))

    def product_sum(self) -> CppProductSum:
        return CppProductSum(self._isa)


@dataclass(frozen=True, slots=True)
class CppProductSum:
    """`ops.raw.ProductSum` of the C++ kernels."""

    isa: str
    native: Any = field(default_factory=_C_cpu.ProductSum)

    def add(self, panel: ProductPanel, n_threads: int = 0) -> None:
        self.native.add(
            (*_pair(panel.x), panel.x_stride),
            (*_pair(panel.product), panel.product_stride),
            (*_pair(panel.out), panel.out_stride),
            panel.n_rows,
            panel.n_columns,
            panel.scale,
            panel.accumulate,
            self.isa,
            n_threads,
        )

    def value(self) -> float:
        return float(self.native.value())


def _native_score(score: FactoredScore) -> Any:
    samples = [
        (_pair(one.gradients), _pair(one.activations), one.n_tokens, one.weight) for one in score.samples
    ]
    return _C_cpu.FactoredScore(
        _pair(score.model),
        _pair(score.base),
        score.out.address,
        score.n_out,
        score.n_in,
        score.bias_column,
        samples,
    )


def _native_product(product: KroneckerProduct) -> Any:
    return _C_cpu.KroneckerProduct(
        _pair(product.x),
        _pair(product.out),
        product.n_out,
        product.n_in,
        _native_factor(product.a),
        _native_factor(product.b),
        product.scale,
        product.accumulate,
    )


def _native_factor(factor: BlockDiagonal) -> tuple[list[tuple[int, int]], int, int, bool]:
    return [_pair(block) for block in factor.blocks], factor.side, factor.block, factor.packed
