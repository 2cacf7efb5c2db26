"""A work table in device memory: addresses, scalars and the tiles of one launch."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvfast.program import Entry, ModelScalars, ScoreMap, TensorScalars, View

_INT64_MAX = 2**63 - 1
_AS_STORED = ScoreMap(scale=1.0, shift=-0.0, floor=-math.inf)
"""Leaves every score as it is stored: the product and the sum are exact, and no score is below."""

TILE = tl.constexpr(1 << 14)
"""Elements of one program instance: many, so that the search for the entry is rare. Not tuned on a device."""

# int64 fields of an entry, then of each model.
N = tl.constexpr(0)
OFFSET = tl.constexpr(1)
BASE = tl.constexpr(2)
BASE_DTYPE = tl.constexpr(3)
OUT = tl.constexpr(4)
OUT_DTYPE = tl.constexpr(5)
GROUP = tl.constexpr(6)
POSITION = tl.constexpr(7)  # of element 0 in its group
HEADER = tl.constexpr(8)
MODEL = tl.constexpr(0)
MODEL_DTYPE = tl.constexpr(1)
SCORE = tl.constexpr(2)
SCORE_DTYPE = tl.constexpr(3)
MASK = tl.constexpr(4)
RANK = tl.constexpr(5)
MAP = tl.constexpr(6)  # bits of float32: scale, shift and floor of the scores
MODEL_FIELDS = tl.constexpr(9)

# float32 scalars of a tensor, then those of a model.
SCALE = tl.constexpr(0)
MAJORITY = tl.constexpr(1)
FLOOR = tl.constexpr(2)
FILL = tl.constexpr(3)
TENSOR_REALS = tl.constexpr(4)
WEIGHT = tl.constexpr(0)
GAIN_REAL = tl.constexpr(1)
LO = tl.constexpr(2)
HI = tl.constexpr(3)
PROB = tl.constexpr(4)
PROB_STEP = tl.constexpr(5)
REALS = tl.constexpr(6)

# int64 scalars of a model.
LO_CUT = tl.constexpr(0)
HI_CUT = tl.constexpr(1)
LIMIT = tl.constexpr(2)
LIMIT_STEP = tl.constexpr(3)
RANK_LO = tl.constexpr(4)
RANK_HI = tl.constexpr(5)
KEY = tl.constexpr(6)
WHOLES = tl.constexpr(7)


@triton.jit
def find_entry(
    first_tiles,  # [n_entries + 1] int64, ascending
    n_entries,
    tile,
):
    """The entry that a tile belongs to: the last one that starts at or before it."""
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0, tl.int32) + n_entries
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.load(first_tiles + middle) <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low.to(tl.int64)


@dataclass(frozen=True, slots=True)
class Kind:
    """What the kernels of one launch are compiled for."""

    dtype: int  # of base and models; MIXED if they differ
    out_dtype: int
    has_base: bool
    aligned: bool  # every address by 16 bytes, every offset by 4 elements
    task_vectors: bool = False  # the models are: a base is not subtracted from them
    scored: bool = False  # there are scores to read

    @property
    def subtracts(self) -> bool:
        """Whether task vectors are differences from the base."""
        return self.has_base and not self.task_vectors


@dataclass(frozen=True, slots=True)
class Launch:
    """Entries that one launch processes, on the device."""

    kind: Kind
    numbers: tuple[int, ...]  # of its entries in the work table
    fields: Tensor  # [n_entries, HEADER + K * MODEL_FIELDS] int64
    first_tiles: Tensor  # [n_entries + 1] int64
    n_tiles: int
    n_models: int

    @property
    def stride(self) -> int:
        return self.fields.shape[1]


@dataclass(frozen=True, slots=True)
class DeviceScalars:
    """Scalars of a launch's entries."""

    tensors: Tensor  # [n_entries, TENSOR_REALS] float32
    reals: Tensor  # [n_entries, K, REALS] float32
    wholes: Tensor  # [n_entries, K, WHOLES] int64


