"""Rows of whole models: one launch for all tensors, a launch for each, and `LiveMerge`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import tvfast
from bench.buffers import N_MODELS, fill
from bench.checkpoints.family import Architecture
from bench.gpu.limits import Cost
from bench.gpu.registry import Goal, GpuRow, Place, Ready, against_limit
from bench.registry import WEIGHTS, UnavailableError
from tvfast.methods import TableStatistics, make_method
from tvfast.ops._views import view
from tvfast.program import Entry, WorkTable

_ALIGNED = 64
_COPIES = N_MODELS + 2  # base, models, output


def _sizes(architecture: Architecture) -> list[int]:
    return [math.prod(shape) for _, shape in architecture.tensors()]


def _pools(n_elements: int, device: torch.device) -> list[Tensor]:
    """Flat base, output and models of so many elements each."""
    pools = [torch.zeros(n_elements, dtype=torch.bfloat16, device=device) for _ in range(_COPIES)]
    fill(pools[0], pools[2:])
    return pools


def _entry(name: str, parts: Sequence[Tensor]) -> Entry:
    base, out, *models = (view(part, name, "tensor") for part in parts)
    return Entry(name=name, models=tuple(models), base=base, out=out)


def _sharing(sizes: Sequence[int], pools: Sequence[Tensor]) -> Iterator[Entry]:
    """Tensors of these sizes one after the other in pools, which begin again where no other fits.

    No pool stays in the cache between two tensors that share memory. Outputs are written more than once.
    """
    room, start = pools[0].numel(), 0
    for number, n in enumerate(sizes):
        if start + n > room:
            start = 0
        yield _entry(f"tensor{number}", [pool[start : start + n] for pool in pools])
        start += -(-n // _ALIGNED) * _ALIGNED


def _cost(n_elements: int) -> Cost:
    return Cost(2 * (N_MODELS + 1) * n_elements, 2 * n_elements)


def _merging(place: Place, tables: Sequence[WorkTable], n_elements: int, written: Tensor | None) -> Ready:
    """Task arithmetic of every table."""
    method, combine = make_method("task_arithmetic", weights=WEIGHTS), place.verb("combine")
    work = [(table, *method.resolve(TableStatistics(place.backend, table, None, 0))) for table in tables]

    def run() -> None:
        for table, program, scalars in work:
            combine(table, program, scalars)

    return Ready(run, _cost(n_elements), written)


def shared(place: Place, *, one_by_one: bool) -> Ready:
    sizes = _sizes(place.shapes.large)
    entries = list(_sharing(sizes, _pools(_room(sizes), place.device)))
    parts = [[entry] for entry in entries] if one_by_one else [entries]
    return _merging(place, [WorkTable(part, N_MODELS) for part in parts], sum(sizes), None)


def _room(sizes: Sequence[int]) -> int:
    return -(-max(sizes) // _ALIGNED) * _ALIGNED


def one_big(place: Place) -> Ready:
    """A tensor as large as the pools."""
    n = _room(_sizes(place.shapes.large))
    pools = _pools(n, place.device)
    return _merging(place, [WorkTable([_entry("tensor", pools)], N_MODELS)], n, pools[1])


def narrow(place: Place, *, one_by_one: bool) -> Ready:
    """Tensors with memory of their own, each allocated for itself."""
    sizes = _sizes(place.shapes.narrow)
    entries = [_entry(f"tensor{number}", _pools(n, place.device)) for number, n in enumerate(sizes)]
    parts = [[entry] for entry in entries] if one_by_one else [entries]
    return _merging(place, [WorkTable(part, N_MODELS) for part in parts], sum(sizes), None)


def live(place: Place) -> Ready:
    """New coefficients for every tensor of a model."""
    live_merge = getattr(tvfast, "LiveMerge", None)
    if live_merge is None:
        raise UnavailableError("this tvfast has no LiveMerge")
    model: dict[str, Tensor] = {}
    deltas: list[dict[str, Tensor]] = [{} for _ in range(N_MODELS)]
    for name, shape in place.shapes.narrow.tensors():
        base, _, *models = _pools(math.prod(shape), place.device)
        model[name] = base
        for delta, other in zip(deltas, models, strict=True):
            delta[name] = other.sub_(base)
    merging = live_merge(model, deltas=deltas)
    n_elements = sum(tensor.numel() for tensor in model.values())
    return Ready(lambda: merging.set(WEIGHTS), _cost(n_elements))


def torch_foreach(place: Place) -> Ready:
    """θ₀ + Σ w_k τ_k over lists of tensors by torch._foreach_add, in the storage type."""
    sizes = _sizes(place.shapes.narrow)
    lists = list(zip(*(_pools(n, place.device) for n in sizes), strict=True))
    bases, outs, *deltas = (list(tensors) for tensors in lists)

    def run() -> None:
        torch._foreach_copy_(outs, bases)
        for delta, weight in zip(deltas, WEIGHTS, strict=True):
            torch._foreach_add_(outs, delta, alpha=weight)

    return Ready(run)


ONE_BIG = "one big tensor"
SHARED_ONE_BY_ONE = "Llama 70B shapes, a launch each"
NARROW_ONE_BY_ONE = "Llama 70B an eighth as wide, a launch each"
FOREACH = "torch._foreach task arithmetic, an eighth as wide"

TABLE_ROWS = (
    GpuRow(FOREACH, torch_foreach, baseline=True),
    GpuRow(ONE_BIG, one_big, (against_limit(),)),
    GpuRow(SHARED_ONE_BY_ONE, lambda place: shared(place, one_by_one=True), (against_limit(),)),
    GpuRow(
        "Llama 70B shapes, one launch",
        lambda place: shared(place, one_by_one=False),
        (against_limit(), Goal(ONE_BIG, 0.85, by_rate=True), Goal(SHARED_ONE_BY_ONE)),
    ),
    GpuRow(NARROW_ONE_BY_ONE, lambda place: narrow(place, one_by_one=True), (against_limit(),)),
    GpuRow(
        "Llama 70B an eighth as wide, one launch",
        lambda place: narrow(place, one_by_one=False),
        (
            against_limit(),
            Goal(ONE_BIG, 0.85, by_rate=True),
            Goal(NARROW_ONE_BY_ONE),
            Goal(FOREACH),
        ),
    ),
)

LIVE_ROWS = (
    GpuRow(FOREACH, torch_foreach, baseline=True),
    GpuRow("LiveMerge.set", live, (against_limit(), Goal(FOREACH))),
)
