"""Reference backend in torch, any float dtype and device: the oracle at float64, the fallback at float32.

Follows `docs/numerics.md` line by line; `_reference_stages.py` holds one function per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tvfast.errors import ArgumentError
from tvfast.ops import _reference_stages as stages
from tvfast.ops._exact_sum_torch import ExactSum
from tvfast.ops._reference_products import ReferenceProducts
from tvfast.ops._reference_stages import Kept, Tile
from tvfast.ops.raw import Wants
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
)

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
class _Sums:
    """Order-independent sums of one entry; `take` is their `observe` or their `add`."""

    l1_before: list[ExactSum]
    l1: list[ExactSum]
    gram: list[list[ExactSum]]
    dots: list[ExactSum]
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def take(self, tile: Tile, kept: Kept, wants: Wants, take: Callable[[ExactSum, Tensor], None]) -> None:
        for k, (tau, entry) in enumerate(zip(kept.taus, kept.entries, strict=True)):
            if wants & Wants.L1_BEFORE:
                take(self.l1_before[k], tau.abs().to(torch.float64))
            if wants & Wants.L1:
                take(self.l1[k], entry.abs().to(torch.float64))
        for dot, entry, score in zip(self.dots, kept.entries, tile.scores, strict=False):
            if wants & Wants.DOTS:
                take(dot, entry.to(torch.float64) * score.to(torch.float64))
        for j, k in self.pairs:
            take(self.gram[j][k], kept.entries[j].to(torch.float64) * kept.entries[k].to(torch.float64))


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
                keys = [key for key, _ in self._keys(table, keep, *at)]
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
                for key, first in self._keys(table, keep, group, model)
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
        models = range(n_models)
        sums = _Sums(
            [ExactSum() for _ in models],
            [ExactSum() for _ in models],
            [[ExactSum() for _ in models] for _ in models],
            [ExactSum() for _ in models],
        )
        if wants & Wants.GRAM:
            last = n_models - 1
            sums.pairs = [
                (j, k) for j in models for k in range(j, n_models) if k in (j, last) or not wants & Wants.LAST
            ]
        elif wants & Wants.SQUARES:
            sums.pairs = [(k, k) for k in models]
        moments = Moments(
            l1_before=[0.0] * n_models,
            l1=[0.0] * n_models,
            gram=[[0.0] * n_models for _ in models],
            n_kept=[0] * n_models,
            n_nonzero=[0] * n_models,
            n_nonfinite=[0] * n_models,
            n_alone=[0] * n_models,
        )
        scored = bool(wants & Wants.DOTS)
        for tile in self._tiles(entry, program, scored):
            kept = stages.keep(tile, program, scalars)
            sums.take(tile, kept, wants, ExactSum.observe)
            if wants & Wants.COUNTS:
                _count(tile, kept, moments)
            if wants & Wants.ALONE:
                alone = stages.n_present(kept.entries) == 1
                for k, t in enumerate(kept.entries):
                    moments.n_alone[k] += int((alone & (t != 0)).sum())
            if wants & Wants.VOTES:
                self._count_votes(tile, program, scalars, kept, moments)
        if wants & (Wants.L1_BEFORE | Wants.L1 | Wants.GRAM | Wants.SQUARES | Wants.DOTS):
            for tile in self._tiles(entry, program, scored):
                sums.take(tile, stages.keep(tile, program, scalars), wants, ExactSum.add)
        moments.dots = [one.value() for one in sums.dots]
        moments.l1_before = [one.value() for one in sums.l1_before]
        moments.l1 = [one.value() for one in sums.l1]
        for j, k in sums.pairs:
            moments.gram[j][k] = moments.gram[k][j] = sums.gram[j][k].value()
        return moments

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
        for start in range(0, n, max(1, size)):
            part = slice(start, min(start + size, n))
            yield Tile(
                start=start,
                index=entry.offset + start,
                base=None if base is None else base[part].to(self.dtype),
                models=[model[part].to(self.dtype) for model in models],
                scores=[score[part].to(self.dtype) for score in scores],
                score_maps=entry.score_maps,
                masks=masks,
                row=entry.row,
                task_vectors=entry.task_vectors,
            )

    def _keys(self, table: WorkTable, keep: Keep, group: int, model: int) -> Iterator[tuple[Tensor, int]]:
        """Bit patterns of a group's keys, int64 [n], and the group position of the first of them."""
        program = Program(keep=keep)
        for entry in table.entries:
            if entry.group != group:
                continue
            for tile in self._tiles(entry, program):
                position = entry.group_offset + tile.index
                match keep:
                    case Keep.BAND:
                        key = stages.task_vectors(tile)[model]
                    case Keep.SCORE:
                        key = stages.score(tile, model)
                    case Keep.VARIANCE:
                        key = stages.variance(stages.task_vectors(tile))
                    case _:
                        raise ArgumentError(
                            f"keep must be BAND, SCORE or VARIANCE to rank; found {keep.name}."
                        )
                yield stages.magnitude_bits(key), position

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
