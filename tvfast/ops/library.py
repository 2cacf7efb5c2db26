"""The primitives as custom operators `torch.ops.tvfast.*`, for `torch.compile`, FakeTensor and export.

A facade: each operator calls the public function of its name, which picks a backend. The functions of this
module have the signatures of those of `tvfast.ops`, which send traced calls here; nobody else needs them.
An empty list stands for tensors that are absent: schemas know no optional list.
Operators whose name ends in `_out` write `out` and say so in their schema. None is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from tvfast.errors import ArgumentError
from tvfast.ops import _check as check
from tvfast.ops import primitives
from tvfast.ops._library_products import kron, score
from tvfast.ops._packing import pack_program, pack_scalars, unpack_program, unpack_scalars
from tvfast.ops.raw import Wants
from tvfast.program import Moments, Program, TensorScalars

__all__ = ["combine", "elect", "kron", "measure", "score", "threshold", "topk_mask"]

# -- threshold ------------------------------------------------------------------------------------------


@custom_op("tvfast::threshold", mutates_args=())
def _threshold(tensors: list[Tensor], density: float, bases: list[Tensor], n_threads: int) -> Tensor:
    return primitives.threshold(tensors, density, base=bases or None, n_threads=n_threads)


@_threshold.register_fake
def _(tensors: list[Tensor], density: float, bases: list[Tensor], n_threads: int) -> Tensor:
    return tensors[0].new_empty([len(tensors)], dtype=torch.float32)


@custom_op("tvfast::threshold_out", mutates_args=("out",))
def _threshold_out(
    tensors: list[Tensor], density: float, bases: list[Tensor], n_threads: int, out: Tensor
) -> None:
    primitives.threshold(tensors, density, base=bases or None, out=out, n_threads=n_threads)


def threshold(
    tensor: Tensor | Sequence[Tensor],
    density: float,
    *,
    base: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """`tvfast.ops.threshold`, traced."""
    single = isinstance(tensor, Tensor)
    tensors = [tensor] if isinstance(tensor, Tensor) else list(tensor)
    bases = [] if base is None else [base] if isinstance(base, Tensor) else list(base)
    with torch.no_grad():
        if out is not None:
            _threshold_out(tensors, density, bases, n_threads, out.view(1) if single else out)
            return out
        found: Tensor = _threshold(tensors, density, bases, n_threads)
        return found.view([]) if single else found


# -- topk_mask ------------------------------------------------------------------------------------------


@custom_op("tvfast::topk_mask", mutates_args=())
def _topk_mask(
    tensor: Tensor, density: float, base: Tensor | None, tie: str, seed: int, name: str, n_threads: int
) -> Tensor:
    return primitives.topk_mask(
        tensor, density, base=base, tie=tie, seed=seed, name=name, n_threads=n_threads
    )


@_topk_mask.register_fake
def _(
    tensor: Tensor, density: float, base: Tensor | None, tie: str, seed: int, name: str, n_threads: int
) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=torch.bool)


@custom_op("tvfast::topk_mask_out", mutates_args=("out",))
def _topk_mask_out(
    tensor: Tensor,
    density: float,
    base: Tensor | None,
    tie: str,
    seed: int,
    name: str,
    n_threads: int,
    out: Tensor,
) -> None:
    primitives.topk_mask(
        tensor, density, base=base, tie=tie, seed=seed, name=name, out=out, n_threads=n_threads
    )


def topk_mask(
    tensor: Tensor,
    density: float,
    *,
    base: Tensor | None = None,
    tie: str = "hash",
    seed: int = 0,
    name: str = "tensor",
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """`tvfast.ops.topk_mask`, traced."""
    with torch.no_grad():
        if out is None:
            mask: Tensor = _topk_mask(tensor, density, base, tie, seed, name, n_threads)
            return mask
        _topk_mask_out(tensor, density, base, tie, seed, name, n_threads, out)
        return out


# -- elect ----------------------------------------------------------------------------------------------


@custom_op("tvfast::elect", mutates_args=())
def _elect(deltas: list[Tensor], weights: list[float], vote: str, zero_sign: str, n_threads: int) -> Tensor:
    return primitives.elect(deltas, weights=weights, vote=vote, zero_sign=zero_sign, n_threads=n_threads)


@_elect.register_fake
def _(deltas: list[Tensor], weights: list[float], vote: str, zero_sign: str, n_threads: int) -> Tensor:
    return deltas[0].new_empty(deltas[0].shape, dtype=torch.int8)


@custom_op("tvfast::elect_out", mutates_args=("out",))
def _elect_out(
    deltas: list[Tensor], weights: list[float], vote: str, zero_sign: str, n_threads: int, out: Tensor
) -> None:
    primitives.elect(deltas, weights=weights, vote=vote, zero_sign=zero_sign, out=out, n_threads=n_threads)


def elect(
    deltas: Tensor | Sequence[Tensor],
    *,
    weights: float | Sequence[float] | None = None,
    vote: str = "mass",
    zero_sign: str = "plus",
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """`tvfast.ops.elect`, traced."""
    models = check.models_of("deltas", deltas)
    own = check.weights_of(weights, len(models))
    with torch.no_grad():
        if out is None:
            signs: Tensor = _elect(models, own, vote, zero_sign, n_threads)
            return signs
        _elect_out(models, own, vote, zero_sign, n_threads, out)
        return out


# -- combine and measure --------------------------------------------------------------------------------


@custom_op("tvfast::combine", mutates_args=())
def _combine(
    base: Tensor | None,
    models: list[Tensor],
    program: list[int],
    reals: list[float],
    wholes: list[int],
    scores: list[Tensor],
    masks: list[Tensor],
    offset: int,
    row: int | None,
    name: str,
    task_vectors: bool,
    n_threads: int,
) -> Tensor:
    return primitives.combine(
        base,
        models,
        unpack_program(program),
        unpack_scalars(reals, wholes),
        scores=scores or None,
        masks=masks or None,
        offset=offset,
        row=row,
        name=name,
        task_vectors=task_vectors,
        n_threads=n_threads,
    )


@_combine.register_fake
def _(base: Tensor | None, models: list[Tensor], *rest: Any) -> Tensor:
    like = models[0] if base is None else base
    return like.new_empty(like.shape)


@custom_op("tvfast::combine_out", mutates_args=("out",))
def _combine_out(
    base: Tensor | None,
    models: list[Tensor],
    program: list[int],
    reals: list[float],
    wholes: list[int],
    scores: list[Tensor],
    masks: list[Tensor],
    offset: int,
    row: int | None,
    name: str,
    task_vectors: bool,
    n_threads: int,
    out: Tensor,
) -> None:
    primitives.combine(
        base,
        models,
        unpack_program(program),
        unpack_scalars(reals, wholes),
        scores=scores or None,
        masks=masks or None,
        offset=offset,
        row=row,
        name=name,
        task_vectors=task_vectors,
        out=out,
        n_threads=n_threads,
    )


def combine(
    base: Tensor | None,
    models: Tensor | Sequence[Tensor],
    program: Program | None = None,
    scalars: TensorScalars | None = None,
    *,
    scores: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    offset: int = 0,
    row: int | None = None,
    name: str = "",
    task_vectors: bool = False,
    out: Tensor | None = None,
    n_threads: int = 0,
) -> Tensor:
    """`tvfast.ops.combine`, traced."""
    found = check.models_of("models", models)
    reals, wholes = pack_scalars(check.scalars_of(scalars, len(found)))
    arguments = (
        base,
        found,
        pack_program(Program() if program is None else program),
        reals,
        wholes,
        [] if scores is None else list(scores),
        [] if masks is None else list(masks),
        offset,
        row,
        name,
        task_vectors,
        n_threads,
    )
    with torch.no_grad():
        if out is None:
            merged: Tensor = _combine(*arguments)
            return merged
        _combine_out(*arguments, out)
        return out


@custom_op("tvfast::measure", mutates_args=())
def _measure(
    base: Tensor | None,
    models: list[Tensor],
    wants: int,
    program: list[int],
    reals: list[float],
    wholes: list[int],
    scores: list[Tensor],
    masks: list[Tensor],
    offset: int,
    row: int | None,
    name: str,
    task_vectors: bool,
    n_threads: int,
) -> tuple[Tensor, Tensor]:
    moments = primitives.measure(
        base,
        models,
        Wants(wants),
        unpack_program(program),
        unpack_scalars(reals, wholes),
        scores=scores or None,
        masks=masks or None,
        offset=offset,
        row=row,
        name=name,
        task_vectors=task_vectors,
        n_threads=n_threads,
    )
    n = len(models)
    gram = [number for line in moments.gram for number in line]
    sums = [*moments.l1_before, *moments.l1, *gram, *(moments.dots or [0.0] * n)]
    counts = [*moments.n_kept, *moments.n_nonzero, *moments.n_nonfinite]
    counts += [moments.n_base_nonfinite, moments.elected, moments.n_conflict, *moments.n_alone]
    device = models[0].device
    return (
        torch.tensor(sums, dtype=torch.float64, device=device),
        torch.tensor(counts, dtype=torch.int64, device=device),
    )


@_measure.register_fake
def _(base: Tensor | None, models: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    n = len(models)
    sums = models[0].new_empty([3 * n + n * n], dtype=torch.float64)
    return sums, models[0].new_empty([4 * n + 3], dtype=torch.int64)


def measure(
    base: Tensor | None,
    models: Tensor | Sequence[Tensor],
    wants: Wants = primitives.EVERYTHING,
    program: Program | None = None,
    scalars: TensorScalars | None = None,
    *,
    scores: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    offset: int = 0,
    row: int | None = None,
    name: str = "",
    task_vectors: bool = False,
    out: Moments | None = None,
    n_threads: int = 0,
) -> Any:
    """`tvfast.ops.measure`, traced: the fields of `Moments` are tensors [], float64 or int64, on the device.

    Raises:
        ArgumentError: `out` is given; there are no numbers to put there yet.
    """
    if out is not None:
        raise ArgumentError("out is given in a traced call of measure; expected None.")
    found = check.models_of("models", models)
    reals, wholes = pack_scalars(check.scalars_of(scalars, len(found)))
    with torch.no_grad():
        sums, counts = _measure(
            base,
            found,
            int(wants),
            pack_program(Program() if program is None else program),
            reals,
            wholes,
            [] if scores is None else list(scores),
            [] if masks is None else list(masks),
            offset,
            row,
            name,
            task_vectors,
            n_threads,
        )
    return _traced_moments(list(sums.unbind()), list(counts.unbind()), len(found))


def _traced_moments(sums: list[Any], counts: list[Any], n: int) -> Moments:
    gram = sums[2 * n : 2 * n + n * n]
    return Moments(
        l1_before=sums[:n],
        l1=sums[n : 2 * n],
        gram=[gram[k * n : (k + 1) * n] for k in range(n)],
        n_kept=counts[:n],
        n_nonzero=counts[n : 2 * n],
        n_nonfinite=counts[2 * n : 3 * n],
        n_base_nonfinite=counts[3 * n],
        elected=counts[3 * n + 1],
        n_conflict=counts[3 * n + 2],
        dots=sums[2 * n + n * n :],
        n_alone=counts[3 * n + 3 :],
    )
