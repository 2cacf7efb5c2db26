"""Reference backend in torch, any float dtype and device: the oracle at float64, the fallback at float32.

Follows `docs/numerics.md` line by line; `_reference_stages.py` holds one function per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tvfast.errors import ArgumentError
from tvfast.ops import _reference_stages as stages
from tvfast.ops._exact_sum_torch import BinnedSum, ExactSum
from tvfast.ops._reference_products import ReferenceProducts
from tvfast.ops._reference_stages import Kept, Tile
from tvfast.ops.raw import SUMS, Wants
from tvfast.program import (
    Entry,
    Keep,
    Moments,
    Program,
    RankQuery,
    TensorScalars,
    Threshold,
    View,
    Vote,
    WorkTable,
    reads_index,
)

S = TypeVar("S")

_TILE = 1 << 20  # elements; bounds the scratch memory to about 16 (K + 4) MiB at float64
_BY_RANK = (Keep.RANDOM_BY_RANK, Keep.BAND_BY_RANK)


def backend(dtype: torch.dtype = torch.float32) -> Reference:
    """The reference backend that computes in `dtype`.

    Raises:
        ArgumentError: `dtype` is neither float32 nor float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"the reference computes in torch.float32 or torch.float64; found {dtype}.")
    return Reference(dtype)


def _flat(view: View) -> Tensor:
    owner: Tensor = view.owner
    return owner.detach().view(-1)


def _views(entry: Entry) -> Iterator[tuple[str, View]]:
    for k, model in enumerate(entry.models):
        yield f"models[{k}]", model
    if entry.base is not None:
        yield "base", entry.base
    if entry.out is not None:
        yield "out", entry.out
    for k, score in enumerate(entry.scores):
        yield f"scores[{k}]", score
    for k, mask in enumerate(entry.masks):
        yield f"masks[{k}]", mask


@dataclass(slots=True)
class Sums(Generic[S]):
    """Order-independent sums of one entry: the fields of `Moments` that are sums."""

    l1_before: list[S]
    l1: list[S]
    gram: list[list[S]]
    dots: list[S]

    @classmethod
    def of(cls, n_models: int, kind: Callable[[], S]) -> Sums[S]:
        """Empty ones."""
        models = range(n_models)
        gram = [[kind() for _ in models] for _ in models]
        return cls([kind() for _ in models], [kind() for _ in models], gram, [kind() for _ in models])

    def in_order(self) -> list[S]:
        """All of them, in the order of `ops.raw.AccumulatorStates`."""
        return [*self.l1_before, *self.l1, *(one for row in self.gram for one in row), *self.dots]

    def take(self, tile: Tile, kept: Kept, wants: Wants, take: Callable[[S, Tensor], None]) -> None:
        """`take` is a sum's `observe` or `add`."""
        for k, (tau, entry) in enumerate(zip(kept.taus, kept.entries, strict=True)):
            if wants & Wants.L1_BEFORE:
                take(self.l1_before[k], tau.abs().to(torch.float64))
            if wants & Wants.L1:
                take(self.l1[k], entry.abs().to(torch.float64))
        for dot, entry, score in zip(self.dots, kept.entries, tile.scores, strict=False):
            if wants & Wants.DOTS:
                take(dot, entry.to(torch.float64) * score.to(torch.float64))
        for j, k in _pairs(wants, len(kept.entries)):
            take(self.gram[j][k], kept.entries[j].to(torch.float64) * kept.entries[k].to(torch.float64))


def _pairs(wants: Wants, n_models: int) -> list[tuple[int, int]]:
    """The entries of the Gram matrix that are measured, its upper triangle."""
    if wants & Wants.GRAM:
        pairs = [(j, k) for j in range(n_models) for k in range(j, n_models)]
        return [(j, k) for j, k in pairs if k in (j, n_models - 1) or not wants & Wants.LAST]
    return [(k, k) for k in range(n_models)] if wants & Wants.SQUARES else []


