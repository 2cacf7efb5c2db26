"""The merge algebra as plain data: what to keep, how to vote, how to reduce.

Pure Python twin of ``csrc/core/program.hpp``: same enum names, same values (a test compares them).
Nothing here imports torch or any other part of tvfast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

OPEN_CUT = 2**64 - 1
"""A tie cut that keeps every tied entry."""

ALWAYS = 2**32
"""A keep limit that no 32-bit draw reaches: probability one."""

SMALLEST_POSITIVE = 2.0**-149
"""Smallest positive float32: as ``divisor_floor`` it replaces a divisor of exactly zero and no other."""


class DType(IntEnum):
    """Storage types the kernels read and write."""

    F32 = 0
    BF16 = 1
    F16 = 2


class Keep(IntEnum):
    """Which entries of a task vector survive. A NaN entry always survives, so that NaN propagates."""

    ALL = 0
    BAND = 1  # lo <= |tau| <= hi, ties at the ends by `Tie`
    SCORE = 2  # the same test on |score|, an external array per model
    VARIANCE = 3  # the same test on the population variance of tau across models
    RANDOM = 4  # Bernoulli(prob)
    RANDOM_BY_RANK = 5  # Bernoulli(p(rank of |tau| within its row))
    BAND_BY_RANK = 6  # rank_lo <= rank of |tau| within its row < rank_hi
    MASK = 7  # bit plane per model


class Tie(IntEnum):
    """Which entries equal to an end of a band survive."""

    GE = 0  # all
    INDEX = 1  # those of lowest flat index
    HASH = 2  # those of lowest hashed index


class Cross(IntEnum):
    """Which entries `Keep.SCORE` takes from a model because of the other models' scores."""

    NONE = 0
    WINNER = 1  # those that do not exceed every other model's score
    EXCLUDE_OTHERS = 2  # those that are within another model's band


class Weighting(IntEnum):
    """What a model's entries are weighted by."""

    MODEL = 0  # the model's weight
    SCORE = 1  # the model's weight times the entry's score
    NEARNESS = 2  # of two models: how near they are; the second one's weight is where they count as one
    ALONE = 3  # the model's weight where no other model has an entry, otherwise 1


class Gain(IntEnum):
    """How kept entries are rescaled."""

    MODEL = 0  # times the model's gain
    INVERSE_PROBABILITY = 1  # divided by their own keep probability


class Vote(IntEnum):
    """How the sign of an entry is elected."""

    NONE = 0
    MASS = 1  # sign of the sum of ballots
    COUNT = 2  # sign of the sum of the ballots' signs


class Ballot(IntEnum):
    """What a model casts: its kept entry, or that entry times its weight."""

    RAW = 0
    WEIGHTED = 1


class ZeroSign(IntEnum):
    """The elected sign where the vote is zero."""

    PLUS = 0
    MINUS = 1
    NONE = 2
    MAJORITY = 3  # the tensor scalar `majority`


class Members(IntEnum):
    """Who takes part in the reduction."""

    STRICT = 0  # non-zero ballots of the elected sign
    ZERO_COUNTS = 1  # ballots whose sign, zero included, equals the elected sign


class Reduce(IntEnum):
    """How the members' weighted entries become one."""

    SUM = 0
    MAX_ABS = 1  # the entry of largest magnitude; among equals the later model
    FUSED_SUM = 2  # a sum by fused multiply-add: weights are not rounded into the terms


class Divisor(IntEnum):
    """What the reduction is divided by."""

    NONE = 0
    COUNT = 1
    WEIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One choice per stage. `docs/numerics.md` gives the arithmetic and its order."""

    keep: Keep = Keep.ALL
    tie: Tie = Tie.GE
    gain: Gain = Gain.MODEL
    vote: Vote = Vote.NONE
    ballot: Ballot = Ballot.RAW
    zero_sign: ZeroSign = ZeroSign.PLUS
    members: Members = Members.ZERO_COUNTS
    reduce: Reduce = Reduce.SUM
    divisor: Divisor = Divisor.NONE
    cross: Cross = Cross.NONE
    weighting: Weighting = Weighting.MODEL

    @property
    def ranks_rows(self) -> bool:
        """Whether the keep stage needs whole rows at once."""
        return self.keep in (Keep.RANDOM_BY_RANK, Keep.BAND_BY_RANK)

    @property
    def reads_scores(self) -> bool:
        """Whether every model needs an array of scores."""
        return self.keep is Keep.SCORE or self.weighting is Weighting.SCORE


@dataclass(slots=True, kw_only=True)
class ModelScalars:
    """Numbers that one model brings to one tensor."""

    weight: float = 1.0
    gain: float = 1.0
    lo: float = 0.0
    hi: float = math.inf
    lo_cut: int = OPEN_CUT  # |tau| == lo survives iff tie rank < lo_cut
    hi_cut: int = 0  # |tau| == hi survives iff tie rank >= hi_cut
    limit: int = ALWAYS  # Bernoulli: survives iff the 32-bit draw < limit + (rank * limit_step >> 32)
    limit_step: int = 0  # 32.32 fixed point, per rank
    prob: float = 1.0  # the probability as float32: prob + rank * prob_step
    prob_step: float = 0.0
    rank_lo: int = 0
    rank_hi: int = 2**63 - 1
    key: int = 0  # Philox and tie-hash key, 64 bits


@dataclass(slots=True, kw_only=True)
class TensorScalars:
    """Numbers of one tensor."""

    models: list[ModelScalars]
    scale: float = 1.0
    majority: float = 1.0  # -1, 0 or 1: the sign for `ZeroSign.MAJORITY`
    divisor_floor: float = SMALLEST_POSITIVE  # a divisor below it in magnitude ...
    divisor_fill: float = 1.0  # ... is replaced by this


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMap:
    """How a stored score is read: max(score * scale + shift, floor)."""

    scale: float = 1.0
    shift: float = 0.0
    floor: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What is known of one model's scores of one tensor: extremes and sums as they are stored.

    The scores are what is stored by `divisor`; `model_norm` is the norm of the scores of the whole model.
    """

    n_elements: int
    least: float
    most: float
    l1: float
    squares: float
    divisor: float = 1.0
    model_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """Contiguous elements in host or device memory; `owner` keeps them alive and may be a tensor."""

    address: int
    n_elements: int
    dtype: DType
    owner: Any = None


