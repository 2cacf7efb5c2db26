"""Exact thresholds and positions of equal entries on the device: what launches the kernels of `select.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tvfast.kernels.launch import EXACT
from tvfast.kernels.select import (
    BINS,
    DIGITS,
    count_equal_kernel,
    find_equal_kernel,
    histogram_kernel,
    pick_kernel,
)
from tvfast.kernels.table import TILE, Kind, Launch

from tvfast.program import Entry, Keep, RankQuery

_BLOCK = 1024


def key_constants(keep: Keep, kind: Kind) -> dict[str, Any]:
    """Compile-time arguments of the kernels that read keys."""
    return {
        "KEEP": int(keep),
        "DTYPE": kind.dtype,
        "HAS_BASE": kind.subtracts,
        "ALIGNED": kind.aligned,
        "BLOCK": _BLOCK,
    }


def _first_queries(groups: Sequence[int], n_groups: int, device: torch.device) -> Tensor:
    """[n_groups + 1]: where each group's queries begin; `groups` ascends."""
    counts = torch.bincount(torch.tensor(groups, dtype=torch.int64), minlength=n_groups)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device)


def _table_arguments(launch: Launch) -> tuple[Any, ...]:
    return launch.fields, launch.stride, launch.first_tiles, len(launch.numbers), launch.n_models


def thresholds(
    launches: Sequence[Launch], keep: Keep, queries: Sequence[RankQuery], n_groups: int, device: torch.device
) -> Tensor:
    """Of each query its key, the keys above it and those equal to it; [n_queries, 3] int64, on the device.

    Nothing waits for the device. Workspace: 16 KiB a query.
    """
    order = sorted(range(len(queries)), key=lambda place: queries[place].group)
    asked = [queries[place] for place in order]
    first_queries = _first_queries([query.group for query in asked], n_groups, device)
    models = torch.tensor([query.model for query in asked], dtype=torch.int64).to(device)
    states = torch.tensor([[0, query.k, 0, 0] for query in asked], dtype=torch.int64).to(device)
    bins = torch.zeros(len(asked), BINS.value, dtype=torch.int64, device=device)
    for shift, bits in DIGITS:
        for launch in launches:
            histogram_kernel[(launch.n_tiles,)](
                *_table_arguments(launch),
                first_queries,
                models,
                states,
                bins,
                SHIFT=shift,
                BITS=bits,
                **key_constants(keep, launch.kind),
                **EXACT,
            )
        pick_kernel[(len(asked),)](states, bins, BITS=bits, **EXACT)
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    return states[back.to(device)][:, [0, 2, 3]]


def nth_equal(
    launches: Sequence[Launch],
    entries: Sequence[Entry],
    keep: Keep,
    queries: Sequence[tuple[int, int, int, int]],
    n_groups: int,
    device: torch.device,
) -> tuple[list[int], list[int]]:
    """Positions of the r-th entries whose key equals one of `queries` (group, model, key, r); waits twice.

    Returns:
        per query the position, -1 if there are at most r such entries, and the number of such entries.
    """
    places, n_places = _places(entries, n_groups)
    order = sorted(range(len(queries)), key=lambda place: queries[place][0])
    asked = [queries[place] for place in order]
    first_queries = _first_queries([query[0] for query in asked], n_groups, device)
    models, keys, wanted = (
        torch.tensor([query[field] for query in asked], dtype=torch.int64).to(device) for field in (1, 2, 3)
    )
    begins = [0]
    for group, *_ in asked:
        begins.append(begins[-1] + n_places[group])
    first_places = torch.tensor(begins, dtype=torch.int64).to(device)
    counts = torch.zeros(begins[-1], dtype=torch.int64, device=device)
    tile_places = [_tile_places(launch, entries, places).to(device) for launch in launches]
    for launch, own_places in zip(launches, tile_places, strict=True):
        count_equal_kernel[(launch.n_tiles,)](
            *_table_arguments(launch),
            first_queries,
            models,
            keys,
            first_places,
            own_places,
            counts,
            **key_constants(keep, launch.kind),
            **EXACT,
        )
    reached = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), counts.cumsum(0)])
    before, after = reached[first_places[:-1]], reached[first_places[1:]]
    target = before + wanted
    known = (wanted >= 0) & (target < after)
    tile = torch.searchsorted(reached, target, right=True) - 1
    ranks = target - reached[tile.clamp(max=max(0, begins[-1] - 1))]
    chosen = torch.where(known, tile - first_places[:-1], -1)
    positions = torch.full((len(asked),), -1, dtype=torch.int64, device=device)
    for launch, own_places in zip(launches, tile_places, strict=True):
        find_equal_kernel[(launch.n_tiles,)](
            *_table_arguments(launch),
            first_queries,
            models,
            keys,
            chosen,
            ranks,
            own_places,
            positions,
            **key_constants(keep, launch.kind),
            **EXACT,
        )
    answers, numbers = [0] * len(order), [0] * len(order)
    for place, position, number in zip(order, positions.tolist(), (after - before).tolist(), strict=True):
        answers[place], numbers[place] = position, number
    return answers, numbers


def _n_tiles(entry: Entry) -> int:
    return -(-entry.n_elements // TILE.value)


def _places(entries: Sequence[Entry], n_groups: int) -> tuple[list[int], list[int]]:
    """The place of each entry's first tile among those of its group, by position; and tiles of each group."""
    places, n_places = [0] * len(entries), [0] * n_groups
    by_position = sorted(range(len(entries)), key=lambda e: entries[e].group_offset + entries[e].offset)
    for number in by_position:
        entry = entries[number]
        places[number] = n_places[entry.group]
        n_places[entry.group] += _n_tiles(entry)
    return places, n_places


def _tile_places(launch: Launch, entries: Sequence[Entry], places: Sequence[int]) -> Tensor:
    return torch.cat(
        [torch.arange(places[e], places[e] + _n_tiles(entries[e])) for e in launch.numbers]
    )  # fmt: skip