class Reference(ReferenceProducts):
    """`Backend` in torch; `n_threads` is not read: torch has its own setting."""

    name = "reference"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.detail = f"torch {torch.__version__}, computes in {dtype}"

    def why_not(self, table: WorkTable) -> str | None:
        """A reason if some view has no contiguous tensor of the right length as owner, or devices differ."""
        for entry in table.entries:
            devices = set()
            for role, view in _views(entry):
                where = f"tensor {entry.name!r}: {role}"
                if not isinstance(view.owner, Tensor):
                    return f"{where} has no torch tensor as owner (found {type(view.owner).__name__})"
                if not view.owner.is_contiguous():
                    return f"{where} is not contiguous"
                expected = -(-view.n_elements // 64) if role.startswith("masks") else view.n_elements
                if view.owner.numel() != expected:
                    return f"{where} has {view.owner.numel()} elements, expected {expected}"
                devices.add(str(view.owner.device))
            if len(devices) > 1:
                return f"tensor {entry.name!r} lies on several devices: {', '.join(sorted(devices))}"
        return None

    def thresholds(
        self, table: WorkTable, keep: Keep, queries: Sequence[RankQuery], n_threads: int = 0
    ) -> list[Threshold]:
        """Exact k-th largest keys by sorting bit patterns.

        Raises:
            ArgumentError: k is not in [1, number of entries of the group].
        """
        ordered: dict[tuple[int, int], Tensor] = {}
        answers = []
        for query in queries:
            at = (query.group, query.model)
            if at not in ordered:
                keys = [key for key, _ in self.keys(table, keep, *at)]
                ordered[at] = torch.cat(keys).sort().values if keys else torch.zeros(0, dtype=torch.int64)
            keys_up = ordered[at]
            n = keys_up.numel()
            if not 1 <= query.k <= n:
                raise ArgumentError(
                    f"group {query.group}, model {query.model}: k must be in [1, {n}]; found {query.k}."
                )
            bits = keys_up[n - query.k].reshape(1)
            below = int(torch.searchsorted(keys_up, bits, right=False))
            not_above = int(torch.searchsorted(keys_up, bits, right=True))
            answers.append(Threshold(self._number(bits), n - not_above, not_above - below))
        return answers

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
        answers = []
        for group, model, value, r in queries:
            wanted = stages.magnitude_bits(torch.tensor([value], dtype=self.dtype))
            found = [
                torch.nonzero(key == wanted.to(key.device)).view(-1) + first
                for key, first in self.keys(table, keep, group, model)
            ]
            positions = torch.cat(found).sort().values if found else torch.zeros(0, dtype=torch.int64)
            if not 0 <= r < positions.numel():
                raise ArgumentError(
                    f"group {group}, model {model}: {positions.numel()} entries equal {value}; "
                    f"expected more than r = {r}."
                )
            answers.append(int(positions[r]))
        return answers

    def measure(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        wants: Wants,
        n_threads: int = 0,
    ) -> list[Moments]:
        """One `Moments` per entry; fields that are not asked for are zero."""
        return [
            self._measure(entry, program, own, wants, table.n_models)
            for entry, own in zip(table.entries, scalars, strict=True)
        ]

    def row_masks(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """Writes kept_k, NaN entries included, into the entries' bit planes; padding bits become zero."""
        for entry, own in zip(table.entries, scalars, strict=True):
            planes: list[list[Tensor]] = [[] for _ in entry.models]
            for tile in self._tiles(entry, program):
                for plane, kept in zip(planes, stages.keep(tile, program, own).kept, strict=True):
                    plane.append(kept)
            for view, parts in zip(entry.masks, planes, strict=True):
                if parts:
                    _flat(view).copy_(stages.plane_of_bits(torch.cat(parts)))

    def combine(
        self,
        table: WorkTable,
        program: Program,
        scalars: Sequence[TensorScalars],
        n_threads: int = 0,
    ) -> None:
        """Writes every entry's `out`; `out` may be the base or a model."""
        for entry, own in zip(table.entries, scalars, strict=True):
            if entry.out is None:
                raise ArgumentError(f"tensor {entry.name!r}: combine needs an output; found out=None.")
            out = _flat(entry.out)
            for tile in self._tiles(entry, program):
                result = self._combine(tile, program, own)
                stages.write(out[tile.start : tile.start + tile.n], result)

    def _combine(self, tile: Tile, program: Program, scalars: TensorScalars) -> Tensor:
        kept = stages.keep(tile, program, scalars)
        rescaled = stages.rescale(program, scalars, kept)
        weights = stages.weights(tile, program, scalars, rescaled)
        weighted = stages.weigh(weights, rescaled)
        ballots = stages.cast_ballots(program, rescaled, weighted)
        belong = stages.members(program, scalars, ballots, weighted)
        reduced = stages.reduce(program, weights, belong, rescaled, weighted)
        divided = stages.divide(program, scalars, weights, belong, reduced)
        return stages.apply(scalars, tile.base, divided)

    def _measure(
        self, entry: Entry, program: Program, scalars: TensorScalars, wants: Wants, n_models: int
    ) -> Moments:
        sums = Sums.of(n_models, ExactSum)
        moments = Moments.empty(n_models)
        scored = bool(wants & Wants.DOTS)
        for tile in self._tiles(entry, program, scored):
            kept = stages.keep(tile, program, scalars)
            sums.take(tile, kept, wants, ExactSum.observe)
            self._count(tile, program, scalars, kept, wants, moments)
        if wants & SUMS:
            for tile in self._tiles(entry, program, scored):
                sums.take(tile, stages.keep(tile, program, scalars), wants, ExactSum.add)
        moments.dots = [one.value() for one in sums.dots]
        moments.l1_before = [one.value() for one in sums.l1_before]
        moments.l1 = [one.value() for one in sums.l1]
        for j, k in _pairs(wants, n_models):
            moments.gram[j][k] = moments.gram[k][j] = sums.gram[j][k].value()
        return moments

    def accumulate(
        self,
        entry: Entry,
        program: Program,
        scalars: TensorScalars,
        wants: Wants,
        sums: Sums[BinnedSum],
        counts: Moments,
    ) -> None:
        """Adds what `measure` finds of an entry to sums and counts that other parts are added to as well."""
        for tile in self._tiles(entry, program, bool(wants & Wants.DOTS)):
            kept = stages.keep(tile, program, scalars)
            sums.take(tile, kept, wants, BinnedSum.add)
            self._count(tile, program, scalars, kept, wants, counts)

    def _count(
        self,
        tile: Tile,
        program: Program,
        scalars: TensorScalars,
        kept: Kept,
        wants: Wants,
        moments: Moments,
    ) -> None:
        if wants & Wants.COUNTS:
            _count(tile, kept, moments)
        if wants & Wants.ALONE:
            alone = stages.n_present(kept.entries) == 1
            for k, t in enumerate(kept.entries):
                moments.n_alone[k] += int((alone & (t != 0)).sum())
        if wants & Wants.VOTES:
            self._count_votes(tile, program, scalars, kept, moments)

    def _count_votes(
        self, tile: Tile, program: Program, scalars: TensorScalars, kept: Kept, moments: Moments
    ) -> None:
        positive = torch.zeros_like(kept.kept[0])
        negative = torch.zeros_like(kept.kept[0])
        for entry in kept.entries:
            positive |= entry > 0
            negative |= entry < 0
        moments.n_conflict += int((positive & negative).sum())
        if program.vote is not Vote.NONE:
            rescaled = stages.rescale(program, scalars, kept)
            weighted = stages.weigh(stages.weights(tile, program, scalars, rescaled), rescaled)
            ballots = stages.cast_ballots(program, rescaled, weighted)
            moments.elected += int(stages.vote(program, ballots).sum())

    def _tiles(self, entry: Entry, program: Program, scored: bool = False) -> Iterator[Tile]:
        """The entry in tiles, whole rows in each where the keep stage ranks; with its scores if `scored`."""
        n = entry.n_elements
        size = _TILE
        if program.keep in _BY_RANK:
            row = entry.row or n
            size = row * max(1, _TILE // max(1, row))
        models = [_flat(view) for view in entry.models]
        scored = scored or program.reads_scores
        scores = [_flat(view) for view in entry.scores] if scored else []
        masks = [_flat(view) for view in entry.masks] if program.keep is Keep.MASK else []
        base = None if entry.base is None else _flat(entry.base)
        starts: Iterable[int] = range(0, n, max(1, size))
        if entry.run and reads_index(program):
            starts = [
                start
                for first in range(0, n, entry.run)
                for start in range(first, min(first + entry.run, n), size)
            ]
        for start in starts:
            end = min(start + size, n)
            if entry.run and reads_index(program):
                end = min(end, (start // entry.run + 1) * entry.run)
            part = slice(start, end)
            yield Tile(
                start=start,
                index=entry.index_of(start),
                base=None if base is None else base[part].to(self.dtype),
                models=[model[part].to(self.dtype) for model in models],
                scores=[score[part].to(self.dtype) for score in scores],
                score_maps=entry.score_maps,
                masks=masks,
                row=entry.row,
                task_vectors=entry.task_vectors,
            )

    def keys(self, table: WorkTable, keep: Keep, group: int, model: int) -> Iterator[tuple[Tensor, int]]:
        """Bit patterns of a group's keys, int64 [n], and the group position of the first of them."""
        program = Program(keep=keep)
        for entry in table.entries:
            if entry.group != group:
                continue
            for tile in self._tiles(entry, program):
                position = entry.group_offset + tile.index
                yield stages.key_bits(tile, keep, model), position

    def _number(self, bits: Tensor) -> float:
        words = torch.int32 if self.dtype == torch.float32 else torch.int64
        return float(bits.to(words).view(self.dtype))


def _count(tile: Tile, kept: Kept, moments: Moments) -> None:
    for k, (model, flags, entry) in enumerate(zip(tile.models, kept.kept, kept.entries, strict=True)):
        moments.n_kept[k] += int(flags.sum())
        moments.n_nonzero[k] += int((entry != 0).sum())
        moments.n_nonfinite[k] += int((~torch.isfinite(model)).sum())
    if tile.base is not None:
        moments.n_base_nonfinite += int((~torch.isfinite(tile.base)).sum())
