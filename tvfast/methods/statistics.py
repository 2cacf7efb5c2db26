"""What a method may ask about a work table: bands, sums and votes, each for all tensors in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tvfast.errors import BackendError
from tvfast.ops.raw import Backend, MaskingBackend, Wants
from tvfast.program import (
    OPEN_CUT,
    Keep,
    ModelScalars,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    Tie,
    View,
    WorkTable,
)

PLANE_BYTES = 48 * 2**20
"""Largest total of bit planes that a merge holds at a time; with scratch it stays below 64 MiB."""


@dataclass(frozen=True, slots=True)
class Band:
    """Magnitudes that survive, with the tie cuts of `ModelScalars`."""

    lo: float = 0.0
    hi: float = math.inf
    lo_cut: int = OPEN_CUT
    hi_cut: int = 0

    def write_to(self, scalars: ModelScalars) -> None:
        scalars.lo, scalars.hi = self.lo, self.hi
        scalars.lo_cut, scalars.hi_cut = self.lo_cut, self.hi_cut

    def shifted(self, group_offset: int) -> Band:
        """The cuts of `Tie.INDEX`, from positions in the group to positions in one of its tensors."""
        lo_cut = self.lo_cut if self.lo_cut == OPEN_CUT else max(0, self.lo_cut - group_offset)
        return Band(self.lo, self.hi, lo_cut, max(0, self.hi_cut - group_offset))


ALL = Band()
NONE = Band(lo=math.inf, hi=-1.0, lo_cut=0)  # hi < 0 removes infinities under every tie rule; NaN passes

Ranks = Callable[[int, int, int], tuple[int, int]]
"""(group, model, n) -> (first, last): descending ranks, 0 the largest, that survive among n entries."""


Norms = list[list[tuple[float, float]]]
"""[entry][model] L1 norm of the task vector before and after the keep stage."""


@dataclass(slots=True)
class TableStatistics:
    """Batched questions to one backend about one table.

    `new_plane(n)` allocates a zeroed bit plane of n bits that the backend of this table can write; None: the
    table is never in memory at once, and neither could its planes be.

    Attributes:
        is_finite: an answer has shown that no base and no model of the table holds NaN or infinity.
    """

    backend: Backend
    table: WorkTable
    new_plane: Callable[[int], View] | None
    n_threads: int = 0
    is_finite: bool = False
    _sizes: list[int] = field(default_factory=list)

    @property
    def group_sizes(self) -> list[int]:
        """Entries in each group."""
        if not self._sizes:
            self._sizes = [0] * self.table.n_groups
            for entry in self.table.entries:
                self._sizes[entry.group] += entry.n_elements
        return self._sizes

    def measure(self, program: Program, scalars: Sequence[TensorScalars], wants: Wants) -> list[Moments]:
        """`Moments` per entry, after the program's keep stage and before gain and weight."""
        moments = self.backend.measure(self.table, program, scalars, wants, self.n_threads)
        if shows_nonfinite(self.table, program, wants):
            self.is_finite = are_finite(moments)
        return moments

    def l1(self, program: Program, scalars: Sequence[TensorScalars]) -> Norms:
        """L1 norms of the task vectors before and after the keep stage."""
        return _norms(self.measure(program, scalars, _BOTH_NORMS))

    def gram(self, program: Program, scalars: Sequence[TensorScalars]) -> list[list[list[float]]]:
        """[entry][model][model] dot products of kept task vectors."""
        return [m.gram for m in self.measure(program, scalars, Wants.GRAM)]

    def squares(self, program: Program, scalars: Sequence[TensorScalars]) -> list[list[float]]:
        """[entry][model] squared norm of the kept task vector."""
        moments = self.measure(program, scalars, Wants.SQUARES)
        return [[m.gram[k][k] for k in range(self.table.n_models)] for m in moments]

    def elected(self, program: Program, scalars: Sequence[TensorScalars]) -> list[int]:
        """[group] sum of all elected signs, before the zero-sign rule."""
        totals = [0] * self.table.n_groups
        for entry, moments in zip(
            self.table.entries, self.measure(program, scalars, Wants.VOTES), strict=True
        ):
            totals[entry.group] += moments.elected
        return totals

    def bands(self, ranks: Ranks, tie: Tie, keep: Keep = Keep.BAND) -> list[list[Band]]:
        """[entry][model] the band that holds the asked ranks of its group, exactly.

        Keeping all and keeping none need no query; every other end is one query, all in one call.
        """
        n_models = 1 if keep is Keep.VARIANCE else self.table.n_models
        wanted: dict[tuple[int, int], tuple[int, int]] = {}
        queries: list[RankQuery] = []
        for group, n in enumerate(self.group_sizes):
            for model in range(n_models):
                first, last = ranks(group, model, n)
                first, last = max(0, first), min(last, n)
                wanted[group, model] = first, last
                if first < last < n:
                    queries.append(RankQuery(group, model, last))
                if 0 < first < last:
                    queries.append(RankQuery(group, model, first + 1))
        answers: dict[RankQuery, Threshold] = {}
        if queries:
            found = self.backend.thresholds(self.table, keep, queries, self.n_threads)
            answers = dict(zip(queries, found, strict=True))
        cuts = _Cuts(self, tie, keep)
        ends: dict[tuple[int, int], _Ends] = {}
        for (group, model), (first, last) in wanted.items():
            low = (
                answers.get(RankQuery(group, model, last)) if first < last < self.group_sizes[group] else None
            )
            high = answers.get(RankQuery(group, model, first + 1)) if 0 < first < last else None
            ends[group, model] = _Ends(
                empty=first >= last and self.group_sizes[group] > 0,
                low=low,
                low_cut=cuts.ask(group, model, low, last, OPEN_CUT),
                high=high,
                high_cut=cuts.ask(group, model, high, first, 0),
            )
        resolved = cuts.resolve()
        by_group = {key: end.band(resolved) for key, end in ends.items()}
        return [
            [
                by_group[entry.group, model].shifted(entry.group_offset if tie is Tie.INDEX else 0)
                for model in ([0] * self.table.n_models if n_models == 1 else range(n_models))
            ]
            for entry in self.table.entries
        ]

    def n_nonzero_variances(self) -> list[int]:
        """[group] entries whose variance across models is not zero."""
        sizes = self.group_sizes
        queries = [RankQuery(group, 0, n) for group, n in enumerate(sizes) if n > 0]
        found = self.backend.thresholds(self.table, Keep.VARIANCE, queries, self.n_threads) if queries else []
        counts = [0] * len(sizes)
        for query, smallest in zip(queries, found, strict=True):
            counts[query.group] = smallest.n_greater if smallest.value == 0.0 else query.k
        return counts

    def planes_fit(self) -> bool:
        """Whether there can be one bit plane per model and entry, within `PLANE_BYTES`."""
        wanted = sum(plane_bytes(e.n_elements, self.table.n_models) for e in self.table.entries)
        return self.new_plane is not None and wanted <= PLANE_BYTES

    def draw_masks(self, program: Program, scalars: Sequence[TensorScalars]) -> Norms:
        """Evaluate the keep stage once into new bit planes of every entry; L1 norms before and after it.

        Raises:
            BackendError: planes cannot be had; `planes_fit` says so first.
        """
        if self.new_plane is None:
            raise BackendError(
                "bit planes were asked for a table that is never in memory at once; expected the keep stage "
                "to be evaluated in every pass, as where `planes_fit()` is false."
            )
        for entry in self.table.entries:
            entry.masks = tuple(self.new_plane(entry.n_elements) for _ in entry.models)
        if isinstance(self.backend, MaskingBackend):
            return _norms(
                self.backend.measured_masks(self.table, program, scalars, _BOTH_NORMS, self.n_threads)
            )
        self.backend.row_masks(self.table, program, scalars, self.n_threads)
        return self.l1(Program(keep=Keep.MASK), scalars)


