"""Sums over the elements of all ranks, in the order-independent accumulator: exact, then rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.ops.raw import SUMS, AccumulatorStates, Wants
from tvfast.program import Moments
from tvfast.sharded.communicator import Communicator

WINDOW_BITS = 40
PART_BITS = 42  # of the three parts of a 128-bit total
_N_PARTS = 3


@dataclass(frozen=True, slots=True)
class _Fields:
    """How many sums and counts one entry of K models has."""

    n_models: int

    @property
    def n_sums(self) -> int:
        return 3 * self.n_models + self.n_models**2

    @property
    def n_counts(self) -> int:
        return 4 * self.n_models + 3


def totals(
    states: AccumulatorStates,
    rows: Sequence[int],
    n_models: int,
    team: Communicator | None,
    wants: Wants = SUMS,
) -> list[Moments]:
    """`Moments` of logical entries `rows` over all ranks, in two reductions; one if nothing was summed up.

    Args:
        team: None: of this rank alone.
        wants: what was measured; it decides how often ranks speak, so it is not read from the states.
    """
    fields = _Fields(n_models)
    windows = _rows(torch.tensor(states.windows, dtype=torch.int32), fields.n_sums, rows)
    parts = _rows(torch.tensor(states.parts, dtype=torch.int64), fields.n_sums * 2 * _N_PARTS, rows)
    nonfinite = _rows(torch.tensor(states.nonfinite, dtype=torch.float64), fields.n_sums, rows)
    counts = _rows(torch.tensor(states.counts, dtype=torch.int64), fields.n_counts, rows)
    kinds = torch.stack([nonfinite.isnan(), nonfinite == math.inf, nonfinite == -math.inf], -1).to(
        torch.int64
    )
    parts = parts.view(len(rows), fields.n_sums, 2, _N_PARTS)
    if team is not None and wants & SUMS:
        common = team.most(windows)
        parts, windows = _raised(parts, windows, common), common
        flat = torch.cat([parts.reshape(-1), kinds.reshape(-1), counts.reshape(-1)])
        found = torch.split(team.sum(flat), [parts.numel(), kinds.numel(), counts.numel()])
        parts, kinds, counts = (
            new.view(old.shape) for new, old in zip(found, (parts, kinds, counts), strict=True)
        )
    elif team is not None:
        counts = team.sum(counts)
    return [
        _moments([_value(*one) for one in zip(*of_entry, strict=True)], own_counts, n_models)
        for own_counts, *of_entry in zip(
            counts.tolist(), windows.tolist(), parts.tolist(), kinds.tolist(), strict=True
        )
    ]


def parts_of(total: int) -> tuple[int, int, int]:
    """A total of 128 bits in three parts that sums of 2^20 of them cannot overflow, lowest first."""
    mask = (1 << PART_BITS) - 1
    return total & mask, total >> PART_BITS & mask, total >> 2 * PART_BITS


def moments_of_states(states: AccumulatorStates, n_models: int) -> list[Moments]:
    """What the states are worth as they are."""
    n_entries = len(states.windows) // _Fields(n_models).n_sums
    return totals(states, range(n_entries), n_models, None)


def _rows(flat: Tensor, width: int, rows: Sequence[int]) -> Tensor:
    return flat.view(-1, width)[list(rows)]


def _raised(parts: Tensor, windows: Tensor, common: Tensor) -> Tensor:
    """High and low parts at a window that is not below their own."""
    high, low = parts[:, :, 0], parts[:, :, 1]
    same, one_up = (windows == common).unsqueeze(-1), (windows + 1 == common).unsqueeze(-1)
    nothing = torch.zeros_like(high)
    return torch.stack(
        [torch.where(same, high, nothing), torch.where(same, low, torch.where(one_up, high, nothing))], 2
    )


def _value(window: int, parts: Sequence[Sequence[int]], kinds: Sequence[int]) -> float:
    """The total, rounded once; the IEEE sum of the addends that are not finite, if there are any."""
    n_nan, n_up, n_down = kinds
    if n_nan or (n_up and n_down):
        return math.nan
    if n_up or n_down:
        return math.inf if n_up else -math.inf
    high, low = (sum(part << PART_BITS * place for place, part in enumerate(total)) for total in parts)
    total = (high << WINDOW_BITS) + low
    return math.ldexp(float(total), WINDOW_BITS * (window - 1)) if total else 0.0


def _moments(sums: Sequence[float], counts: Sequence[int], n_models: int) -> Moments:
    """In the order of `AccumulatorStates`."""
    k = n_models
    upper = sums[2 * k : 2 * k + k * k]
    n_kept, n_nonzero, n_nonfinite, n_alone = (list(counts[i * k : (i + 1) * k]) for i in range(4))
    n_base_nonfinite, elected, n_conflict = counts[4 * k :]
    return Moments(
        l1_before=list(sums[:k]),
        l1=list(sums[k : 2 * k]),
        gram=[[upper[min(a, b) * k + max(a, b)] for b in range(k)] for a in range(k)],
        dots=list(sums[2 * k + k * k :]),
        n_kept=n_kept,
        n_nonzero=n_nonzero,
        n_nonfinite=n_nonfinite,
        n_alone=n_alone,
        n_base_nonfinite=n_base_nonfinite,
        elected=elected,
        n_conflict=n_conflict,
    )
