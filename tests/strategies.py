"""Hypothesis strategies and builders for work tables, programs and scalars.

Structure (lengths, dtypes, stages) is drawn by hypothesis and shrinks; contents come from a drawn seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tvfast.program import (
    ALWAYS,
    OPEN_CUT,
    Ballot,
    Cross,
    Divisor,
    DType,
    Entry,
    Gain,
    Keep,
    Members,
    ModelScalars,
    Program,
    Reduce,
    ScoreMap,
    TensorScalars,
    Tie,
    View,
    Vote,
    Weighting,
    WorkTable,
    ZeroSign,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_RANK = (Keep.RANDOM_BY_RANK, Keep.BAND_BY_RANK)
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_VIEW_DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}
_GUARD = 3  # elements on both sides of an output that must stay as they were
_SENTINEL = -7.0

_SPECIAL_BITS = {
    torch.float32: (
        *(0x0, 0x80000000, 0x1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00123, 0x7F800001),
        *(0x7F7FFFFF, 0xFF7FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x3F808000, 0x3F818000),
    ),
    torch.bfloat16: (
        *(0x0, 0x8000, 0x1, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x7F7F, 0xFF7F, 0x80),
        *(0x3F80, 0xBF80),
    ),
    torch.float16: (
        *(0x0, 0x8000, 0x1, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01, 0x7BFF, 0xFBFF, 0x400),
        *(0x3C00, 0xBC00),
    ),
}


def bits(tensor: Tensor) -> Tensor:
    """The integer bit patterns of a float tensor."""
    return tensor.contiguous().view(INTEGERS[tensor.dtype])


def view_of(tensor: Tensor) -> View:
    """A `View` of a contiguous float tensor; float64 tensors, which only the oracle reads, are marked F32."""
    return View(tensor.data_ptr(), tensor.numel(), _VIEW_DTYPES.get(tensor.dtype, DType.F32), tensor)


def plane_view(words: Tensor, n: int) -> View:
    """A `View` of a bit plane of n bits in int64 words."""
    return View(words.data_ptr(), n, DType.F32, words)


def pack_plane(flags: np.ndarray) -> Tensor:
    """Bools [n] as int64 words, lowest bit first."""
    n_words = -(-len(flags) // 64)
    padded = np.zeros(64 * n_words, dtype=bool)
    padded[: len(flags)] = flags
    return torch.from_numpy(np.packbits(padded, bitorder="little").view("<i8").copy())


def unpack_plane(words: Tensor, n: int) -> np.ndarray:
    """The first n bits of a plane as bools."""
    return np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[:n].astype(bool)


def placed(values: Tensor, lead: int) -> Tensor:
    """A copy that starts `lead` elements into its storage, so that any alignment occurs."""
    buffer = torch.zeros(values.numel() + lead + 1, dtype=values.dtype)
    tensor = buffer[lead : lead + values.numel()]
    tensor.copy_(values)
    return tensor


def grid_values(rng: np.random.Generator, n: int, dtype: torch.dtype, width: int = 32) -> Tensor:
    """m / 64 with |m| <= width: exact in every dtype, a third of them zero (of both signs), many ties."""
    m = rng.integers(-width, width + 1, n).astype(np.float32) / 64
    m[rng.random(n) < 0.3] = 0.0
    m[rng.random(n) < 0.05] = -0.0
    return torch.from_numpy(m).to(dtype)


def bit_values(rng: np.random.Generator, n: int, dtype: torch.dtype) -> Tensor:
    """Arbitrary bit patterns, a third of them special: NaN payloads, infinities, subnormals, -0."""
    width = 32 if dtype == torch.float32 else 16
    patterns = rng.integers(0, 2**width, n, dtype=np.uint64)
    special = np.array(_SPECIAL_BITS[dtype], dtype=np.uint64)[rng.integers(0, len(_SPECIAL_BITS[dtype]), n)]
    patterns = np.where(rng.random(n) < 0.33, special, patterns).astype(
        np.uint32 if width == 32 else np.uint16
    )
    return torch.from_numpy(patterns.view(np.int32 if width == 32 else np.int16).copy()).view(dtype)


def normal_values(rng: np.random.Generator, n: int, dtype: torch.dtype, std: float = 0.05) -> Tensor:
    """Continuous values, rounded to the dtype."""
    return torch.from_numpy(rng.standard_normal(n).astype(np.float32) * np.float32(std)).to(dtype)


MAKERS = {"grid": grid_values, "bits": bit_values, "normal": normal_values}


@dataclass
class Part:
    """One entry before it becomes a row of a table."""

    models: list[Tensor]
    base: Tensor | None = None
    out_dtype: torch.dtype = torch.float32
    out_lead: int = 0
    scores: list[Tensor] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)  # bools [n] per model
    row: int = 0
    offset: int = 0
    group: int = 0
    group_offset: int = 0
    score_maps: tuple[ScoreMap, ...] = ()
    task_vectors: bool = False

    @property
    def n(self) -> int:
        return self.models[0].numel()

    def shard(self, start: int, stop: int) -> Part:
        """Elements start .. stop - 1 as a shard that knows its place."""
        return replace(
            self,
            models=[model[start:stop] for model in self.models],
            base=None if self.base is None else self.base[start:stop],
            scores=[score[start:stop] for score in self.scores],
            masks=[mask[start:stop] for mask in self.masks],
            offset=self.offset + start,
        )


@dataclass
class Case:
    """A program, its scalars and what it is applied to."""

    program: Program
    parts: list[Part]
    scalars: list[TensorScalars]

    def table(self, outs: Sequence[Tensor] | None = None) -> WorkTable:
        """The work table; without `outs` it is for `measure` and `thresholds`."""
        return table_of(self.parts, outs)


def table_of(parts: Sequence[Part], outs: Sequence[Tensor] | None = None) -> WorkTable:
    """A work table over the parts' own tensors."""
    entries = [
        Entry(
            name=f"tensor {i}",
            models=tuple(view_of(model) for model in part.models),
            base=None if part.base is None else view_of(part.base),
            out=None if outs is None else view_of(outs[i]),
            scores=tuple(view_of(score) for score in part.scores),
            score_maps=part.score_maps,
            masks=tuple(plane_view(pack_plane(mask), part.n) for mask in part.masks),
            row=part.row,
            offset=part.offset,
            group=part.group,
            group_offset=part.group_offset,
            task_vectors=part.task_vectors,
        )
        for i, part in enumerate(parts)
    ]
    return WorkTable(entries, len(parts[0].models))


