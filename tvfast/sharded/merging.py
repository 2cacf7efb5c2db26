"""`merge_`, `merge` and `compare` of weights with DTensors: every rank merges its own shards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tvfast._leaves import Weights, named_tensors
from tvfast._scores import LeafScores
from tvfast.errors import ArgumentError
from tvfast.methods import Method, ProgramMethod, TableStatistics, TensorMethod
from tvfast.methods.base import own_values
from tvfast.ops._check import threads
from tvfast.ops._views import check_overlap, span
from tvfast.sharded.agreement import agreement_of
from tvfast.sharded.communicator import Communicator
from tvfast.sharded.exchange import batches, exchange
from tvfast.sharded.layouts import as_dtensor, local_of, splits_rows
from tvfast.sharded.leaves import ShardedLeaf, sharded_leaves
from tvfast.sharded.scores import shard_scores
from tvfast.sharded.tables import Row, sharded_tables
from tvfast.sharded.whole import Statistics, check_whole, merge_whole

W = TypeVar("W", bound=Weights)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of `merge_` or `merge`, before anything of it is checked.

    Attributes:
        choose: makes the method.
    """

    choose: Callable[[], Method]
    instruct: Weights | None
    stats: Iterable[Any] | None
    scores: Iterable[Any] | None
    report: list[str] | None
    n_threads: int
    redistribute: bool


@dataclass(slots=True)
class _Merge:
    """A call whose arguments fit together, on every rank."""

    team: Communicator
    method: Method
    leaves: list[ShardedLeaf]
    scores: list[LeafScores]
    statistics: Statistics
    n_threads: int

    def run(self, targets: Mapping[str, Tensor]) -> None:
        """Merge into this rank's shards of the results, by name."""
        with self.team.telling(), torch.no_grad():
            if isinstance(self.method, TensorMethod):
                rest, average = merge_whole(self.method, self.leaves, targets, self.statistics)
                if average is not None:
                    self._run_program(average, rest, [LeafScores()] * len(rest), targets)
                return
            assert isinstance(self.method, ProgramMethod)
            self._run_program(self.method, self.leaves, self.scores, targets)

    def _run_program(
        self,
        method: ProgramMethod,
        leaves: Sequence[ShardedLeaf],
        scores: Sequence[LeafScores],
        targets: Mapping[str, Tensor],
    ) -> None:
        ranks_rows = method.program().ranks_rows
        resident: list[Row] = []
        moving: list[ShardedLeaf] = []
        for one, own in zip(leaves, scores, strict=True):
            if one.leaf is None or one.part is None or (ranks_rows and splits_rows(one.base)):
                moving.append(one)
            else:
                resident.append(Row(one.leaf, one.part, targets[one.name], own))
        of_moving = {one.name: own for one, own in zip(leaves, scores, strict=True)}
        if any(method.group_of(one.name) is not None for one in moving):
            # What is ranked together has to be there together.
            held = [exchange(one, targets[one.name], self.team, ranks_rows=ranks_rows) for one in moving]
            self._combine(method, resident + [exchanged.row for exchanged in held])
            for exchanged in held:
                exchanged.give_back()
            return
        self._combine(method, resident)
        for batch in batches(moving, self.team):
            held = [
                exchange(moving[at], targets[moving[at].name], self.team, ranks_rows=ranks_rows)
                for at in batch
            ]
            self._combine(
                method,
                [replace(exchanged.row, scores=of_moving[exchanged.row.leaf.name]) for exchanged in held],
            )
            for exchanged in held:
                exchanged.give_back()

    def _combine(self, method: ProgramMethod, rows: Sequence[Row]) -> None:
        from tvfast.merging import set_aside

        by_method: dict[ProgramMethod, list[Row]] = {}
        for row in rows:
            chosen, leaf = set_aside(method, row.leaf)
            by_method.setdefault(chosen, []).append(replace(row, leaf=leaf))
        for chosen, own in by_method.items():
            for table, backend in list(sharded_tables(chosen, own, self.team)):
                program, scalars = chosen.resolve(TableStatistics(backend, table, None, self.n_threads))
                backend.combine(table, program, scalars, self.n_threads)


