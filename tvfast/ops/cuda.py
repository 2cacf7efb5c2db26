"""Adapter to the CUDA kernels: work tables to device memory and launches, numbers to dataclasses.

`TVFAST_SIMT=1` takes the host build of the same kernels instead, on CPU tensors: for tests without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tvfast.ops._native import check_outputs, moments_of, native_table, program_tuple, scalar_tuples
from tvfast.ops.cuda_products import CudaProducts
from tvfast.ops.cuda_selection import CudaSelection, Resident, device_of, native_of
from tvfast.ops.raw import Wants
from tvfast.program import Entry, Moments, Program, TensorScalars, WorkTable

MOST_RANKS = 1 << 26
"""Ranks in device memory at a time, 256 MiB, or those of one tensor if that has more."""


class CudaBackend(CudaProducts, CudaSelection):
    """The CUDA kernels on GPUs, or their host build on the CPU."""

    name = "cuda"

    def __init__(self, module: ModuleType, emulated: bool) -> None:
        self._module = module
        self._emulated = emulated
        self.limits = module.LIMITS

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

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        """One `Moments` per entry; fields that are not asked for are zero. Waits for the device."""
        found: list[Moments] = []
        for part, resident in self._ready(table, program):
            own = self._scalars(scalars[len(found) : len(found) + len(part.entries)], part)
            n_entries, device = len(part.entries), device_of(part)
            n_bytes = self._module.measure_workspace(n_entries, table.n_models)
            workspace = torch.empty(n_bytes, dtype=torch.uint8, device=device)
            self._module.measure(
                resident.native,
                program_tuple(program),
                own.native,
                int(wants),
                workspace.data_ptr(),
                *self._place(device),
            )
            answers = self._module.moments(workspace.cpu().data_ptr(), n_entries, table.n_models)
            found += [moments_of(answer, table.n_models) for answer in answers]
        return found

    def score(self, table: WorkTable, scalars: Sequence[TensorScalars], n_threads: int = 0) -> None:
        """Adds |score_k * d_k| * weight_k, models in order, to every entry's float32 `out`."""
        if not table.entries:
            return
        own = self._scalars(scalars, table)
        self._module.score(self._table(table).native, own.native, *self._place(device_of(table)))

    def row_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """Writes kept_k, NaN entries included, into the entries' bit planes; padding bits become zero."""
        self._run(self._module.row_masks, table, program, scalars)

    def combine(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """Writes every entry's `out`; `out` may be the base or a model."""
        check_outputs(table)
        self._run(self._module.combine, table, program, scalars)

    def _run(self, verb: Any, table: WorkTable, program: Program, scalars: Sequence[TensorScalars]) -> None:
        done = 0
        for part, resident in self._ready(table, program):
            own = self._scalars(scalars[done : done + len(part.entries)], part)
            verb(resident.native, program_tuple(program), own.native, *self._place(device_of(part)))
            done += len(part.entries)

    def _ready(self, table: WorkTable, program: Program) -> Iterator[tuple[WorkTable, Resident]]:
        """The table on its device; in parts with the ranks of their rows if the keep stage reads ranks."""
        if not table.entries:
            return
        if not program.ranks_rows:
            yield table, self._table(table)
            return
        batch: list[Entry] = []
        n_ranks = 0
        for entry in table.entries:
            if batch and n_ranks + table.n_models * entry.n_elements > MOST_RANKS:
                yield self._ranked(WorkTable(batch, table.n_models))
                batch, n_ranks = [], 0
            batch.append(entry)
            n_ranks += table.n_models * entry.n_elements
        yield self._ranked(WorkTable(batch, table.n_models))

    def _ranked(self, part: WorkTable) -> tuple[WorkTable, Resident]:
        device = device_of(part)
        ranks = [
            torch.empty(entry.n_elements, dtype=torch.int32, device=device)
            for entry in part.entries
            for _ in range(part.n_models)
        ]
        native = native_table(self._module, part)
        packed = self._module.ResidentTable(native, [one.data_ptr() for one in ranks])
        resident = self._resident(packed, device, ranks)
        plan = self._module.RankPlan(native, *self._place(device))
        workspace = torch.empty(plan.n_bytes, dtype=torch.uint8, device=device)
        self._module.rank_rows(resident.native, plan, workspace.data_ptr(), *self._place(device))
        return part, resident

    def _table(self, table: WorkTable) -> Resident:
        found: Resident | None = table.cache.get("cuda")
        if found is None:
            packed = self._module.ResidentTable(native_of(self._module, table), [])
            found = self._resident(packed, device_of(table))
            table.cache["cuda"] = found
        return found

    def _scalars(self, scalars: Sequence[TensorScalars], part: WorkTable) -> Resident:
        return self._resident(self._module.ResidentScalars(*scalar_tuples(scalars)), device_of(part))

    def _resident(self, native: Any, device: torch.device, alive: Sequence[Tensor] = ()) -> Resident:
        memory = torch.empty(native.n_bytes, dtype=torch.uint8, device=device)
        native.upload(memory.data_ptr(), *self._place(device))
        return Resident(native, (memory, *alive))

    def _place(self, device: torch.device) -> tuple[int, int]:
        """Number of the device, and torch's current stream there."""
        if self._emulated:
            return 0, 0
        return device.index or 0, torch.cuda.current_stream(device).cuda_stream


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
        why = "" if error.name == "tvfast" else f" ({error})"  # absent, or there and not to be loaded
        raise ImportError(
            f"no CUDA module in this build{why}; install with nvcc at hand, or with TVFAST_CUDA=ON to see why"
        ) from error
    if not torch.cuda.is_available():
        raise ImportError("torch finds no GPU; a driver or a CUDA build of torch is missing")
    return CudaBackend(_C_cuda, emulated=False)