def combined(backend: Any, case: Case, out_dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """Fresh outputs of `combine`, one per part; asserts that their neighbours in memory are untouched."""
    outs, buffers = [], []
    for part in case.parts:
        lead = _GUARD + part.out_lead
        buffer = torch.full((part.n + lead + _GUARD,), _SENTINEL, dtype=out_dtype or part.out_dtype)
        buffers.append((buffer, lead, part.n))
        outs.append(buffer[lead : lead + part.n])
    backend.combine(case.table(outs), case.program, case.scalars, **options)
    for buffer, lead, n in buffers:
        assert bool((buffer[:lead] == _SENTINEL).all()), "combine wrote before its output"
        assert bool((buffer[lead + n :] == _SENTINEL).all()), "combine wrote behind its output"
    return outs


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor], what: Any = "") -> None:
    """Equal bit patterns, or an error that names the first few places where they differ."""
    assert len(found) == len(expected)
    for i, (left, right) in enumerate(zip(found, expected, strict=True)):
        if torch.equal(bits(left), bits(right)):
            continue
        differing = torch.nonzero(bits(left) != bits(right)).view(-1)[:4].tolist()
        assert not differing, f"{what}: tensor {i}, " + "; ".join(
            f"[{j}] found {left[j].item()!r}, expected {right[j].item()!r}" for j in differing
        )


# One strategy for every stage: a new stage is covered as soon as its enum has the value.
programs = st.builds(
    Program,
    keep=st.sampled_from(Keep),
    tie=st.sampled_from(Tie),
    gain=st.sampled_from(Gain),
    vote=st.sampled_from(Vote),
    ballot=st.sampled_from(Ballot),
    zero_sign=st.sampled_from(ZeroSign),
    members=st.sampled_from(Members),
    reduce=st.sampled_from(Reduce),
    divisor=st.sampled_from(Divisor),
)
# Stages on scores; cases of them have score maps.
scoring_programs = st.builds(
    replace,
    programs,
    keep=st.sampled_from([Keep.SCORE, *Keep]),
    cross=st.sampled_from(Cross),
    weighting=st.sampled_from([kind for kind in Weighting if kind is not Weighting.NEARNESS]),
)
near_programs = st.builds(replace, programs, weighting=st.just(Weighting.NEARNESS))  # of two models
undivided_programs = programs.map(lambda program: replace(program, divisor=Divisor.NONE))

lengths = st.one_of(
    st.integers(0, 3),
    st.integers(4, 70),
    st.sampled_from([63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1000]),
)
model_counts = st.one_of(st.integers(1, 9), st.just(17))
offsets = st.one_of(
    st.integers(0, 9), st.sampled_from([2**31 - 2, 2**31, 2**32 - 5, 2**33 + 3, 2**34 - 6, 2**40 + 1])
)
_numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 0.3, -2.0, 0.1]), st.floats(-4.0, 4.0, width=32)
)
_powers = st.sampled_from([1.0, 0.5, 2.0, 0.25, -1.0, 0.0])
_cuts = st.one_of(st.sampled_from([0, 1, OPEN_CUT, 2**31, 2**32]), st.integers(0, 200), st.integers(0, 2**32))
_keys = st.integers(0, 2**64 - 1)


