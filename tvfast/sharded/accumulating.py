"""Moments in parts where the backend of the tensors has no resumable form: with torch, on their device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tvfast.ops._exact_sum_torch import BinnedSum
from tvfast.ops.raw import AccumulatorStates, Wants
from tvfast.ops.reference import Reference, Sums
from tvfast.program import Moments, Program, TensorScalars, WorkTable
from tvfast.sharded.sums import moments_of_states, parts_of

_NO_WINDOW = -1000


class TorchAccumulation:
    """`ops.raw.Accumulation` by the reference backend, in float32 or float64."""

    def __init__(self, n_entries: int, n_models: int, *, double: bool) -> None:
        self._reference = Reference(torch.float64 if double else torch.float32)
        self._n_models = n_models
        self._sums: list[Sums[BinnedSum]] = [Sums.of(n_models, BinnedSum) for _ in range(n_entries)]
        self._counts = [Moments.empty(n_models) for _ in range(n_entries)]

    def measure(
        self,
        part: WorkTable,
        rows: Sequence[int],
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> None:
        for entry, row, own in zip(part.entries, rows, scalars, strict=True):
            self._reference.accumulate(entry, program, own, wants, self._sums[row], self._counts[row])

    def states(self) -> AccumulatorStates:
        windows: list[int] = []
        parts: list[int] = []
        nonfinite: list[float] = []
        counts: list[int] = []
        for sums, moments in zip(self._sums, self._counts, strict=True):
            for one in sums.in_order():
                window, high, low, other = one.state()
                windows.append(_NO_WINDOW if window is None else window)
                parts += [*parts_of(high), *parts_of(low)]
                nonfinite.append(other)
            for of_models in (moments.n_kept, moments.n_nonzero, moments.n_nonfinite, moments.n_alone):
                counts += of_models
            counts += [moments.n_base_nonfinite, moments.elected, moments.n_conflict]
        return AccumulatorStates(windows, parts, nonfinite, counts)

    def finish(self) -> list[Moments]:
        return moments_of_states(self.states(), self._n_models)
