"""Adapter to the Triton kernels of `score` and `kron`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from tvfast.factored import FactoredScore, KroneckerProduct, Operand, ProductPanel
from tvfast.kernels import layers
from tvfast.kernels.lanes import INTERPRETED
from tvfast.kernels.launch import on_device
from tvfast.program import View


def why_not_on(devices: AbstractSet[torch.device]) -> str | None:
    """A reason if the kernels cannot run on these devices, of which there must be at most one."""
    if INTERPRETED.value and os.environ.get("TVFAST_BACKEND") != "triton":
        return "the interpreter, which TRITON_INTERPRET chose, runs only where TVFAST_BACKEND=triton asks"
    if len(devices) > 1:
        return f"tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    for device in devices:
        if INTERPRETED.value and device.type != "cpu":
            return f"tensors are on {device}; the interpreter takes CPU tensors"
        if not INTERPRETED.value and device.type != "cuda":
            return f"tensors are on {device}; expected a GPU, or TRITON_INTERPRET=1 for the interpreter"
    return None


class TritonProducts:
    """The product verbs of the Triton kernels; sums are read back, so `kron` waits for the device."""

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
        return why_not_on(devices)

    def score_factored(self, scores: Sequence[FactoredScore], n_threads: int = 0) -> None:
        """Samples in order; a sample's gradient is a chain of tile products in registers."""
        for score in scores:
            device = _device(score.out)
            with on_device(device):
                layers.score_factored(score, device)

    def kron(self, products: Sequence[KroneckerProduct], n_threads: int = 0) -> list[float]:
        """A program instance for each block, or for some columns of a large one."""
        values = []
        for product in products:
            device = _device(product.x)
            with on_device(device):
                values.append(layers.kron(product, device))
        return values

    def product_sum(self) -> TritonProductSum:
        return TritonProductSum()


class TritonProductSum:
    """`ops.raw.ProductSum` of the Triton kernels."""

    def __init__(self) -> None:
        self._sum: tuple[Tensor, Tensor] | None = None

    def add(self, panel: ProductPanel, n_threads: int = 0) -> None:
        device = _device(panel.x)
        if self._sum is None:
            self._sum = layers.empty_sum(device)
        with on_device(device):
            layers.finish(panel, *self._sum)

    def value(self) -> float:
        return 0.0 if self._sum is None else layers.sum_of(*self._sum)


def _device(view: View) -> torch.device:
    owner: Tensor = view.owner
    return owner.device