_BOTH_NORMS = Wants.L1_BEFORE | Wants.L1


def _norms(moments: Sequence[Moments]) -> Norms:
    return [list(zip(m.l1_before, m.l1, strict=True)) for m in moments]


def shows_nonfinite(table: WorkTable, program: Program, wants: Wants) -> bool:
    """Whether a NaN or an infinity in a base or a model makes ‖τ_k‖² one, for some k."""
    return (
        bool(wants & (Wants.GRAM | Wants.SQUARES))
        and program.keep is Keep.ALL
        and not any(entry.task_vectors or entry.scores for entry in table.entries)
    )


def are_finite(moments: Sequence[Moments]) -> bool:
    """Whether ‖τ_k‖² of every model of every entry is finite."""
    return all(math.isfinite(one.gram[k][k]) for one in moments for k in range(len(one.gram)))


def plane_bytes(n_elements: int, n_models: int) -> int:
    """Bytes of the bit planes of one entry: whole 64-bit words."""
    return n_models * 8 * ((n_elements + 63) // 64)


@dataclass(frozen=True, slots=True)
class _Ends:
    """Both ends of a band before index cuts are known; a cut is a number, or a key into the resolved ones."""

    empty: bool
    low: Threshold | None
    low_cut: int | _CutKey
    high: Threshold | None
    high_cut: int | _CutKey

    def band(self, resolved: dict[_CutKey, int]) -> Band:
        if self.empty or (self.low is not None and math.isnan(self.low.value)):
            return NONE
        lo_cut = self.low_cut if isinstance(self.low_cut, int) else resolved[self.low_cut]
        low = 0.0 if self.low is None else self.low.value
        if self.high is None or math.isnan(self.high.value):
            return Band(low, math.inf, lo_cut, 0)  # NaN is never dropped, so neither is what ties with it
        hi_cut = self.high_cut if isinstance(self.high_cut, int) else resolved[self.high_cut]
        return Band(low, self.high.value, lo_cut, hi_cut)


_CutKey = tuple[int, int, float, int]  # group, model, value, position among the equal entries


@dataclass(slots=True)
class _Cuts:
    """Tie cuts at thresholds; the index cuts of all bands are found in one call."""

    statistics: TableStatistics
    tie: Tie
    keep: Keep
    _asked: dict[_CutKey, None] = field(default_factory=dict)

    def ask(self, group: int, model: int, end: Threshold | None, rank: int, all_equal: int) -> int | _CutKey:
        """The cut with `rank - n_greater` of the equal entries before it; `all_equal` if none is needed."""
        if end is None or self.tie is Tie.GE or math.isnan(end.value):
            return all_equal
        n_before = rank - end.n_greater
        if n_before == 0:
            return 0
        if n_before >= end.n_equal:
            return OPEN_CUT
        if self.tie is Tie.HASH:
            return (n_before << 32) // end.n_equal
        key = (group, model, end.value, n_before)
        self._asked[key] = None
        return key

    def resolve(self) -> dict[_CutKey, int]:
        if not self._asked:
            return {}
        keys = list(self._asked)
        me = self.statistics
        return dict(zip(keys, me.backend.nth_equal(me.table, self.keep, keys, me.n_threads), strict=True))
