"""Exact thresholds of keys that are spread over ranks, in few reductions for all of them together.

A sample brackets every answer; its keys are edges, and one count of what equals them and lies between them
usually hits the answer where keys tie, as those of 16-bit weights do. Otherwise the answer is between two
edges, and the interval is cut evenly, twice for the keys of float32. The sample decides how often, never the
answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.errors import BackendError
from tvfast.program import RankQuery, Threshold
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.keys import Keys, Stream

_SAMPLE_OF_ALL = 2**19
_FEWEST_SAMPLE, _LARGEST_SAMPLE = 2**11, 2**14  # keys of one stream, all ranks together
_FEWEST_OF_RANK = 16
_WIDTH = 5.0  # of a bracket to either side, in standard deviations of the sample
_SAMPLE_EDGES = 512  # of one query, at most
_EDGES_OF_ALL = 2**20
_FEWEST_EDGES, _LARGEST_EDGES = 2**10, 2**12  # of one query
_INT32 = 2**31


@dataclass(slots=True)
class _Search:
    """One query: its answer is a key strictly between `below` and `over`."""

    query: RankQuery
    below: int
    over: int
    edges: Tensor | None = None

    def narrow(self, counts: Tensor) -> tuple[int, int, int] | None:
        """The answer (key, n_greater, n_equal) from what all ranks counted at the edges, if an edge is it."""
        assert self.edges is not None
        n_equal = counts[0::2]
        n_from = (n_equal + counts[1::2]).flip(0).cumsum(0).flip(0)  # keys from an edge on; they fall
        place = int((n_from >= self.query.k).sum()) - 1
        if place < 0:
            self.over = int(self.edges[0])
            return None
        n_greater = int(n_from[place] - n_equal[place])
        edge = int(self.edges[place])
        if self.query.k > n_greater:
            return edge, n_greater, int(n_equal[place])
        self.below = edge
        if place + 1 < self.edges.numel():
            self.over = int(self.edges[place + 1])
        return None


def select(
    team: Communicator, keys: Keys, queries: Sequence[RankQuery], group_sizes: Sequence[int]
) -> list[Threshold]:
    """The thresholds of all queries, over the elements of all ranks.

    Args:
        keys: of this rank's elements.
        group_sizes: of each group, elements of all ranks.

    Raises:
        BackendError: ranks do not hold what the group sizes say.
    """
    searches = [_Search(query, -1, keys.top + 1) for query in queries]
    answers: list[Threshold | None] = [None] * len(queries)
    streams = list(dict.fromkeys((query.group, query.model) for query in queries))
    samples = dict(zip(streams, _samples(team, keys, streams, group_sizes), strict=True))
    for at, search in enumerate(searches):
        sample = samples[search.query.group, search.query.model]
        n = group_sizes[search.query.group]
        if sample.n_elements != n:
            raise BackendError(
                f"group {search.query.group} has {n} elements, and the ranks hold {sample.n_elements}; "
                "expected every element on exactly one rank, or the same on all."
            )
        if sample.complete:
            answers[at] = _of_sorted(sample.keys, search.query.k, keys)
        else:
            search.edges = sample.edges(search.query.k)
    while still := [at for at, answer in enumerate(answers) if answer is None]:
        most = _clamp(_EDGES_OF_ALL // len(still), _FEWEST_EDGES, _LARGEST_EDGES)
        for at in still:
            if searches[at].edges is None:
                searches[at].edges = _even(searches[at].below, searches[at].over, most)
        open_ones = [(searches[at], edges) for at in still if (edges := searches[at].edges) is not None]
        asked = [(search.query.group, search.query.model, edges.tolist()) for search, edges in open_ones]
        wide = max(group_sizes[group] for group, _, _ in asked) >= _INT32
        counts = torch.tensor(
            [count for row in keys.partition(asked) for count in row],
            dtype=torch.int64 if wide else torch.int32,
        )
        sizes = [2 * len(edges) for _, _, edges in asked]
        for at, found in zip(still, torch.split(team.sum(counts).to(torch.int64), sizes), strict=True):
            answer = searches[at].narrow(found)
            searches[at].edges = None
            if answer is not None:
                answers[at] = Threshold(keys.number(answer[0]), answer[1], answer[2])
    return [answer for answer in answers if answer is not None]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Keys of one stream from all ranks, ascending; each stands for `weights` of its elements."""

    keys: Tensor
    weights: Tensor
    n_elements: int
    complete: bool

    def edges(self, k: int) -> Tensor:
        """Sampled keys around the place of the k-th largest."""
        n = self.keys.numel()
        above = self.weights.flip(0).cumsum(0).flip(0)  # elements from a key on
        place = int((above >= k).sum()) - 1
        share = k / self.n_elements
        margin = _WIDTH * math.sqrt(n * share * (1.0 - share)) + _WIDTH
        low, high = max(0, math.floor(place - margin)), min(n - 1, math.ceil(place + margin))
        edges: Tensor = torch.unique(self.keys[low : high + 1])
        if edges.numel() > _SAMPLE_EDGES:
            evenly = torch.linspace(0, edges.numel() - 1, _SAMPLE_EDGES).round().to(torch.int64)
            edges = edges[evenly]
        return edges


