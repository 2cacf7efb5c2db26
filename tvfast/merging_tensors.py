"""Merges of tensors in memory by methods outside the stage algebra, from statistics of each model."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tvfast._leaves import Leaf
from tvfast.errors import ArgumentError, StatisticsError
from tvfast.factors.records import BLOCK, KFAC, Curvature, Statistics, statistics_of
from tvfast.methods import Method, ProgramMethod, TensorMethod
from tvfast.methods.base import TensorJob

_SHOWN = 4  # names in a line
_JOBS = 32  # tensors whose factors are in memory together, at most
_SMALL = 2**20  # elements of a tensor that is not alone


def check_statistics(
    method: Method, stats: Iterable[Any] | None, n_models: int | None
) -> Sequence[Any] | None:
    """The statistics, one per model where the method takes them.

    Raises:
        ArgumentError: naming how many were found and expected.
    """
    wanted = bool(method.statistics)
    if stats is None and wanted:
        raise ArgumentError(
            f"method {method.info.name!r} needs statistics of every model, and stats is None; expected one "
            "per model. Collect them with tvfast.curvature.collect."
        )
    if stats is None:
        return None
    if not wanted:
        raise ArgumentError(f"method {method.info.name!r} takes no stats; expected None.")
    given = [stats] if isinstance(stats, str | os.PathLike | Mapping) else list(stats)
    if isinstance(stats, str | os.PathLike | Mapping) or n_models not in (None, len(given)):
        raise ArgumentError(
            f"stats has {len(given)} items for {n_models} models; expected a list, one per model."
        )
    return given


def merge_tensors(
    method: TensorMethod,
    pairs: Sequence[tuple[Leaf, Tensor]],
    stats: Sequence[Any] | None,
    report: list[str] | None,
    gathered: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    put: Callable[[Leaf, Tensor, Tensor], object] = lambda leaf, out, merged: out.copy_(merged),
) -> tuple[list[tuple[Leaf, Tensor]], ProgramMethod | None]:
    """Merge the leaves that the method has a rule for; the rest, and the method that averages them, if any.

    Args:
        gathered: makes a whole tensor of what a leaf has, where that is only a part.
        put: writes a merged tensor into what a leaf's `out` is.

    Raises:
        StatisticsError: statistics of other models: of no tensor here, or of another shape.
        SolveError: singular or non-finite factors.
    """
    sources = checked_sources(stats, [leaf for leaf, _ in pairs])
    rest: list[tuple[Leaf, Tensor]] = []
    mine: list[tuple[Leaf, Tensor]] = []
    reasons: dict[str, list[Leaf]] = defaultdict(list)
    average: ProgramMethod | None = None
    for leaf, out in pairs:
        kinds = [kind_of(source, leaf) for source in sources] or [None] * len(leaf.models)
        found = method.fallback(tuple(leaf.base.shape), kinds, len(leaf.models))
        if found is None:
            mine.append((leaf, out))
            continue
        average, reason = found
        reasons[reason].append(leaf)
        rest.append((leaf, out))
    lines = [f"{method.info.name}: averaged, {why}: {_some(leaves)}" for why, leaves in reasons.items()]
    for some in _batches(mine):
        jobs = [
            TensorJob(
                leaf.name,
                gathered(leaf.base) if method.reads_base else None,
                tuple(map(gathered, leaf.models)),
                tuple(_curvature(source, leaf) for source in sources),
            )
            for leaf, _ in some
        ]
        for (leaf, out), result in zip(some, method.merge(jobs), strict=True):
            put(leaf, out, result.tensor.to(leaf.base.device))
            lines += [f"{method.info.name}: {result.note}"] * bool(result.note)
    if report is not None:
        report += lines
    elif stats and (
        matrices := [leaf for leaves in reasons.values() for leaf in leaves if leaf.base.dim() > 1]
    ):
        warnings.warn(
            f"method {method.info.name!r} averaged matrices without factors: {_some(matrices)}. Pass "
            "report=[] to be told in a list instead.",
            stacklevel=4,
        )
    return rest, average


def checked_sources(stats: Sequence[Any] | None, leaves: Sequence[Leaf]) -> list[Mapping[str, Curvature]]:
    """Statistics, opened where paths were given, once names and shapes are those of the leaves.

    Raises:
        StatisticsError: statistics of other models: of no tensor here, or of another shape.
        ArgumentError: something else.
    """
    sources = [statistics_of(source, f"stats[{k}]") for k, source in enumerate(stats or ())]
    _check_names(sources, leaves)
    for source in sources:
        for leaf in leaves:
            if leaf.name not in source:
                continue
            shape = _shape_of(source, leaf.name)
            if shape != tuple(leaf.base.shape):
                raise StatisticsError(
                    f"parameter {leaf.name!r} has shape {list(leaf.base.shape)}, its statistics have "
                    f"{list(shape)}; expected equal ones. These are the statistics of another model."
                )
    return sources


def _shape_of(source: Mapping[str, Curvature], name: str) -> tuple[int, ...]:
    return source.shape(name) if isinstance(source, Statistics) else source[name].shape


def kind_of(source: Mapping[str, Curvature], leaf: Leaf) -> str | None:
    if leaf.name not in source:
        return None
    if isinstance(source, Statistics):
        return source.kinds[leaf.name]
    return KFAC if source[leaf.name].block is None else BLOCK


def _curvature(source: Mapping[str, Curvature], leaf: Leaf) -> Curvature:
    wide = torch.float64 if leaf.float64 else torch.float32
    found = source.read(leaf.name, wide) if isinstance(source, Statistics) else source[leaf.name]
    return found.to(leaf.base.device)


def _check_names(sources: Sequence[Mapping[str, Curvature]], leaves: Sequence[Leaf]) -> None:
    names = {name for leaf in leaves for name in (leaf.name, *leaf.aliases)}
    for k, source in enumerate(sources):
        unknown = [name for name in source if name not in names]
        if unknown:
            raise StatisticsError(
                f"stats[{k}] has parameter {unknown[0]!r}, which the models have not ({len(unknown)} of "
                f"{len(source)}); expected statistics of models[{k}]."
            )


def _batches(pairs: Sequence[tuple[Leaf, Tensor]]) -> Iterator[list[tuple[Leaf, Tensor]]]:
    """Small tensors of one shape together, large ones alone."""
    waiting: dict[tuple[int, ...], list[tuple[Leaf, Tensor]]] = defaultdict(list)
    for pair in pairs:
        shape = tuple(pair[0].base.shape)
        if pair[0].base.numel() > _SMALL:
            yield [pair]
            continue
        waiting[shape].append(pair)
        if len(waiting[shape]) == _JOBS:
            yield waiting.pop(shape)
    yield from waiting.values()


def _some(leaves: Sequence[Leaf]) -> str:
    listed = ", ".join(leaf.name for leaf in leaves[:_SHOWN])
    more = f" and {len(leaves) - _SHOWN} more" if len(leaves) > _SHOWN else ""
    return f"{len(leaves)} tensor{'s' * (len(leaves) != 1)} ({listed}{more})"
