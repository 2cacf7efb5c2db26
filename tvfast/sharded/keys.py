"""Keys of the elements that a rank holds: a sample of them, how they are spread, where some value is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tvfast.ops._reference_stages import Tile, key_bits
from tvfast.ops.raw import Backend, PartitioningBackend
from tvfast.ops.reference import Reference
from tvfast.program import Entry, Keep, View, WorkTable

Stream = tuple[int, int]
"""(group, model): keys that are ranked together."""

Edges = tuple[int, int, Sequence[int]]
"""(group, model, ascending keys)."""

SHORT_NAN, LONG_NAN = 0x7F800001, 0x7FF0000000000001
"""How NaN is written among keys of 31 and of 63 bits: just above infinity."""


class Keys(Protocol):
    """What is asked of the keys of one table on one rank. `top` is the largest key there is, that of NaN."""

    top: int

    def sample(self, streams: Sequence[Stream], n_most: int) -> Iterator[tuple[int, Tensor]]:
        """For each stream how many keys are here, and at most `n_most` of them, int64, evenly spread."""

    def partition(self, queries: Sequence[Edges]) -> list[list[int]]:
        """`ops.raw.PartitioningBackend.partition` of this rank's elements."""

    def positions(self, stream: Stream, key: int) -> Iterator[Tensor]:
        """Places in the group, int64, of the elements whose key is this one."""

    def number(self, key: int) -> float: ...

    def key(self, number: float) -> int: ...


@dataclass(slots=True)
class LocalKeys:
    """`Keys` of a table in memory.

    The keys are those of `docs/numerics.md`, Thresholds. A backend that can partition does so; for
    every other one torch does, on the device of the tensors.
    """

    backend: Backend
    table: WorkTable
    keep: Keep
    double: bool
    n_threads: int
    top: int = field(init=False)
    _torch: Reference = field(init=False)
    _native: PartitioningBackend | None = field(init=False)

    def __post_init__(self) -> None:
        self._torch = Reference(torch.float64 if self.double else torch.float32)
        partitions = isinstance(self.backend, PartitioningBackend) and not self.double
        self._native = self.backend if partitions else None  # type: ignore[assignment]
        self.top = LONG_NAN if self.double else SHORT_NAN

    def sample(self, streams: Sequence[Stream], n_most: int) -> Iterator[tuple[int, Tensor]]:
        by_group: dict[int, list[Entry]] = {}
        for entry in self.table.entries:
            by_group.setdefault(entry.group, []).append(entry)
        tiles: dict[int, list[Tile]] = {}
        for group, model in streams:
            entries = by_group.get(group, [])
            if group not in tiles:
                tiles[group] = list(self._sampled(entries, n_most))
            keys = [key_bits(tile, self.keep, model).cpu() for tile in tiles[group]]
            n_elements = sum(entry.n_elements for entry in entries)
            yield n_elements, self._capped(torch.cat(keys) if keys else torch.zeros(0, dtype=torch.int64))

    def partition(self, queries: Sequence[Edges]) -> list[list[int]]:
        if self._native is not None:
            return self._native.partition(self.table, self.keep, queries, self.n_threads)
        return [self._partition(group, model, edges) for group, model, edges in queries]

    def positions(self, stream: Stream, key: int) -> Iterator[Tensor]:
        group, model = stream
        for entry in self.table.entries:
            if entry.group != group:
                continue
            start = 0
            for keys, _ in self._torch.keys(WorkTable([entry], self.table.n_models), self.keep, group, model):
                found = torch.nonzero(self._capped(keys) == key).view(-1) + start
                start += keys.numel()
                if entry.run:
                    found = found // entry.run * entry.run_step + found % entry.run
                yield (found + (entry.group_offset + entry.offset)).cpu()

    def number(self, key: int) -> float:
        if key == self.top:
            return math.nan
        words, kind = (torch.int64, torch.float64) if self.double else (torch.int32, torch.float32)
        return float(torch.tensor([key], dtype=words).view(kind))

    def key(self, number: float) -> int:
        if math.isnan(number):
            return self.top
        words, kind = (torch.int64, torch.float64) if self.double else (torch.int32, torch.float32)
        return int(torch.tensor([number], dtype=kind).abs().view(words))

    def _capped(self, keys: Tensor) -> Tensor:
        return keys.clamp(max=self.top)

    def _sampled(self, entries: Sequence[Entry], n_most: int) -> Iterator[Tile]:
        """Elements one to each of `n_most` equal stretches of all entries, at a random place within it.

        Equal distances would keep meeting the same columns of a matrix.
        """
        n = sum(entry.n_elements for entry in entries)
        if n == 0 or n_most == 0:
            return
        if n <= n_most:
            places = torch.arange(n)
        else:
            within = torch.rand(n_most, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            places = ((torch.arange(n_most) + within) * (n / n_most)).to(torch.int64).clamp(max=n - 1)
        first = 0
        for entry in entries:
            own = places[(places >= first) & (places < first + entry.n_elements)] - first
            first += entry.n_elements
            if own.numel():
                yield self._gathered(entry, own)

    def _gathered(self, entry: Entry, places: Tensor) -> Tile:
        def take(view: View) -> Tensor:
            owner: Tensor = view.owner
            return owner.detach().view(-1)[places.to(owner.device)].to(self._torch.dtype)

        return Tile(
            start=0,
            index=0,
            base=None if entry.base is None else take(entry.base),
            models=[take(model) for model in entry.models],
            scores=[take(score) for score in entry.scores],
            score_maps=entry.score_maps,
            masks=[],
            row=0,
            task_vectors=entry.task_vectors,
        )

    def _partition(self, group: int, model: int, edges: Sequence[int]) -> list[int]:
        counts = torch.zeros(2 * len(edges) + 1, dtype=torch.int64)
        for keys, _ in self._torch.keys(self.table, self.keep, group, model):
            keys = self._capped(keys)
            ascending = torch.tensor(edges, dtype=torch.int64, device=keys.device)
            at = torch.searchsorted(ascending, keys)
            equal = ascending[at.clamp(max=len(edges) - 1)] == keys
            counts += torch.bincount(2 * at + equal, minlength=counts.numel()).cpu()
        return [int(count) for count in counts[1:]]
