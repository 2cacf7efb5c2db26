"""The torch-free face of ops: backends over work tables of (address, length, dtype)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from tvfast.errors import ArgumentError, BackendError
from tvfast.program import (
    Keep,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    WorkTable,
)

if TYPE_CHECKING:
    from tvfast.factored import FactoredScore, KroneckerProduct, Operand, ProductPanel


class Wants(IntFlag):
    """Which fields of `Moments` a measurement fills."""

    L1_BEFORE = 1
    L1 = 2
    GRAM = 4
    COUNTS = 8  # n_kept, n_nonzero, n_nonfinite, n_base_nonfinite
    VOTES = 16  # elected, n_conflict
    SQUARES = 32  # the diagonal of the Gram matrix only
    DOTS = 64  # dots: products with the entries' `scores`
    ALONE = 128  # n_alone
    LAST = 256  # with GRAM: all that is needed of it is the diagonal, and products with the last model


SUMS = Wants.L1_BEFORE | Wants.L1 | Wants.GRAM | Wants.SQUARES | Wants.DOTS
"""Those that are sums in the accumulator; the others are counts."""


class Look(IntFlag):
    """What is searched for NaN and infinity while it is combined."""

    INPUTS = 1  # base, models and scores
    RESULTS = 2


class Backend(Protocol):
    """What every backend implements; `docs/architecture.md` gives the contract."""

    name: str

    def why_not(self, table: WorkTable) -> str | None:
        """None if the table can be processed, otherwise the reason."""

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]: ...

    def nth_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float, int]],
        n_threads: int = 0,
    ) -> list[int]: ...

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]: ...

    def row_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None: ...

    def combine(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None: ...


class Selection(Protocol):
    """`thresholds` of groups whose entries come in parts, in constant memory.

    First some parts are sampled. Then every part is counted once, in any order, and `finish` tells whether
    that was enough: it usually is. The sample decides how many passes are needed, never an answer.
    """

    def sample(self, part: WorkTable, n_threads: int = 0) -> None: ...

    def guesses(self, n_threads: int = 0) -> list[tuple[float, bool]]:
        """Per query the value that the sample suggests, and whether another would be a surprise."""

    def count(self, part: WorkTable, n_threads: int = 0) -> None: ...

    def finish(self) -> list[Threshold] | None:
        """The answers; None: every part must be counted once more."""


@dataclass(frozen=True, slots=True)
class AccumulatorStates:
    """Accumulators of logical entries as they are, one entry after the other.

    Sums of an entry are `l1_before`, `l1`, `gram` row by row (its upper triangle), `dots`; counts are
    `n_kept`, `n_nonzero`, `n_nonfinite`, `n_alone`, then `n_base_nonfinite`, `elected` and `n_conflict`.

    Attributes:
        windows: of each sum; below -900 where it has no addend yet.
        parts: of each sum its high and its low total, in three parts of 42 bits each, lowest first.
        nonfinite: of each sum that of its addends that are not finite.
        counts: integers.
    """

    windows: list[int]
    parts: list[int]
    nonfinite: list[float]
    counts: list[int]


class Accumulation(Protocol):
    """`measure` of logical entries whose elements come in parts; bit for bit that of one table."""

    def measure(
        self,
        part: WorkTable,
        rows: Sequence[int],
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> None:
        """Add the entries of a part: entry e, with scalars[e], belongs to logical entry rows[e]."""

    def finish(self) -> list[Moments]: ...


class ExportingAccumulation(Accumulation, Protocol):
    """An accumulation whose states other processes can add to theirs."""

    def states(self) -> AccumulatorStates: ...


@runtime_checkable
class ResumableBackend(Backend, Protocol):
    """A backend that can also answer for data that comes in parts."""

    def select(self, keep: Keep, queries: Sequence[RankQuery], group_sizes: Sequence[int]) -> Selection: ...

    def accumulate(self, n_entries: int, n_models: int) -> Accumulation: ...

    def count_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float]],
        n_threads: int = 0,
    ) -> list[list[int]]:
        """[entry][query] keys of `(group, model, value)` that equal the value; 0 in other groups."""


OCTAVES = 256
"""Octave o of a magnitude is the biased exponent of float32: [2^(o - 127), 2^(o - 126)). The first holds zero
and subnormal numbers, the last infinity and NaN."""


class HostBackend(ResumableBackend, Protocol):
    """A backend of host memory that also makes histograms."""

    def count_octaves(self, table: WorkTable, n_threads: int = 0) -> list[list[list[int]]]:
        """[entry][model][octave] how many entries of a task vector have a magnitude in an octave."""


@runtime_checkable
class PartitioningBackend(ResumableBackend, Protocol):
    """A backend that can answer together with other processes, each of which holds a part of the data."""

    def accumulate(self, n_entries: int, n_models: int) -> ExportingAccumulation: ...

    def partition(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, Sequence[int]]],
        n_threads: int = 0,
    ) -> list[list[int]]:
        """How many keys `(group, model, edges)` equal each edge and lie above it, up to the next.

        Edges are the bit patterns of magnitudes, ascending, every NaN as 0x7f800001: [equal to the first,
        above the first, equal to the second, ...].
        """


@runtime_checkable
class MaskingBackend(Backend, Protocol):
    """A backend that can measure in the pass that evaluates the keep stage into bit planes."""

    def measured_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        """`row_masks`, and the `measure` of the same program."""


@runtime_checkable
class LookingBackend(Backend, Protocol):
    """A backend that looks for NaN and infinity in what it has in its caches anyway."""

    def combine_looking(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        look: Look,
        n_threads: int = 0,
    ) -> Look:
        """`combine`; what of `look` holds NaN or infinity."""


@runtime_checkable
class TrimmingBackend(Backend, Protocol):
    """A backend that trims and merges in one call, without an answer for the caller in between."""

    def combine_trimmed(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        queries: Sequence[RankQuery],
    ) -> None:
        """`combine` with the lower ends of queried (group, model) at their k-th largest keys.

        Ties are resolved so that k survive; `scalars` give everything else. Nothing is written where
        memory is not found.
        """


class ProductSum(Protocol):
    """<X, P> of one product whose panels were multiplied elsewhere, in the order-independent accumulator."""

    def add(self, panel: ProductPanel, n_threads: int = 0) -> None:
        """Adds a panel's share, and writes its `out`."""

    def value(self) -> float: ...


