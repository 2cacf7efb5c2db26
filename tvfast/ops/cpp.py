"""Adapter to the C++ kernels: work tables to addresses, numbers to dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvfast import _C_cpu
from tvfast.errors import ArgumentError
from tvfast.ops._native import moments_of, native_table, program_tuple, scalar_tuples
from tvfast.ops.cpp_products import CppProducts
from tvfast.ops.raw import OCTAVES, AccumulatorStates, Look, Wants
from tvfast.program import (
    Keep,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    WorkTable,
)


def isas() -> list[str]:
    """Instruction sets that this build holds and this processor can run, best first."""
    return list(_C_cpu.isas())


def _native_table(table: WorkTable) -> Any:
    native = table.cache.get("cpp")
    if native is None:
        native = native_table(_C_cpu, table)
        table.cache["cpp"] = native
    return native


def _native_scalars(scalars: Sequence[TensorScalars]) -> Any:
    return _C_cpu.Scalars(*scalar_tuples(scalars))


class CppBackend(CppProducts):
    """The C++ kernels at one instruction set."""

    name = "cpp"

    def __init__(self, isa: str = "", tile: int = 0) -> None:
        super().__init__(isa)
        self._tile = tile

    @property
    def detail(self) -> str:
        isa = self._isa or _C_cpu.default_isa()
        return f"{isa}; this processor can run {', '.join(isas())}; {_C_cpu.available_threads()} threads"

    def why_not(self, table: WorkTable) -> str | None:
        for entry in table.entries:
            for view in (entry.base, entry.out, *entry.models, *entry.scores):
                device = getattr(getattr(view, "owner", None), "device", None)
                if device is not None and device.type != "cpu":
                    return f"tensor {entry.name!r} is on {device}"
                dtype = str(getattr(getattr(view, "owner", None), "dtype", ""))
                if dtype == "torch.float64":
                    return f"tensor {entry.name!r} is float64"
        return None

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        asked = [(q.group, q.model, q.k) for q in queries]
        found = _C_cpu.thresholds(_native_table(table), int(keep), asked, self._isa, n_threads, self._tile)
        return [Threshold(*answer) for answer in found]

    def nth_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float, int]],
        n_threads: int = 0,
    ) -> list[int]:
        asked = list(queries)
        return list(
            _C_cpu.nth_equal(_native_table(table), int(keep), asked, self._isa, n_threads, self._tile)
        )

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        found = _C_cpu.measure(
            _native_table(table),
            program_tuple(program),
            _native_scalars(scalars),
            int(wants),
            self._isa,
            n_threads,
            self._tile,
        )
        return [moments_of(answer, table.n_models) for answer in found]

    def score(self, table: WorkTable, scalars: Sequence[TensorScalars], n_threads: int = 0) -> None:
        _C_cpu.score(_native_table(table), _native_scalars(scalars), self._isa, n_threads, self._tile)

    def row_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        self.measured_masks(table, program, scalars, Wants(0), n_threads)

    def measured_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        found = _C_cpu.row_masks(
            _native_table(table),
            program_tuple(program),
            _native_scalars(scalars),
            int(wants),
            self._isa,
            n_threads,
            self._tile,
        )
        return [moments_of(answer, table.n_models) for answer in found]

    def combine(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        self.combine_looking(table, program, scalars, Look(0), n_threads)

    def combine_looking(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        look: Look,
        n_threads: int = 0,
    ) -> Look:
        return Look(
            _C_cpu.combine(
                _native_table(table),
                program_tuple(program),
                _native_scalars(scalars),
                int(look),
                self._isa,
                n_threads,
                self._tile,
            )
        )

    def select(self, keep: Keep, queries: Sequence[RankQuery], group_sizes: Sequence[int]) -> CppSelection:
        asked = [(q.group, q.model, q.k) for q in queries]
        native = _C_cpu.ResumableSelection(int(keep), asked, list(group_sizes))
        return CppSelection(native, self._isa, self._tile)

    def accumulate(self, n_entries: int, n_models: int) -> CppAccumulation:
        return CppAccumulation(_C_cpu.Accumulation(n_entries, n_models), n_models, self._isa, self._tile)

    def partition(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, Sequence[int]]],
        n_threads: int = 0,
    ) -> list[list[int]]:
        asked = [(group, model, list(edges)) for group, model, edges in queries]
        found = _C_cpu.partition(_native_table(table), int(keep), asked, self._isa, n_threads, self._tile)
        return [list(counts) for counts in found]

    def count_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float]],
        n_threads: int = 0,
    ) -> list[list[int]]:
        n, asked = len(queries), list(queries)
        counts = _C_cpu.count_equal(_native_table(table), int(keep), asked, self._isa, n_threads, self._tile)
        return [counts[e * n : (e + 1) * n] for e in range(len(table.entries))]

    def count_octaves(self, table: WorkTable, n_threads: int = 0) -> list[list[list[int]]]:
        counts = _C_cpu.count_octaves(_native_table(table), self._isa, n_threads, self._tile)
        rows = [counts[at : at + OCTAVES] for at in range(0, len(counts), OCTAVES)]
        k = table.n_models
        return [rows[e * k : (e + 1) * k] for e in range(len(table.entries))]


@dataclass(frozen=True, slots=True)
class CppSelection:
    """`ops.raw.Selection` of the C++ kernels."""

    native: Any
    isa: str
    tile: int

    def sample(self, part: WorkTable, n_threads: int = 0) -> None:
        self.native.sample(_native_table(part), self.isa, n_threads)

    def guesses(self, n_threads: int = 0) -> list[tuple[float, bool]]:
        return list(self.native.guesses(n_threads))

    def count(self, part: WorkTable, n_threads: int = 0) -> None:
        self.native.count(_native_table(part), self.isa, n_threads, self.tile)

    def finish(self) -> list[Threshold] | None:
        found = self.native.finish()
        return None if found is None else [Threshold(*answer) for answer in found]


@dataclass(frozen=True, slots=True)
class CppAccumulation:
    """`ops.raw.Accumulation` of the C++ kernels."""

    native: Any
    n_models: int
    isa: str
    tile: int

    def measure(
        self,
        part: WorkTable,
        rows: Sequence[int],
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> None:
        self.native.measure(
            _native_table(part),
            program_tuple(program),
            _native_scalars(scalars),
            int(wants),
            list(rows),
            self.isa,
            n_threads,
            self.tile,
        )

    def states(self) -> AccumulatorStates:
        return AccumulatorStates(*self.native.states())

    def finish(self) -> list[Moments]:
        return [moments_of(answer, self.n_models) for answer in self.native.finish()]


@cache
def backend(isa: str | None = None, tile: int = 0) -> CppBackend:
    """The C++ backend.

    Args:
        isa: an instruction set of `isas()`; None: the best, or the one that `TVFAST_ISA` names.
        tile: elements that a thread takes at a time; 0: chosen by the kernels. No result depends on it.

    Raises:
        ArgumentError: `isa`, or `TVFAST_ISA`, names an instruction set that cannot run here.
    """
    try:
        if isa is None:
            _C_cpu.default_isa()
        elif isa not in isas():
            raise ValueError(f"instruction set {isa!r} cannot run here; expected one of {', '.join(isas())}")
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    return CppBackend(isa or "", tile)
