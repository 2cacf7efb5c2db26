"""Sums of state dicts as FusionBench computes them, in one pass over all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tvfast.integrations._fusion_bench_leaves import leaves
from tvfast.integrations._patching import Function, NotServed
from tvfast.integrations._tables import Merge, entry, number, scalars
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.program import Divisor, Program

StateDicts = Sequence[Mapping[str, Tensor]]


def _sums(
    state_dicts: StateDicts,
    weights: Sequence[float],
    divisor: Divisor,
    rest: Callable[[list[dict[str, Tensor]]], Mapping[str, Tensor]],
) -> OrderedDict[str, Tensor]:
    """Weighted sums from +0 of every floating-point tensor; `rest` sums state dicts of all others."""
    if not isinstance(state_dicts, list | tuple) or len(state_dicts) < 1:
        raise NotServed("no list of state dicts")
    first = state_dicts[0]
    if any(not isinstance(one, dict) or one.keys() != first.keys() for one in state_dicts):
        raise NotServed("different names")
    names = [name for name in first if all(one[name].is_floating_point() for one in state_dicts)]
    others = [name for name in first if name not in set(names)]
    if not names:
        raise NotServed("tensors of integers")
    chosen = [{name: one[name] for name in names} for one in state_dicts]
    found = leaves(chosen[0], chosen)
    outs = {leaf.name: on_huge_pages(torch.empty_like(leaf.base)) for leaf in found}
    merge = Merge(
        [entry(leaf.models, outs[leaf.name], name=leaf.name) for leaf in found],
        [scalars(weights) for _ in found],
    )
    merge.combine(Program(divisor=divisor))
    for out in outs.values():
        out.add_(0.0)  # a sum that begins at +0
    if others:
        outs |= rest([{name: one[name] for name in others} for one in state_dicts])
    return OrderedDict((name, outs[name]) for name in first)


def _sum(original: Function) -> Function:
    def state_dict_sum(state_dicts: StateDicts) -> OrderedDict[str, Tensor]:
        return _sums(state_dicts, _ones(state_dicts), Divisor.NONE, original)

    return state_dict_sum


def _avg(original: Function) -> Function:
    def state_dict_avg(state_dicts: StateDicts) -> OrderedDict[str, Tensor]:
        return _sums(state_dicts, _ones(state_dicts), Divisor.COUNT, original)

    return state_dict_avg


def _weighted_sum(original: Function) -> Function:
    def state_dict_weighted_sum(
        state_dicts: StateDicts, weights: Sequence[float], device: Any = None
    ) -> OrderedDict[str, Tensor]:
        own = _weights(state_dicts, weights)
        if device is not None:
            raise NotServed("a result on another device")
        if 0.0 in own:
            raise NotServed("a weight of 0, whose state dict is not read")
        return _sums(state_dicts, own, Divisor.NONE, lambda rest: original(rest, weights))

    return state_dict_weighted_sum


def _interpolation(original: Function) -> Function:
    def state_dict_interpolation(
        state_dicts: StateDicts, scalars: Sequence[float]
    ) -> OrderedDict[str, Tensor]:
        own = _weights(state_dicts, scalars)
        return _sums(state_dicts, own, Divisor.NONE, lambda rest: original(rest, scalars))

    return state_dict_interpolation


def _ones(state_dicts: StateDicts) -> list[float]:
    return [1.0] * len(state_dicts)


def _weights(state_dicts: StateDicts, weights: Sequence[float]) -> list[float]:
    if not isinstance(weights, list | tuple):
        raise NotServed("weights that are no list")
    own = [number(weight, "a weight") for weight in weights]
    if len(own) != len(state_dicts):
        raise NotServed("another number of weights")
    return own


MAKERS: dict[str, Callable[[Function], Function]] = {
    "state_dict_sum": _sum,
    "state_dict_avg": _avg,
    "state_dict_weighted_sum": _weighted_sum,
    "state_dict_interpolation": _interpolation,
}
"""Our functions from the peer's own, by name."""