@runtime_checkable
class ProductBackend(Backend, Protocol):
    """A backend that also has the verbs of importance and curvature."""

    def why_not_products(self, work: Sequence[Operand]) -> str | None:
        """None if the work can be processed, otherwise the reason."""

    def score(self, table: WorkTable, scalars: Sequence[TensorScalars], n_threads: int = 0) -> None:
        """Adds |score_k * d_k| * weight_k, models in order, to every entry's float32 `out`."""

    def score_factored(self, scores: Sequence[FactoredScore], n_threads: int = 0) -> None: ...

    def kron(self, products: Sequence[KroneckerProduct], n_threads: int = 0) -> list[float]:
        """<X, P> of each product; blocks are at most `factored.LARGEST_BLOCK` a side."""

    def product_sum(self) -> ProductSum: ...


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One line of `tvfast doctor`."""

    name: str
    usable: bool
    detail: str


# In order of preference. `cpp` refuses GPU tensors, and before `triton` it keeps torch out of CPU merges.
_MODULES = {
    "cpp": "tvfast.ops.cpp",
    "cuda": "tvfast.ops.cuda",
    "triton": "tvfast.ops.triton",
    "reference": "tvfast.ops.reference",
}


def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(_MODULES[name]).backend())


def backend_for(table: WorkTable) -> Backend:
    """The first backend that can process the table; `TVFAST_BACKEND` forces one.

    Raises:
        ArgumentError: `TVFAST_BACKEND` names no backend.
        BackendError: the forced backend cannot run, or none can; every reason is given.
    """
    return _first(lambda backend: backend.why_not(table))


def product_backend_for(work: WorkTable | Sequence[Operand]) -> ProductBackend:
    """The first backend that has `score` and `kron` and can process the work; otherwise as `backend_for`."""

    def why_not(backend: Backend) -> str | None:
        if not isinstance(backend, ProductBackend):
            return "it has no score and kron"
        return backend.why_not(work) if isinstance(work, WorkTable) else backend.why_not_products(work)

    return cast(ProductBackend, _first(why_not))


def _first(why_not: Callable[[Backend], str | None]) -> Backend:
    forced = os.environ.get("TVFAST_BACKEND")
    if forced and forced not in _MODULES:
        raise ArgumentError(
            f"TVFAST_BACKEND={forced!r} is not a backend; expected one of {', '.join(_MODULES)}."
        )
    reasons = []
    for name in [forced] if forced else _MODULES:
        try:
            backend = _load(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
            continue
        reason = why_not(backend)
        if reason is None:
            return backend
        reasons.append(f"{name}: {reason}")
    which = f"backend {forced!r} was forced but cannot run" if forced else "no backend can run"
    raise BackendError(f"{which}: {'; '.join(reasons)}.")


def host_backend() -> HostBackend:
    """What measures tensors in host memory where another backend merges them, parts of tensors too.

    Raises:
        BackendError: this build has none.
    """
    try:
        return cast(HostBackend, _load("cpp"))
    except ImportError as error:
        raise BackendError(f"backend 'cpp' is missing from this build: {error}.") from error


def backend_statuses() -> list[BackendStatus]:
    """Every backend, whether it can run here, and the reason if not."""
    statuses = []
    for name in _MODULES:
        try:
            detail = getattr(_load(name), "detail", "")
            statuses.append(BackendStatus(name, True, str(detail)))
        except ImportError as error:
            statuses.append(BackendStatus(name, False, str(error)))
    return statuses