def merge_(base: W, models: Iterable[Weights], call: Call) -> W:
    """`tvfast.merge_` where some tensor is a DTensor."""
    merge = _agreed(base, models, call, writes=True)
    targets = {one.name: local_of(one.base) for one in merge.leaves}
    targets.update({one.name: one.leaf.base for one in merge.leaves if one.leaf is not None})
    merge.run(targets)
    for one in merge.leaves:
        for tensor in (one.base, targets[one.name]):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
    return base


def merge(
    base: W, models: Iterable[Weights], call: Call, rebuild: Callable[[Any, Mapping[str, Tensor]], Any]
) -> W:
    """`tvfast.merge` where some tensor is a DTensor.

    Args:
        rebuild: makes what the base is of merged tensors by name.
    """
    merge = _agreed(base, models, call, writes=False)
    if isinstance(base, nn.Module):
        with merge.team.telling():
            merged = copy.deepcopy(base)
        tensors = named_tensors(merged, "base")
        merge.run({one.name: local_of(tensors[one.name].detach()) for one in merge.leaves})
        return merged
    with merge.team.telling():
        targets = {
            one.name: torch.empty_like(local_of(one.base), requires_grad=False) for one in merge.leaves
        }
    merge.run(targets)
    by_name = {}
    for one in merge.leaves:
        out = targets[one.name]
        if isinstance(one.base, DTensor):
            out = as_dtensor(out, one.base, tuple(one.base.placements))
        by_name.update(dict.fromkeys((one.name, *one.aliases), out))
    found: W = rebuild(base, by_name)
    return found


def _agreed(base: Weights, models: Iterable[Weights], call: Call, *, writes: bool) -> _Merge:
    """Every check of a call, and that all ranks make the same one."""
    from tvfast.merging import operand_list, roles_of

    with agreement_of(base, models, call.instruct) as said:
        threads(call.n_threads)
        method = call.choose()
        found = operand_list(models, call.instruct, method)
        said.add("the method", _in_words(method, len(found), call.redistribute, writes))
        leaves = sharded_leaves(
            base, found, said, redistribute=call.redistribute, roles=roles_of(method, len(found))
        )
        if writes:
            _check_memory(leaves)
        else:
            _check_copyable(base)
        scores = None
        if isinstance(method, ProgramMethod):
            _check_ranked(method, leaves)
            scores = shard_scores(said, method, leaves, call.stats, call.scores, call.n_threads)
        elif call.scores is not None:
            raise ArgumentError(f"method {method.info.name!r} reads no scores; expected stats.")
        statistics = Statistics.of(said, method, leaves, call.stats, call.report)
        if isinstance(method, TensorMethod) and not call.redistribute:
            check_whole(method, leaves, statistics)
    with said.team.telling(), torch.no_grad():
        completed = (
            [LeafScores()] * len(leaves) if scores is None else scores.completed(said.team, call.n_threads)
        )
    return _Merge(said.team, method, leaves, completed, statistics, call.n_threads)


def _in_words(method: Method, n_models: int, redistribute: bool, writes: bool) -> str:
    """Everything of a call that its result depends on, except tensors."""
    verb = "merge_" if writes else "merge"
    return (
        f"{verb} {method.info.name} of {n_models} models, {own_values(method)}, redistribute={redistribute}"
    )


def _check_ranked(method: ProgramMethod, leaves: Sequence[ShardedLeaf]) -> None:
    """Raise if the method has a rule for none of the tensors."""
    if leaves and all(method.aside(one.name, len(one.models)) is not None for one in leaves):
        raise ArgumentError(method.nothing_ranked())


def _check_copyable(base: Weights) -> None:
    """Raise if a module cannot be copied.

    Raises:
        ArgumentError: a module of FSDP2.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(base, nn.Module) and any(isinstance(module, FSDPModule) for module in base.modules()):
        raise ArgumentError(
            "base is a module with fully_shard, which cannot be copied; expected a state dict for a new one. "
            "Pass base.state_dict(), or merge in place with merge_."
        )


def _check_memory(leaves: Sequence[ShardedLeaf]) -> None:
    """Raise if a shard that is written overlaps another or a model's."""
    outs = [span(local_of(one.base), one.name, "base", row) for row, one in enumerate(leaves)]
    read = [
        span(local_of(model), one.name, f"models[{k}]", row)
        for row, one in enumerate(leaves)
        for k, model in enumerate(one.models)
    ]
    check_overlap(outs, read)
