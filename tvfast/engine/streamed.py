"""A backend over tables that are never in memory at once: their parts stream through another backend.

Every answer has the bits that one resident table would give, however it is cut: counts are integers, sums do
not depend on order, and draws and tie hashes know the place of an element in its tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from tvfast.errors import BackendError, MergeError
from tvfast.methods.statistics import are_finite, shows_nonfinite
from tvfast.ops.raw import Accumulation, Backend, Selection, Wants
from tvfast.program import (
    Ballot,
    DType,
    Entry,
    Gain,
    Keep,
    ModelScalars,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    Tie,
    Vote,
    WorkTable,
    ZeroSign,
)


@dataclass(slots=True)
class Chunk:
    """A resident part of a logical table.

    Attributes:
        table: entries with the `offset` of their first element in the tensor; `name`, `row`, `group` and
            `group_offset` are those of the logical entry.
        rows: the logical entry of each of them.
    """

    table: WorkTable
    rows: tuple[int, ...]


class ChunkSource(Protocol):
    """Where the parts come from. Rank stages need cuts at multiples of a row."""

    def chunks(self, *, write: bool, look: bool = True) -> Iterator[Chunk]:
        """Everything once, in an order that does not change; valid until the next item is asked for.

        With `write`, entries have `out`, which the source writes away when the next item is asked for. With
        `look`, NaN and infinity are looked for where `unseen`, and nothing is unseen any more.
        """

    @property
    def unseen(self) -> bool:
        """Whether NaN and infinity are errors that have still to be looked for."""

    def vouch(self) -> None:
        """The base and the models of all entries are finite: they need not be looked at."""

    def sample(self) -> Iterator[Chunk]:
        """About 1/64 of the data, or a few MB, whichever is more; the same each time.

        Spread evenly: every tensor is there in proportion to its size. A sample that is not costs passes,
        never correctness.
        """


Combine: TypeAlias = Callable[[WorkTable, Program, Sequence[TensorScalars], int], None]


@runtime_checkable
class PartsBackend(Protocol):
    """What is asked about parts: a `ResumableBackend` has it all."""

    name: str

    def why_not(self, table: WorkTable) -> str | None: ...

    def select(self, keep: Keep, queries: Sequence[RankQuery], group_sizes: Sequence[int]) -> Selection: ...

    def accumulate(self, n_entries: int, n_models: int) -> Accumulation: ...

    def count_equal(
        self, table: WorkTable, keep: Keep, queries: Sequence[tuple[int, int, float]], n_threads: int = 0
    ) -> list[list[int]]: ...

    def nth_equal(
        self, table: WorkTable, keep: Keep, queries: Sequence[tuple[int, int, float, int]], n_threads: int = 0
    ) -> list[int]: ...

    def combine(
        self, table: WorkTable, program: Program, scalars: Sequence[TensorScalars], n_threads: int = 0
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class _Forecast:
    """Votes measured with guessed thresholds, while the true ones were still being counted."""

    program: Program
    scalars: list[TensorScalars]
    votes: Accumulation

    def answers(self, program: Program, scalars: Sequence[TensorScalars], wants: Wants) -> bool:
        """Whether the question is the one that was foreseen; with raw ballots, weights do not matter."""
        return (
            wants == Wants.VOTES
            and program == self.program
            and [_decisive(tensor) for tensor in scalars] == [_decisive(tensor) for tensor in self.scalars]
        )


def _decisive(tensor: TensorScalars) -> list[tuple[float, float, float]]:
    """What raw votes over a band that keeps its ties depend on."""
    return [(model.lo, model.hi, model.gain) for model in tensor.models]


class StreamedBackend:
    """`Backend` over one logical table, whose views have lengths but no addresses.

    Args:
        inner: what processes the parts.
        source: the parts of the table.
        combine: what combines the parts, where that is not `inner`; it may end later.
        foresee: the stages that will be combined. If they elect a majority sign over a trimmed model, its
            votes are counted in the pass that finds the thresholds, with those that a sample suggests; two
            passes instead of three where the suggestion was right, which the counts prove.

    Raises:
        BackendError: `inner` has no resumable form.
    """

    name = "streamed"

    def __init__(
        self,
        inner: Backend | PartsBackend,
        source: ChunkSource,
        *,
        foresee: Program | None = None,
        combine: Combine | None = None,
    ) -> None:
        if not isinstance(inner, PartsBackend):
            raise BackendError(
                f"backend {inner.name!r} cannot process a table in parts; expected one that can, such as "
                "'cpp'. Unset TVFAST_BACKEND, or lift the limit on memory."
            )
        self._inner: PartsBackend = inner
        self._combine: Combine = combine or inner.combine
        self._source = source
        self._foresee = foresee
        self._forecast: _Forecast | None = None
        self.n_passes = 0
        """Times that all data was read."""

    def why_not(self, table: WorkTable) -> str | None:
        return self._inner.why_not(table)

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        if not queries:
            return []
        sizes = [0] * table.n_groups
        for entry in table.entries:
            sizes[entry.group] += entry.n_elements
        selection = self._inner.select(keep, queries, sizes)
        for chunk in self._source.sample():
            selection.sample(chunk.table, n_threads)
        forecast = self._begin_forecast(table, keep, queries, selection, n_threads)
        answers: list[Threshold] | None = None
        while answers is None:
            for chunk in self._chunks(table):
                selection.count(chunk.table, n_threads)
                if forecast is not None:
                    scalars = [forecast.scalars[row] for row in chunk.rows]
                    forecast.votes.measure(
                        chunk.table, chunk.rows, forecast.program, scalars, Wants.VOTES, n_threads
                    )
            if forecast is not None:
                self._forecast, forecast = forecast, None
            answers = selection.finish()
        return answers

    def nth_equal(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[tuple[int, int, float, int]],
        n_threads: int = 0,
    ) -> list[int]:
        """One pass counts the equal entries of each part, another looks into the parts that matter."""
        if not queries:
            return []
        values = [(group, model, value) for group, model, value, _ in queries]
        held: list[list[tuple[int, int]]] = [[] for _ in queries]  # (position of a part, how many it holds)
        for chunk in self._chunks(table):
            counts = self._inner.count_equal(chunk.table, keep, values, n_threads)
            for entry, row in zip(chunk.table.entries, counts, strict=True):
                for parts, n_equal in zip(held, row, strict=True):
                    if n_equal > 0:
                        parts.append((_position(entry), n_equal))
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (group, position): (query, rank there)
        for q, ((group, _, _, rank), parts) in enumerate(zip(queries, held, strict=True)):
            for position, n_equal in sorted(parts):
                if rank < n_equal:
                    wanted.setdefault((group, position), []).append((q, rank))
                    break
                rank -= n_equal
        found = [-1] * len(queries)
        for chunk in self._chunks(table) if wanted else ():
            for entry in chunk.table.entries:
                asked = wanted.get((entry.group, _position(entry)), [])
                if asked and entry.n_elements > 0:
                    here = [(*values[q], rank) for q, rank in asked]
                    part = WorkTable([entry], table.n_models)
                    positions = self._inner.nth_equal(part, keep, here, n_threads)
                    for (q, _), position in zip(asked, positions, strict=True):
                        found[q] = position
        return found

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        if self._forecast is not None and self._forecast.answers(program, scalars, wants):
            return self._forecast.votes.finish()
        sums = self._inner.accumulate(len(table.entries), table.n_models)
        shown = self._source.unseen and shows_nonfinite(table, program, wants)
        for chunk in self._chunks(table, program, look=not shown):
            of_chunk = [scalars[row] for row in chunk.rows]
            sums.measure(chunk.table, chunk.rows, program, of_chunk, wants, n_threads)
        moments = sums.finish()
        if shown and are_finite(moments):
            self._source.vouch()
        elif shown:
            for _ in self._chunks(table):
                pass  # it raises, or finite inputs are too far apart
        return moments

    def row_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """
        Raises:
            BackendError: always; bit planes of a table that does not fit in memory would not fit either.
        """
        raise BackendError(
            "bit planes were asked of a table that is read in parts; expected `TableStatistics` without "
            "`new_plane`, so that every pass evaluates the keep stage."
        )

    def combine(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        for chunk in self._chunks(table, program, write=True):
            self._combine(chunk.table, program, [scalars[row] for row in chunk.rows], n_threads)

    def _chunks(
        self, table: WorkTable, program: Program | None = None, *, write: bool = False, look: bool = True
    ) -> Iterator[Chunk]:
        """One pass.

        Raises:
            MergeError: the parts are not the whole table, or a row that is to be ranked was cut.
        """
        self.n_passes += 1
        seen = [0] * len(table.entries)
        for chunk in self._source.chunks(write=write, look=look):
            for entry, row in zip(chunk.table.entries, chunk.rows, strict=True):
                seen[row] += entry.n_elements
                if program is not None and program.ranks_rows:
                    _check_cut(entry, table.entries[row])
            yield chunk
        for entry, n_elements in zip(table.entries, seen, strict=True):
            if n_elements != entry.n_elements:
                raise MergeError(
                    f"tensor {entry.name!r}: a pass over its parts gave {n_elements} elements, expected "
                    f"{entry.n_elements}. Check that the input files do not change during the merge."
                )

    def _begin_forecast(
        self,
        table: WorkTable,
        keep: Keep,
        queries: Sequence[RankQuery],
        selection: Selection,
        n_threads: int,
    ) -> _Forecast | None:
        """Votes to count along with the thresholds; None where they will not be asked, or hardly so."""
        program = self._foresee
        if program is None or not _elects_over_trimmed(program) or keep is not Keep.BAND:
            return None
        guesses = selection.guesses(n_threads)
        # Differences of 16-bit numbers tie so heavily that a guess is worth a try even where it is not sure:
        # a wrong one costs arithmetic, a right one saves a pass over the files.
        views = (view for entry in table.entries for view in (entry.base, *entry.models))
        short = all(view is None or view.dtype is not DType.F32 for view in views)
        ends = {
            (query.group, query.model): value
            for query, (value, likely) in zip(queries, guesses, strict=True)
            if likely or short
        }
        if len(ends) != len(queries):
            return None
        scalars = [
            TensorScalars(
                models=[ModelScalars(lo=ends.get((entry.group, k), 0.0)) for k in range(table.n_models)]
            )
            for entry in table.entries
        ]
        return _Forecast(program, scalars, self._inner.accumulate(len(table.entries), table.n_models))


def _elects_over_trimmed(program: Program) -> bool:
    """Whether votes depend on thresholds alone."""
    return (
        program.keep is Keep.BAND
        and program.tie is Tie.GE
        and program.gain is Gain.MODEL
        and program.vote is not Vote.NONE
        and program.ballot is Ballot.RAW
        and program.zero_sign is ZeroSign.MAJORITY
    )


def _position(entry: Entry) -> int:
    return entry.group_offset + entry.offset


def _check_cut(part: Entry, whole: Entry) -> None:
    """Raise unless a part consists of whole rows; the last row of a tensor may be short."""
    row = whole.row or whole.n_elements
    start = part.offset - whole.offset
    stop = start + part.n_elements
    if part.row != whole.row and part.n_elements > 0:
        raise MergeError(f"tensor {whole.name!r}: a part has rows of {part.row}, expected {whole.row}.")
    if row and (start % row or (stop % row and stop != whole.n_elements)):
        raise MergeError(
            f"tensor {whole.name!r}: a part holds elements {start} to {stop}, which cuts a row of {row} that "
            "is to be ranked as a whole. Raise the limit on memory so that a row of every input fits."
        )
