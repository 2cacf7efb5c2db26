"""Adapter to the C++ kernels of `score` and `kron`: dataclasses to addresses and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tvfast import _C_cpu
from tvfast.ops._native import native_product, native_score, panel_tuple

if TYPE_CHECKING:
    from tvfast.factored import FactoredScore, KroneckerProduct, Operand, ProductPanel


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
        _C_cpu.score_factored([native_score(_C_cpu, score) for score in scores], self._isa, n_threads)

    def kron(self, products: Sequence[KroneckerProduct], n_threads: int = 0) -> list[float]:
        """Reads X once; the temporaries are some tiles per thread."""
        native = [native_product(_C_cpu, product) for product in products]
        return list(_C_cpu.kron(native, self._isa, n_threads))

    def product_sum(self) -> CppProductSum:
        return CppProductSum(self._isa)


@dataclass(frozen=True, slots=True)
class CppProductSum:
    """`ops.raw.ProductSum` of the C++ kernels."""

    isa: str
    native: Any = field(default_factory=_C_cpu.ProductSum)

    def add(self, panel: ProductPanel, n_threads: int = 0) -> None:
        self.native.add(*panel_tuple(panel), self.isa, n_threads)

    def value(self) -> float:
        return float(self.native.value())
