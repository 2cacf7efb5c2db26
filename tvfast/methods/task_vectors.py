"""What the methods on task vectors share: consensus, normalisation and the L1 rescale of mergekit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvfast.methods.base import ProgramMethod
from tvfast.methods.scalars import float32
from tvfast.methods.statistics import NONE, Band, Norms, Ranks, TableStatistics
from tvfast.program import Ballot, Divisor, Members, Program, RankQuery, TensorScalars, Vote, ZeroSign

SMALLEST_L1 = float32(1e-7)  # mergekit leaves task vectors below it unscaled
SMALLEST_WEIGHT_SUM = float32(1e-8)  # mergekit replaces weight sums below it by 1

CONSENSUS = Program(
    vote=Vote.MASS,
    ballot=Ballot.WEIGHTED,
    zero_sign=ZeroSign.PLUS,
    members=Members.STRICT,
    divisor=Divisor.WEIGHT,
)
"""mergekit's sign consensus: weighted votes, a zero vote is positive, divided by the members' weights."""

SUM = Program(divisor=Divisor.WEIGHT)
"""No consensus: every model takes part."""


def normalised(program: Program, normalize: bool) -> Program:
    """The program with its own divisor (the weights where it has none), or undivided."""
    if not normalize:
        return replace(program, divisor=Divisor.NONE)
    return program if program.divisor is not Divisor.NONE else replace(program, divisor=Divisor.WEIGHT)


@dataclass(frozen=True, kw_only=True)
class TaskVectorMethod(ProgramMethod):
    """Base of the methods that add merged task vectors to the base."""

    def summed_scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        """Plain scalars, with mergekit's floor for weight sums where there is no consensus."""
        scalars = self.plain_scalars(statistics.table)
        if self.program().vote is Vote.NONE:
            for tensor in scalars:
                tensor.divisor_floor = SMALLEST_WEIGHT_SUM
        return scalars

    def trims(self, n_models: int) -> Ranks | None:
        """What survives where magnitudes from a rank on are all that is measured; None of other methods."""
        return None


def trim(statistics: TableStatistics, scalars: Sequence[TensorScalars], ranks: Ranks) -> list[RankQuery]:
    """The queries whose answers are the lower ends; bands that need none are put into the scalars."""
    queries: list[RankQuery] = []
    dropped: set[tuple[int, int]] = set()
    for group, n in enumerate(statistics.group_sizes):
        for model in range(statistics.table.n_models):
            last = min(ranks(group, model, n)[1], n)
            if 0 < last < n:
                queries.append(RankQuery(group, model, last))
            elif last <= 0:
                dropped.add((group, model))
    for entry, tensor in zip(statistics.table.entries, scalars, strict=True):
        for k, model_scalars in enumerate(tensor.models):
            if (entry.group, k) in dropped:
                NONE.write_to(model_scalars)
    return queries


def write_bands(scalars: Sequence[TensorScalars], bands: Sequence[Sequence[Band]]) -> None:
    """Put each model's band into its scalars."""
    for tensor, row in zip(scalars, bands, strict=True):
        for model, band in zip(tensor.models, row, strict=True):
            band.write_to(model)


def rescale_l1(statistics: TableStatistics, keep: Program, scalars: Sequence[TensorScalars]) -> None:
    """Gains of the L1 norms, measured on the very entries that are kept."""
    write_gains(scalars, statistics.l1(Program(keep=keep.keep, tie=keep.tie), scalars))


def write_gains(scalars: Sequence[TensorScalars], norms: Norms) -> None:
    """gain_k = |τ_k|₁ / |kept τ_k|₁ per tensor; 1 below 1e-7."""
    for tensor, row in zip(scalars, norms, strict=True):
        for model, (before, after) in zip(tensor.models, row, strict=True):
            if before >= SMALLEST_L1 and after >= SMALLEST_L1:
                model.gain = float32(before / after)


def write_majority(
    statistics: TableStatistics,
    program: Program,
    scalars: Sequence[TensorScalars],
    majority: Callable[[int], float],
) -> None:
    """The sign that stands for a zero vote, from the elected signs of each group."""
    signs = [majority(total) for total in statistics.elected(program, scalars)]
    for entry, tensor in zip(statistics.table.entries, scalars, strict=True):
        tensor.majority = signs[entry.group]


def keeps_all(densities: Sequence[float]) -> bool:
    """Whether no model loses entries."""
    return all(density >= 1.0 for density in densities)
