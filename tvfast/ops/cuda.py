"""Adapter to the CUDA kernels: work tables to device memory and launches, numbers to dataclasses.

`TVFAST_SIMT=1` takes the host build of the same kernels instead, on CPU tensors: for tests without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tvfast.errors import ArgumentError
from tvfast.ops._native import native_table, program_tuple, scalar_tuples
from tvfast.program import Program, TensorScalars, WorkTable


@dataclass(frozen=True, slots=True)
class _Resident:
    """A packed table or packed scalars, and the device memory that holds the copy."""

    native: Any
    memory: Tensor


class CudaBackend:
    """The CUDA kernels on GPUs, or their host build on the CPU."""

    name = "cuda"

    def __init__(self, module: ModuleType, emulated: bool) -> None:
        self._module = module
        self._emulated = emulated

    @property
    def detail(self) -> str:
        if self._emulated:
            return "host build of the kernels, for tests"
        return f"sm_{self._module.architectures()}; {self._module.device_name(torch.cuda.current_device())}"

    def why_not(self, table: WorkTable) -> str | None:
        """A reason if a tensor is not on the one GPU of the table, or is of another float type."""
        if self._emulated and os.environ.get("TVFAST_BACKEND") != self.name:
            return "the host build, which TVFAST_SIMT chose, runs only where TVFAST_BACKEND=cuda asks"
        devices = set()
        for entry in table.entries:
            for view in (entry.base, entry.out, *entry.models, *entry.scores, *entry.masks):
                if view is None:
                    continue
                if not isinstance(view.owner, Tensor):
                    return f"tensor {entry.name!r} has no torch tensor as owner"
                if view.owner.dtype == torch.float64:
                    return f"tensor {entry.name!r} is float64"
                devices.add(view.owner.device)
        if len(devices) > 1:
            return f"tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
        return next((self._why_not_on(device) for device in devices), None)

    def _why_not_on(self, device: torch.device) -> str | None:
        expected = "cpu" if self._emulated else "cuda"
        if device.type != expected:
            return f"tensors are on {device}; expected {expected}"
        try:
            self._module.require(device.index or 0)
        except self._module.DeviceError as error:
            return str(error)
        return None

    def combine(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """Writes every entry's `out`; `out` may be the base or a model."""
        for entry in table.entries:
            if entry.out is None:
                raise ArgumentError(f"tensor {entry.name!r}: combine needs an output; found out=None.")
        if not table.entries:
            return
        device = _device(table)
        resident = self._table(table, device)
        own = self._resident(self._module.ResidentScalars(*scalar_tuples(scalars)), device)
        self._module.combine(resident.native, program_tuple(program), own.native, *self._place(device))

    def _table(self, table: WorkTable, device: torch.device) -> _Resident:
        found: _Resident | None = table.cache.get("cuda")
        if found is None:
            packed = self._module.ResidentTable(native_table(self._module, table), [])
            found = self._resident(packed, device)
            table.cache["cuda"] = found
        return found

    def _resident(self, native: Any, device: torch.device) -> _Resident:
        memory = torch.empty(native.n_bytes, dtype=torch.uint8, device=device)
        native.upload(memory.data_ptr(), *self._place(device))
        return _Resident(native, memory)

    def _place(self, device: torch.device) -> tuple[int, int]:
        """Number of the device, and torch's current stream there."""
        if self._emulated:
            return 0, 0
        return device.index or 0, torch.cuda.current_stream(device).cuda_stream


def _device(table: WorkTable) -> torch.device:
    owner: Tensor = table.entries[0].models[0].owner
    return owner.device


@cache
def backend() -> CudaBackend:
    """The CUDA backend.

    Raises:
        ImportError: tvfast was built without its CUDA module, or torch finds no GPU.
    """
    if os.environ.get("TVFAST_SIMT") == "1":
        from tvfast import _C_simt

        return CudaBackend(_C_simt, emulated=True)
    try:
        from tvfast import _C_cuda
    except ImportError as error:
        raise ImportError(
            f"no CUDA module ({error}); install with nvcc at hand, or with TVFAST_CUDA=ON to see why not"
        ) from error
    if not torch.cuda.is_available():
        raise ImportError("torch finds no GPU; a driver or a CUDA build of torch is missing")
    return CudaBackend(_C_cuda, emulated=False)
