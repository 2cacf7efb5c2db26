"""Methods outside the stage algebra: whole tensors, gathered one at a time where that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from tvfast._leaves import Leaf
from tvfast.errors import LayoutError
from tvfast.factors.records import Statistics as Curvatures
from tvfast.factors.records import statistics_of
from tvfast.merging_tensors import check_statistics, checked_sources, kind_of, merge_tensors
from tvfast.methods import Method, ProgramMethod, TensorMethod
from tvfast.program import DType, View
from tvfast.sharded.agreement import Description, file_in_words
from tvfast.sharded.layouts import described, is_whole, term_of
from tvfast.sharded.leaves import ShardedLeaf
from tvfast.sharded.shards import local_slice


@dataclass(frozen=True, slots=True)
class Statistics:
    """What such a method reads beside weights, and where it reports."""

    stats: Sequence[Any] | None
    report: list[str] | None

    @staticmethod
    def of(
        said: Description,
        method: Method,
        leaves: Sequence[ShardedLeaf],
        stats: Iterable[Any] | None,
        report: list[str] | None,
    ) -> Statistics:
        """
        Args:
            said: gets what must be equal on all ranks.

        Raises:
            ArgumentError: statistics of a wrong number, or of a method that reads none.
            StatisticsError: of another model, or damaged.
        """
        if not isinstance(method, TensorMethod):
            return Statistics(None, report)
        given = check_statistics(method, stats, len(leaves[0].models) if leaves else None)
        whole = [_leaf(one) for one in leaves]
        for k, source in enumerate(checked_sources(given, whole)):
            file = source.file if isinstance(source, Curvatures) else None
            if file is not None:
                said.add(f"stats[{k}]", file_in_words(file))
                continue
            for leaf in whole:
                if (kind := kind_of(source, leaf)) is not None:
                    said.add(f"stats[{k}] of {leaf.name!r}", kind)
        return Statistics(given, report)


def check_whole(method: TensorMethod, leaves: Sequence[ShardedLeaf], statistics: Statistics) -> None:
    """Raise unless every tensor that the method has a rule for is whole on every rank.

    Raises:
        LayoutError: naming the first that is not.
    """
    sources = [statistics_of(source, f"stats[{k}]") for k, source in enumerate(statistics.stats or ())]
    for one in leaves:
        leaf = _leaf(one)
        kinds = [kind_of(source, leaf) for source in sources] or [None] * len(one.models)
        apart = not all(is_whole(tensor) for tensor in (one.base, *one.models))
        if apart and method.fallback(tuple(one.base.shape), kinds, len(one.models)) is None:
            raise LayoutError(
                f"tensor {one.name!r}: method {method.info.name!r} needs whole tensors, and this one has "
                f"placements {described(one.base)}; expected replicas. Pass redistribute=True to gather such "
                "tensors on every rank, one at a time."
            )


def merge_whole(
    method: TensorMethod,
    leaves: Sequence[ShardedLeaf],
    targets: Mapping[str, Tensor],
    statistics: Statistics,
) -> tuple[list[ShardedLeaf], ProgramMethod | None]:
    """Merge on every rank what the method has a rule for; the rest, and the method that averages them."""
    by_name = {one.name: one for one in leaves}

    def put(leaf: Leaf, out: Tensor, merged: Tensor) -> None:
        base = by_name[leaf.name].base
        if isinstance(base, DTensor):
            merged = term_of(local_slice(merged, base.device_mesh, base.placements), base)
        out.copy_(merged)

    pairs = [(_leaf(one), targets[one.name]) for one in leaves]
    rest, average = merge_tensors(method, pairs, statistics.stats, statistics.report, _gathered, put)
    return [by_name[leaf.name] for leaf, _ in rest], average


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _leaf(one: ShardedLeaf) -> Leaf:
    """The tensors as they are, without views of memory."""
    nowhere = View(0, one.base.numel(), DType.F32)
    return Leaf(one.name, one.base, one.models, nowhere, (nowhere,) * len(one.models), one.aliases)