def _samples(
    team: Communicator, keys: Keys, streams: Sequence[Stream], group_sizes: Sequence[int]
) -> list[_Sample]:
    """One gather of every rank's sample of every stream."""
    room = _clamp(_SAMPLE_OF_ALL // len(streams), _FEWEST_SAMPLE, _LARGEST_SAMPLE)
    room = max(_FEWEST_OF_RANK, -(-room // team.size))
    rooms = [min(room, group_sizes[group]) for group, _ in streams]
    kind = torch.int64 if keys.top >= _INT32 else torch.int32
    sent = []
    for own_room, (n, found) in zip(rooms, keys.sample(streams, room), strict=True):
        row = torch.full((own_room + 2,), -1, dtype=kind)
        row[0], row[1] = n // _INT32, n % _INT32  # two words, which fit whatever the type is
        row[2 : 2 + found.numel()] = found.to(kind)
        sent.append(row)
    gathered = team.gather(torch.cat(sent)).to(torch.int64)
    return [_sample(rows) for rows in torch.split(gathered, [row.numel() for row in sent], 1)]


def _sample(rows: Tensor) -> _Sample:
    """[rank, 2 + room] as the ranks sent them."""
    sizes = rows[:, 0] * _INT32 + rows[:, 1]
    taken = rows[:, 2:]
    held = taken >= 0
    n_taken = held.sum(1)
    weights = (sizes / n_taken.clamp(min=1)).unsqueeze(1).expand_as(taken)[held]
    keys, order = taken[held].sort()
    return _Sample(keys, weights[order], int(sizes.sum()), bool((n_taken == sizes).all()))


def _of_sorted(ascending: Tensor, k: int, keys: Keys) -> Threshold:
    n = ascending.numel()
    key = ascending[n - k].reshape(1)
    n_below = int(torch.searchsorted(ascending, key))
    n_not_above = int(torch.searchsorted(ascending, key, right=True))
    return Threshold(keys.number(int(key)), n - n_not_above, n_not_above - n_below)


def _even(below: int, over: int, most: int) -> Tensor:
    """At most so many keys strictly between two, all of them or evenly spread."""
    n = over - below - 1
    if n <= most:
        return torch.arange(below + 1, over)
    step = -(-(n - 1) // (most - 1))
    return torch.arange(below + 1, over, step)


def nth_equal(
    team: Communicator, keys: Keys, queries: Sequence[tuple[int, int, float, int]], group_sizes: Sequence[int]
) -> list[int]:
    """Places in the group of the r-th elements whose keys equal a value, in two reductions.

    First how many there are in each of some equal blocks of the group, whose sums over ranks and blocks find
    the block; then a bit for each place of that block.
    """
    if not queries:
        return []
    blocks = [_block_of(group_sizes[group]) for group, _, _, _ in queries]
    counts = []
    for (group, model, value, _), block in zip(queries, blocks, strict=True):
        own = torch.zeros(-(-group_sizes[group] // block), dtype=torch.int64)
        for places in keys.positions((group, model), keys.key(value)):
            own += torch.bincount(places // block, minlength=own.numel())
        counts.append(own)
    found = torch.split(team.sum(torch.cat(counts)), [own.numel() for own in counts])
    inside: list[tuple[int, int]] = []  # block, how many of its equal elements come before
    for (_, _, _, rank), of_blocks in zip(queries, found, strict=True):
        upto = of_blocks.cumsum(0)
        at = int(torch.searchsorted(upto, rank, right=True))
        inside.append((at, rank - int(upto[at] - of_blocks[at])))
    planes = []
    for (group, model, value, _), block, (at, _) in zip(queries, blocks, inside, strict=True):
        bits = torch.zeros(block, dtype=torch.uint8)
        for places in keys.positions((group, model), keys.key(value)):
            bits[places[places // block == at] - at * block] = 1
        planes.append(bits)
    packed = [
        (plane.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        for plane in planes
    ]
    result = []
    for own, block, (at, rank) in zip(
        torch.split(team.sum(torch.cat(packed)), [p.numel() for p in packed]), blocks, inside, strict=True
    ):
        bits = (own.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
        result.append(at * block + int(torch.nonzero(bits.view(-1))[rank]))
    return result


def _block_of(n: int) -> int:
    """Elements of a block, whole bytes of bits: as many bytes of bits as there are bytes of counts."""
    return 8 * max(1, math.ceil(math.sqrt(n)))


def _clamp(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)
