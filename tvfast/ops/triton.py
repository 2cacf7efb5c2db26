"""Adapter to the Triton kernels: work tables to launches, integers to dataclasses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from tvfast.errors import ArgumentError
from tvfast.kernels import launch as kernels
from tvfast.kernels import layers, selection
from tvfast.kernels.lanes import INTERPRETED
from tvfast.kernels.ranking import ranked_launches
from tvfast.kernels.table import Launch, launches
from tvfast.ops._native import check_ranked, check_ranks
from tvfast.ops.cuda_memory import Home
from tvfast.ops.raw import Wants
from tvfast.ops.triton_products import TritonProducts, why_not_on
from tvfast.program import (
    Keep,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    WorkTable,
)

_QUIET_NAN = 0x7FC00000


class TritonBackend(TritonProducts):
    """The Triton kernels, on a GPU or in Triton's interpreter."""

    name = "triton"

    @property
    def detail(self) -> str:
        where = "in its interpreter" if INTERPRETED.value else "on GPUs"
        return f"triton {triton.__version__}, {where}"

    def why_not(self, table: WorkTable) -> str | None:
        """A reason if a tensor is not on the one GPU of the table, or is of another float type."""
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
        return why_not_on(devices)

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        """Exact k-th largest keys.

        Raises:
            ArgumentError: k is not in [1, number of entries of the group].
        """
        check_ranked(keep)
        check_ranks(table, queries)
        if not queries:
            return []
        device = _device(table)
        with kernels.on_device(device):
            found = selection.thresholds(_launches(table), keep, queries, table.n_groups, device).tolist()
        return [Threshold(_magnitude(key), greater, equal) for key, greater, equal in found]

    def nth_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float, int]],
        n_threads: int = 0,
    ) -> list[int]:
        """Group positions of the r-th entries whose key equals a value.

        Raises:
            ArgumentError: fewer than r + 1 entries equal the value.
        """
        check_ranked(keep)
        if not queries:
            return []
        device = _device(table)
        asked = [(group, model, _key(value), r) for group, model, value, r in queries]
        n_groups = max(table.n_groups, 1 + max(group for group, *_ in queries))
        with kernels.on_device(device):
            positions: list[int]
            positions, numbers = selection.nth_equal(
                _launches(table), table.entries, keep, asked, n_groups, device
            )
        for (group, model, value, r), position, number in zip(queries, positions, numbers, strict=True):
            if position < 0:
                raise ArgumentError(
                    f"group {group}, model {model}: {number} entries equal {value}; "
                    f"expected more than r = {r}."
                )
        return positions

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        """One `Moments` per entry; fields that are not asked for are zero."""
        n = table.n_models
        blank = kernels.Measured([[0.0] * (3 * n + n * n)], [[0] * (4 * n + 3)])
        found = [_moments(blank, 0, n, wants) for _ in table.entries]
        for launch in _ready(table, program):
            # products with scores that are not there are zero
            own = wants if launch.kind.scored else wants & ~Wants.DOTS
            with kernels.on_device(launch.fields.device):
                measured = kernels.measure(launch, program, scalars, int(own))
            for place, number in enumerate(launch.numbers):
                found[number] = _moments(measured, place, n, own)
        return found

    def score(self, table: WorkTable, scalars: Sequence[TensorScalars], n_threads: int = 0) -> None:
        """Adds |score_k * d_k| * weight_k, models in order."""
        for launch in _ready(table, Program()):
            with kernels.on_device(launch.fields.device):
                layers.score(launch, scalars)

    def row_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """Writes kept_k, NaN entries included, into the entries' bit planes; padding bits become zero."""
        for launch in _ready(table, program):
            with kernels.on_device(launch.fields.device):
                kernels.planes(launch, program, scalars)

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
        for launch in _ready(table, program):
            with kernels.on_device(launch.fields.device):
                kernels.combine(launch, program, scalars)


def _device(table: WorkTable) -> torch.device:
    owner: Tensor = table.entries[0].models[0].owner
    return owner.device


def _launches(table: WorkTable) -> list[Launch]:
    """The table on its device, made once; streams that use it later wait for it, and its memory for them."""
    found: tuple[list[Launch], Home] | None = table.cache.get("triton")
    if found is None:
        device = _device(table)
        made = launches(table.entries, range(len(table.entries)), table.n_models, device)
        found = made, Home(device)
        table.cache["triton"] = found
    made, home = found
    home.share(memory for launch in made for memory in (launch.fields, launch.first_tiles))
    return made


def _ready(table: WorkTable, program: Program) -> Iterator[Launch]:
    if not table.entries:
        return
    if not program.ranks_rows:
        yield from _launches(table)
        return
    for batch in ranked_launches(table.entries, table.n_models, _device(table)):
        yield from batch


def _magnitude(key: int) -> float:
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def _key(value: float) -> int:
    if value != value:
        return _QUIET_NAN
    return int(torch.tensor(abs(value), dtype=torch.float32).view(torch.int32))


def _moments(measured: kernels.Measured, place: int, n: int, wants: Wants) -> Moments:
    sums, counts = measured.sums[place], measured.counts[place]
    gram = [[sums[2 * n + min(j, k) * n + max(j, k)] for k in range(n)] for j in range(n)]
    return Moments(
        l1_before=sums[:n],
        l1=sums[n : 2 * n],
        gram=gram,
        n_kept=counts[:n],
        n_nonzero=counts[n : 2 * n],
        n_nonfinite=counts[2 * n : 3 * n],
        n_base_nonfinite=counts[3 * n],
        elected=counts[3 * n + 1],
        n_conflict=counts[3 * n + 2],
        n_alone=counts[3 * n + 3 : 4 * n + 3] if wants & Wants.ALONE else [0] * n,
        dots=sums[2 * n + n * n : 3 * n + n * n] if wants & Wants.DOTS else [0.0] * n,
    )


def backend() -> TritonBackend:
    """The Triton backend.

    Raises:
        ImportError: no GPU that torch can use, and not in the interpreter.
    """
    if not INTERPRETED.value and not torch.cuda.is_available():
        raise ImportError("torch finds no GPU, and TRITON_INTERPRET=1 was not set for the interpreter")
    return TritonBackend()