@dataclass(slots=True, kw_only=True)
class Entry:
    """One row of a work table: a tensor of the base, its counterparts and where the result goes."""

    name: str
    models: tuple[View, ...]
    base: View | None = None  # None: the models themselves are merged, and nothing is added
    out: View | None = None  # may be `base` or one of `models`, exactly
    scores: tuple[View, ...] = ()  # one float array per model, for Keep.SCORE and Weighting.SCORE
    score_maps: tuple[ScoreMap, ...] = ()  # one per model, or none: magnitudes are read as they are
    score_summaries: tuple[ScoreSummary, ...] = ()  # one per score, where the method asks for scores
    masks: tuple[View, ...] = ()  # (address of 64-bit words, n bits); dtype is not read
    row: int = 0  # elements per row for ranks; 0: the whole tensor is one row
    offset: int = 0  # global index of the first element (a shard's position in its tensor)
    run: int = 0  # elements after which the global index jumps, whole rows of them; 0: it never does
    run_step: int = 0  # from the global index of a run's first element to that of the next
    group: int = 0  # entries of one group share thresholds
    group_offset: int = 0  # position of element 0 of the whole tensor within the group
    task_vectors: bool = False  # the models are task vectors: the base is added, never subtracted

    @property
    def n_elements(self) -> int:
        return self.models[0].n_elements

    def index_of(self, i: int) -> int:
        """Global index of element i."""
        return self.offset + (i // self.run * self.run_step + i % self.run if self.run else i)


def reads_index(program: Program) -> bool:
    """Whether decisions of a program depend on where in its tensor an element is."""
    banded = program.keep in (Keep.BAND, Keep.SCORE, Keep.VARIANCE)
    drawn = program.keep in (Keep.RANDOM, Keep.RANDOM_BY_RANK)
    return drawn or (banded and program.tie is not Tie.GE)


@dataclass(slots=True)
class WorkTable:
    """Tensors that one call of `measure` or `combine` processes."""

    entries: list[Entry]
    n_models: int
    cache: dict[str, Any] = field(default_factory=dict, repr=False)  # a backend's own form of the table

    @property
    def n_groups(self) -> int:
        return 1 + max((entry.group for entry in self.entries), default=-1)


@dataclass(frozen=True, slots=True)
class RankQuery:
    """The `k`-th largest key (1-based) of `model` over all entries of `group`."""

    group: int
    model: int
    k: int


@dataclass(frozen=True, slots=True)
class Threshold:
    """Answer to a `RankQuery`: n_greater < k <= n_greater + n_equal, exactly."""

    value: float
    n_greater: int
    n_equal: int


@dataclass(slots=True, kw_only=True)
class Moments:
    """Sums over one entry, after the keep stage and before gain and weight. Order-independent.

    `l1_before` is over all entries of tau; the rest is over kept ones. K = number of models.
    """

    l1_before: list[float]  # [K] sum |tau_k|
    l1: list[float]  # [K] sum |t_k|
    gram: list[list[float]]  # [K][K] sum t_j * t_k
    n_kept: list[int]  # [K]
    n_nonzero: list[int]  # [K] kept and not zero
    n_nonfinite: list[int]  # [K] of the model's own entries
    n_base_nonfinite: int = 0
    elected: int = 0  # sum over entries of the elected sign before zero_sign
    n_conflict: int = 0  # entries with a positive and a negative kept value
    dots: list[float] = field(default_factory=list)  # [K] sum t_k * score_k; empty from a backend without
    n_alone: list[int] = field(default_factory=list)  # [K] kept, and the only one that is not zero

    @classmethod
    def empty(cls, n_models: int) -> Moments:
        """Those of no elements."""
        return cls(
            l1_before=[0.0] * n_models,
            l1=[0.0] * n_models,
            gram=[[0.0] * n_models for _ in range(n_models)],
            n_kept=[0] * n_models,
            n_nonzero=[0] * n_models,
            n_nonfinite=[0] * n_models,
            dots=[0.0] * n_models,
            n_alone=[0] * n_models,
        )
