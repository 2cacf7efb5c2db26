"""Adapter to the CUDA kernels: work tables to device memory and launches, numbers to dataclasses.

`TVFAST_SIMT=1` takes the host build of the same kernels instead, on CPU tensors: for tests without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tvfast.errors import ArgumentError
from tvfast.ops._native import check_outputs, moments_of, native_table, program_tuple, scalar_tuples
from tvfast.ops.cuda_memory import Home, Resident, device_of, native_of
from tvfast.ops.cuda_products import CudaProducts
from tvfast.ops.cuda_selection import CudaSelection
from tvfast.ops.raw import Wants
from tvfast.program import Entry, Moments, Program, TensorScalars, WorkTable

MOST_RANKS = 1 << 26
"""Ranks in device memory at a time, 256 MiB, or those of one tensor if that has more."""

LONGEST_ROW = 2**31 - 1
"""Entries of a row that are ranked."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Some entries of a table on their device, with memory for the ranks of their rows if they have any."""

    part: WorkTable
    table: Resident
    ranks: Resident | None = None
    workspace: Tensor | None = None

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return (*self.table.alive, *(self.ranks.alive if self.ranks else ()))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge with all of its numbers, ready to run as often as the data change."""

    backend: CudaBackend
    program: tuple[int, ...]
    parts: list[tuple[Ready, Resident]]
    home: Home

    def run(self) -> None:
        """Ranks, if the keep stage reads them, and the merge: a fixed number of launches.

        Nothing is allocated and nothing waits for the device, so a CUDA graph can capture it.
        """
        for ready, scalars in self.parts:
            self.home.share((*ready.memory, *scalars.alive))
            self.backend.rank(ready)
            self.backend.merge(ready, self.program, scalars)


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
        for ready in self._ready(table, program):
            part = ready.part
            own = self._scalars(scalars[len(found) : len(found) + len(part.entries)], part)
            n_entries, device = len(part.entries), device_of(part)
            self.rank(ready)
            n_bytes = self._module.measure_workspace(n_entries, table.n_models)
            workspace = torch.empty(n_bytes, dtype=torch.uint8, device=device)
            self._module.measure(
                ready.table.native,
                program_tuple(program),
                own.native,
                int(wants),
                workspace.data_ptr(),
                *self._place(device),
            )
            gathered = workspace.cpu()  # held while it is read: the module has its address only
            answers = self._module.moments(gathered.data_ptr(), n_entries, table.n_models)
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

    def prepared(self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars]) -> Prepared:
        """`combine` of a table with entries, to be run later and again.

        Ranks of rows, where the keep stage reads them, are of the data at each run, and take 4 bytes for each
        entry and model.

        Raises:
            ArgumentError: an entry has no output, or a row is too long to be ranked.
        """
        check_outputs(table)
        parts: list[tuple[Ready, Resident]] = []
        done = 0
        for ready in self._ready(table, program):
            n = len(ready.part.entries)
            parts.append((ready, self._scalars(scalars[done : done + n], ready.part)))
            done += n
        return Prepared(self, program_tuple(program), parts, Home(device_of(table)))

    def rank(self, ready: Ready) -> None:
        """Ranks the rows of the entries, if they are to be ranked."""
        if ready.ranks is None or ready.workspace is None:
            return
        place = self._place(device_of(ready.part))
        self._module.rank_rows(ready.table.native, ready.ranks.native, ready.workspace.data_ptr(), *place)

    def merge(self, ready: Ready, program: tuple[int, ...], scalars: Resident) -> None:
        """`combine` of the entries."""
        self._module.combine(ready.table.native, program, scalars.native, *self._place(device_of(ready.part)))

    def _run(self, verb: Any, table: WorkTable, program: Program, scalars: Sequence[TensorScalars]) -> None:
        done = 0
        for ready in self._ready(table, program):
            n = len(ready.part.entries)
            own = self._scalars(scalars[done : done + n], ready.part)
            self.rank(ready)
            verb(ready.table.native, program_tuple(program), own.native, *self._place(device_of(ready.part)))
            done += n

    def _ready(self, table: WorkTable, program: Program) -> Iterator[Ready]:
        """The table on its device; in parts with memory for ranks if the keep stage reads ranks."""
        if not table.entries:
            return
        if not program.ranks_rows:
            yield Ready(table, self._table(table))
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

    def _ranked(self, part: WorkTable) -> Ready:
        for entry in part.entries:
            row = min(entry.row or entry.n_elements, entry.n_elements)
            if row > LONGEST_ROW:
                raise ArgumentError(
                    f"tensor {entry.name!r} has rows of {row} elements; expected at most {LONGEST_ROW} where "
                    "ranks within rows are asked for."
                )
        device = device_of(part)
        ranks = [
            torch.empty(entry.n_elements, dtype=torch.int32, device=device)
            for entry in part.entries
            for _ in range(part.n_models)
        ]
        native = native_table(self._module, part)
        packed = self._module.ResidentTable(native, [one.data_ptr() for one in ranks])
        plan = self._module.ResidentRanks(native, *self._place(device))
        workspace = torch.empty(plan.n_workspace, dtype=torch.uint8, device=device)
        return Ready(
            part,
            self._resident(packed, device, ranks),
            self._resident(plan, device, [workspace]),
            workspace,
        )

    def _table(self, table: WorkTable) -> Resident:
        found: tuple[Resident, Home] | None = table.cache.get("cuda")
        if found is None:
            device = device_of(table)
            packed = self._module.ResidentTable(native_of(self._module, table), [])
            found = self._resident(packed, device), Home(device)
            table.cache["cuda"] = found
        resident, home = found
        home.share(resident.alive)
        return resident

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