def _address(view: View | None) -> tuple[int, int]:
    return (0, 0) if view is None else (view.address, int(view.dtype))


def kind_of(entry: Entry) -> Kind:
    """The launch that an entry belongs to."""
    inputs = [*entry.models, *([] if entry.base is None else [entry.base])]
    dtypes = {int(view.dtype) for view in inputs}
    views = [*inputs, *entry.scores, *([] if entry.out is None else [entry.out])]
    return Kind(
        dtype=dtypes.pop() if len(dtypes) == 1 else -1,
        out_dtype=0 if entry.out is None else int(entry.out.dtype),
        has_base=entry.base is not None,
        aligned=entry.offset % 4 == 0 and all(view.address % 16 == 0 for view in views),
        task_vectors=entry.task_vectors,
        scored=bool(entry.scores),
    )


def _map_bits(entry: Entry, k: int) -> tuple[int, ...]:
    own = entry.score_maps[k] if entry.score_maps else _AS_STORED
    return struct.unpack("<3i", struct.pack("<3f", own.scale, own.shift, own.floor))


def _fields(entry: Entry, ranks: Tensor | None) -> list[int]:
    fields = [
        entry.n_elements,
        entry.offset,
        *_address(entry.base),
        *_address(entry.out),
        entry.group,
        entry.group_offset + entry.offset,
    ]
    for k, model in enumerate(entry.models):
        score = entry.scores[k] if entry.scores else None
        mask = entry.masks[k].address if entry.masks else 0
        rank = 0 if ranks is None else ranks[k].data_ptr()
        fields += [*_address(model), *_address(score), mask, rank, *_map_bits(entry, k)]
    return fields


def launches(
    entries: Sequence[Entry],
    numbers: Sequence[int],
    n_models: int,
    device: torch.device,
    ranks: Sequence[Tensor] | None = None,
) -> list[Launch]:
    """The entries that have elements, by kind; `ranks` [K, n] int64 of each where the keep stage ranks."""
    by_kind: dict[Kind, list[int]] = {}
    for place, entry in enumerate(entries):
        if entry.n_elements > 0:
            by_kind.setdefault(kind_of(entry), []).append(place)
    found = []
    for kind, places in by_kind.items():
        first_tiles = [0]
        for place in places:
            first_tiles.append(first_tiles[-1] - (-entries[place].n_elements // TILE.value))
        rows = [_fields(entries[p], None if ranks is None else ranks[p]) for p in places]
        found.append(
            Launch(
                kind=kind,
                numbers=tuple(numbers[place] for place in places),
                fields=torch.tensor(rows, dtype=torch.int64).to(device),
                first_tiles=torch.tensor(first_tiles, dtype=torch.int64).to(device),
                n_tiles=first_tiles[-1],
                n_models=n_models,
            )
        )
    return found


def _wholes(model: ModelScalars) -> list[int]:
    # Cuts are unsigned 64-bit; tie ranks stay below 2^63, so a clamped cut compares alike.
    return [
        min(model.lo_cut, _INT64_MAX),
        min(model.hi_cut, _INT64_MAX),
        model.limit,
        _signed(model.limit_step),
        model.rank_lo,
        model.rank_hi,
        _signed(model.key),
    ]


def _signed(bits: int) -> int:
    return (bits + 2**63) % 2**64 - 2**63


def device_scalars(launch: Launch, scalars: Sequence[TensorScalars]) -> DeviceScalars:
    """The scalars of a launch's entries, rounded to float32."""
    own = [scalars[number] for number in launch.numbers]
    device = launch.fields.device
    tensors = [[s.scale, s.majority, s.divisor_floor, s.divisor_fill] for s in own]
    reals = [[[m.weight, m.gain, m.lo, m.hi, m.prob, m.prob_step] for m in s.models] for s in own]
    wholes = [[_wholes(m) for m in s.models] for s in own]
    return DeviceScalars(
        torch.tensor(tensors, dtype=torch.float32).to(device),
        torch.tensor(reals, dtype=torch.float32).to(device),
        torch.tensor(wholes, dtype=torch.int64).to(device),
    )