@st.composite
def model_scalars(draw: st.DrawFn, ends: Sequence[float], n: int, exact: bool) -> ModelScalars:
    """Scalars of one model. `ends`: magnitudes that occur. `exact`: powers of two, to keep fp32 exact."""
    numbers = _powers if exact else _numbers
    end = st.one_of(st.sampled_from([*ends, 0.0, math.inf]), st.floats(0.0, 1.0, width=32))
    return ModelScalars(
        weight=draw(numbers),
        gain=draw(numbers),
        lo=draw(end),
        hi=draw(end),
        lo_cut=draw(_cuts),
        hi_cut=draw(_cuts),
        limit=draw(st.one_of(st.sampled_from([0, ALWAYS]), st.integers(0, ALWAYS))),
        limit_step=draw(st.one_of(st.integers(0, 2**64 // (n + 2)), st.integers(0, 2**64 - 1))),
        prob=draw(st.sampled_from([1.0, 0.5, 0.25]) if exact else st.floats(0.0, 1.0, width=32)),
        prob_step=0.0 if exact else draw(st.sampled_from([0.0, 1e-3, -1e-3, 0.25])),
        rank_lo=draw(st.integers(0, n + 1)),
        rank_hi=draw(st.one_of(st.integers(0, n + 1), st.just(2**63 - 1))),
        key=draw(_keys),
    )


@st.composite
def tensor_scalars(draw: st.DrawFn, part: Part, exact: bool) -> TensorScalars:
    """Scalars of one tensor; band ends are often magnitudes that occur in it, so that ties are common."""
    scalars = []
    for k, model in enumerate(part.models):
        tau = model.float() if part.base is None or part.task_vectors else model.float() - part.base.float()
        seen = [float(x) for x in tau[:6].abs() if math.isfinite(float(x))]
        seen += [
            float(x)
            for x in (part.scores[k][:4].float().abs() if part.scores else [])
            if math.isfinite(float(x))
        ]
        scalars.append(draw(model_scalars(seen, part.n, exact)))
    return TensorScalars(
        models=scalars,
        scale=draw(_powers if exact else _numbers),
        majority=draw(st.sampled_from([-1.0, 0.0, 1.0])),
        divisor_floor=draw(st.sampled_from([2.0**-149, 1e-8, 0.5])),
        divisor_fill=draw(st.sampled_from([1.0, 1e-8])),
    )


_score_maps = st.builds(
    ScoreMap,
    scale=st.sampled_from([1.0, 0.5, 4.0, 0.3]),
    shift=st.sampled_from([0.0, -0.25, 0.125, 1e-3]),
    floor=st.sampled_from([0.0, 0.0625, 1e-6]),
)


@st.composite
def scored(draw: st.DrawFn, case: Case) -> Case:
    """The case with a map for every score."""
    for part in case.parts:
        part.score_maps = tuple(draw(_score_maps) for _ in part.models)
    return case


@st.composite
def parts(draw: st.DrawFn, n_models: int, kinds: Sequence[str], widest: int = 1000) -> Part:
    """One entry: any length, dtypes, alignment, row and offset."""
    n = min(draw(lengths), widest)
    kind = draw(st.sampled_from(kinds))
    make = MAKERS[kind]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(n_models + 1)]
    if draw(st.booleans()):
        dtypes = [dtypes[0]] * (n_models + 1)
    leads = rng.integers(0, 4, n_models + 1)
    models = [
        placed(make(rng, n, dtype), int(lead)) for dtype, lead in zip(dtypes[1:], leads[1:], strict=True)
    ]
    for k in range(1, n_models):
        if rng.random() < 0.3:  # exact copies make ties between models
            same = torch.from_numpy(rng.random(n) < 0.5)
            models[k][same] = models[k - 1][same].to(models[k].dtype)
    return Part(
        models=models,
        base=placed(make(rng, n, dtypes[0]), int(leads[0])) if draw(st.booleans()) else None,
        out_dtype=draw(st.sampled_from(DTYPES)),
        out_lead=draw(st.integers(0, 3)),
        scores=[
            placed(make(rng, n, dtype), int(lead)) for dtype, lead in zip(dtypes[1:], leads[1:], strict=True)
        ],
        masks=[rng.random(n) < 0.6 for _ in range(n_models)],
        row=draw(st.one_of(st.just(0), st.integers(1, n + 2))),
        offset=draw(offsets),
        task_vectors=draw(st.booleans()),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    kinds: Sequence[str] = ("grid", "bits", "normal"),
    choose: st.SearchStrategy[Program] = programs,
    exact: bool = False,
    most_parts: int = 3,
    widest: int = 1000,
    counts: st.SearchStrategy[int] = model_counts,
) -> Case:
    """A program and a table of one to `most_parts` entries, each with its own scalars."""
    n_models = draw(counts)
    drawn = [draw(parts(n_models, kinds, widest)) for _ in range(draw(st.integers(1, most_parts)))]
    return Case(draw(choose), drawn, [draw(tensor_scalars(part, exact)) for part in drawn])


def scoring_cases(**options: Any) -> st.SearchStrategy[Case]:
    """Cases of the stages on scores."""
    return cases(choose=scoring_programs, **options).flatmap(scored)


near_cases = cases(choose=near_programs, counts=st.just(2))
"""Cases of two models that are weighted by how near they are."""
