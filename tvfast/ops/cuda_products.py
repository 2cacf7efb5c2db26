"""Adapter to the CUDA kernels of `score` and `kron`: dataclasses to addresses and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from tvfast.factored import FactoredScore, KroneckerProduct, Operand, ProductPanel
from tvfast.ops._native import native_product, native_score, panel_tuple
from tvfast.program import View


class CudaProducts:
    """The product verbs of the CUDA kernels; sums are read back, so `kron` waits for the device."""

    _module: ModuleType

    def _why_not_on(self, device: torch.device) -> str | None:
        raise NotImplementedError

    def _place(self, device: torch.device) -> tuple[int, int]:
        raise NotImplementedError

    def why_not_products(self, work: Sequence[Operand]) -> str | None:
        """A reason if a tensor is not on the one GPU of the work, or is of another float type."""
        devices = set()
        for operand in work:
            for role, view in operand.views():
                if not isinstance(view.owner, Tensor):
                    return f"tensor {operand.name!r}: {role} has no torch tensor as owner"
                if view.owner.dtype == torch.float64:
                    return f"tensor {operand.name!r}: {role} is float64"
                devices.add(view.owner.device)
        if len(devices) > 1:
            return f"tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
        return next((self._why_not_on(device) for device in devices), None)

    def score_factored(self, scores: Sequence[FactoredScore], n_threads: int = 0) -> None:
        """Samples in order; a sample's gradient is a chain of tile products in registers."""
        for score in scores:
            device = _device(score.out)
            native = native_score(self._module, score)
            workspace = _bytes(self._module.score_factored_workspace(native), device)
            self._module.score_factored(native, workspace.data_ptr(), *self._place(device))

    def kron(self, products: Sequence[KroneckerProduct], n_threads: int = 0) -> list[float]:
        """A block of threads for each pair of diagonal blocks; X is read once."""
        values = []
        for product in products:
            device = _device(product.x)
            place = self._place(device)
            native = native_product(self._module, product)
            workspace = _bytes(self._module.kron_workspace(native, *place), device)
            dot = self._empty_sum(device)
            self._module.kron(native, workspace.data_ptr(), dot.data_ptr(), *place)
            values.append(self._value(dot))
        return values

    def product_sum(self) -> CudaProductSum:
        return CudaProductSum(self)

    def _empty_sum(self, device: torch.device) -> Tensor:
        return torch.zeros(self._module.DOT_BYTES, dtype=torch.uint8, device=device)

    def _value(self, dot: Tensor) -> float:
        gathered = dot.cpu()  # held while it is read: the module has its address only
        return float(self._module.dot_value(gathered.data_ptr()))


class CudaProductSum:
    """`ops.raw.ProductSum` of the CUDA kernels."""

    def __init__(self, backend: CudaProducts) -> None:
        self._backend = backend
        self._dot: Tensor | None = None

    def add(self, panel: ProductPanel, n_threads: int = 0) -> None:
        device = _device(panel.x)
        if self._dot is None:
            self._dot = self._backend._empty_sum(device)
        place = self._backend._place(device)
        self._backend._module.finish_product(*panel_tuple(panel), self._dot.data_ptr(), *place)

    def value(self) -> float:
        return 0.0 if self._dot is None else self._backend._value(self._dot)


def _device(view: View) -> torch.device:
    owner: Tensor = view.owner
    return owner.device


def _bytes(n_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)
