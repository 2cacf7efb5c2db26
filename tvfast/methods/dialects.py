"""How each published TIES reads its name, as data: one `Program`, one rank rule, one tie rule per row.

A row is used by `methods.ties`; nothing here computes. `docs/numerics.md` gives the meaning of a `Program`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from tvfast.program import Ballot, Divisor, Keep, Members, Program, Reduce, Tie, Vote, ZeroSign


def kept_mergekit(density: float, n_elements: int) -> int:
    """int(density · n), at least one; none for a density of 0."""
    if density <= 0 or n_elements == 0:
        return 0
    return min(max(1, int(density * n_elements)), n_elements)


def kept_peft(density: float, n_elements: int) -> int:
    """int(density · n); none is allowed."""
    return min(max(0, int(density * n_elements)), n_elements)


def kept_original(density: float, n_elements: int) -> int:
    """int(density · n) + 1: the (n - int(density · n))-th smallest magnitude survives with all that equal it.

    The original raises at density 1, where that rank is 0; here everything is kept.
    """
    return min(int(density * n_elements) + 1, n_elements)


def kept_mergelm(density: float, n_elements: int) -> int:
    """n - int(n · mask rate) + 1, the mask rate being 1 - density.

    The original takes the mask rate itself: the rounding to 15 places makes density 0.9 mean mask rate 0.1,
    not 0.09999999999999998. It raises where int(n · mask rate) is 0; here everything is kept.
    """
    n_masked = int(n_elements * round(1.0 - density, 15))
    return min(n_elements - n_masked + 1, n_elements)


def kept_sd_mecha(density: float, n_elements: int) -> int:
    """n - max(int((1 - density) · n), 1) + 1."""
    return min(n_elements - max(int((1.0 - density) * n_elements), 1) + 1, n_elements)


@dataclass(frozen=True, slots=True, kw_only=True)
class TiesDialect:
    """One reading of TIES: trim, elect, disjoint reduction.

    Attributes:
        program: every stage; its `tie` is the row's default.
        scope: what is ranked together: each tensor, or all tensors of a model.
        kept: (density, n in scope) -> k; the k-th largest magnitude is the threshold, 0 keeps nothing.
        takes_weights: False where the peer has no weights; given ones then multiply after the vote.
        tied_majority: what stands for the majority sign where as many entries elect + as elect -.
        source: the peer, the version that was read, and the function.
        note: where this row departs from the peer on purpose.
    """

    program: Program
    scope: Literal["tensor", "model"]
    kept: Callable[[float, int], int]
    takes_weights: bool
    tied_majority: float = 0.0
    source: str
    note: str = ""

    @property
    def tie(self) -> Tie:
        """Which entries equal to the threshold survive unless the caller says otherwise."""
        return self.program.tie

    def majority(self, elected: int) -> float:
        """`TensorScalars.majority` from the sum of elected signs over the scope (`Moments.elected`)."""
        if elected == 0:
            return self.tied_majority
        return 1.0 if elected > 0 else -1.0


_MERGEKIT = Program(
    keep=Keep.BAND,
    tie=Tie.HASH,
    vote=Vote.MASS,
    ballot=Ballot.WEIGHTED,
    zero_sign=ZeroSign.PLUS,
    members=Members.STRICT,
    divisor=Divisor.WEIGHT,
)


def _original(reduce: Reduce, divisor: Divisor) -> Program:
    return Program(
        keep=Keep.BAND,
        tie=Tie.GE,
        vote=Vote.MASS,
        ballot=Ballot.RAW,
        zero_sign=ZeroSign.MAJORITY,
        members=Members.STRICT,
        reduce=reduce,
        divisor=divisor,
    )


def _peft(vote: Vote) -> Program:
    return Program(
        keep=Keep.BAND,
        tie=Tie.HASH,
        vote=vote,
        ballot=Ballot.RAW,
        zero_sign=ZeroSign.PLUS,
        members=Members.STRICT,
        divisor=Divisor.COUNT,
    )


def _sd_mecha(vote: Vote) -> Program:
    return Program(
        keep=Keep.BAND,
        tie=Tie.GE,
        vote=vote,
        ballot=Ballot.RAW,
        zero_sign=ZeroSign.NONE,
        members=Members.ZERO_COUNTS,
        divisor=Divisor.COUNT,
    )


_UNSPECIFIED = "Keeps exactly k in the peer, which of the tied ones being left to its sort; here by `tie`."
_NONFINITE = "The peer turns a non-finite result into 0; here it propagates."

TIES_DIALECTS: Mapping[str, TiesDialect] = MappingProxyType(
    {
        "mergekit": TiesDialect(
            program=_MERGEKIT,
            scope="tensor",
            kept=kept_mergekit,
            takes_weights=True,
            source="mergekit 0.1.5, method ties",
            note=_UNSPECIFIED,
        ),
        "paper": TiesDialect(
            program=_original(Reduce.SUM, Divisor.COUNT),
            scope="model",
            kept=kept_original,
            takes_weights=False,
            tied_majority=-1.0,
            source="Yadav et al. 2023, arXiv:2306.01708; prateeky2806/ties-merging 641600e, dis-mean; MaTS",
        ),
        "fusion_bench_sum": TiesDialect(
            program=_original(Reduce.SUM, Divisor.NONE),
            scope="model",
            kept=kept_original,
            takes_weights=False,
            tied_majority=-1.0,
            source="fusion_bench 0.2.33, ties_merging(merge_func='sum')",
        ),
        "fusion_bench_mean": TiesDialect(
            program=_original(Reduce.SUM, Divisor.COUNT),
            scope="model",
            kept=kept_original,
            takes_weights=False,
            tied_majority=-1.0,
            source="fusion_bench 0.2.33, ties_merging(merge_func='mean')",
        ),
        "fusion_bench_max": TiesDialect(
            program=_original(Reduce.MAX_ABS, Divisor.NONE),
            scope="model",
            kept=kept_original,
            takes_weights=False,
            source="fusion_bench 0.2.33, ties_merging(merge_func='max')",
        ),
        "mergelm": TiesDialect(
            program=_original(Reduce.SUM, Divisor.COUNT),
            scope="model",
            kept=kept_mergelm,
            takes_weights=False,
            source="yule-BUAA/MergeLM 0dbd199, MergingMethod.ties_merging",
        ),
        "peft": TiesDialect(
            program=_peft(Vote.MASS),
            scope="tensor",
            kept=kept_peft,
            takes_weights=True,
            source="peft 0.21.2, merge_utils.ties(majority_sign_method='total')",
            note=_UNSPECIFIED,
        ),
        "peft_frequency": TiesDialect(
            program=_peft(Vote.COUNT),
            scope="tensor",
            kept=kept_peft,
            takes_weights=True,
            source="peft 0.21.2, merge_utils.ties(majority_sign_method='frequency')",
            note=_UNSPECIFIED,
        ),
        "sd_mecha": TiesDialect(
            program=_sd_mecha(Vote.COUNT),
            scope="tensor",
            kept=kept_sd_mecha,
            takes_weights=False,
            source="sd-mecha 1.1.8, ties_sum(vote_sgn=False)",
            note=_NONFINITE,
        ),
        "sd_mecha_values": TiesDialect(
            program=_sd_mecha(Vote.MASS),
            scope="tensor",
            kept=kept_sd_mecha,
            takes_weights=False,
            source="sd-mecha 1.1.8, ties_sum(vote_sgn=True)",
            note=_NONFINITE,
        ),
    }
)
"""Every TIES by name. `merge(..., method="ties", dialect=NAME)` takes these names."""
