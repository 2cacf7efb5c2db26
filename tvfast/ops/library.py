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
from tvfast.ops import primitives, products, scores
from tvfast.ops._packing import pack_program, pack_scalars, unpack_program, unpack_scalars
from tvfast.ops.raw import Wants
from tvfast.program import Moments, Program, TensorScalars

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
    counts += [moments.n_base_nonfinite, moments.elected, moments.n_conflict]
    device = models[0].device
    return (
        torch.tensor(sums, dtype=torch.float64, device=device),
        torch.tensor(counts, dtype=torch.int64, device=device),
    )


@_measure.register_fake
def _(base: Tensor | None, models: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    n = len(models)
    sums = models[0].new_empty([3 * n + n * n], dtype=torch.float64)
    return sums, models[0].new_empty([3 * n + 3], dtype=torch.int64)


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
    )


# -- score ----------------------------------------------------------------------------------------------


def _given(tensors: list[Tensor], single: bool) -> Any:
    """What the caller gave: one tensor, or a sequence; None for an empty list."""
    return (tensors[0] if single else tensors) if tensors else None


def _listed(given: Tensor | Sequence[Tensor] | None) -> tuple[list[Tensor], bool]:
    """A list, and whether it stands for one tensor."""
    if given is None:
        return [], False
    return ([given], True) if isinstance(given, Tensor) else (list(given), False)


@custom_op("tvfast::score", mutates_args=())
def _score(
    gradient: list[Tensor],
    weight: Tensor | None,
    kind: str,
    base: Tensor | None,
    activations: list[Tensor],
    bias_column: bool,
    tokens: list[Tensor],
    single: bool,
    scale: list[float],
    one_scale: bool,
    n_threads: int,
) -> Tensor:
    return scores.score(
        _given(gradient, single),
        weight,
        kind=kind,
        base=base,
        activations=_given(activations, single),
        bias_column=bias_column,
        tokens=_given(tokens, single),
        scale=scale[0] if one_scale else scale,
        n_threads=n_threads,
    )


@_score.register_fake
def _(
    gradient: list[Tensor],
    weight: Tensor | None,
    kind: str,
    base: Tensor | None,
    activations: list[Tensor],
    bias_column: bool,
    *rest: Any,
) -> Tensor:
    shape = list(gradient[0].shape)
    if weight is not None and kind != "square":
        shape = list(weight.shape)
    elif activations:
        shape = [gradient[0].shape[-1], activations[0].shape[-1] + bias_column]
    return gradient[0].new_empty(shape, dtype=torch.float32)


@custom_op("tvfast::score_out", mutates_args=("out",))
def _score_out(
    gradient: list[Tensor],
    weight: Tensor | None,
    kind: str,
    base: Tensor | None,
    activations: list[Tensor],
    bias_column: bool,
    tokens: list[Tensor],
    single: bool,
    scale: list[float],
    one_scale: bool,
    n_threads: int,
    out: Tensor,
) -> None:
    scores.score(
        _given(gradient, single),
        weight,
        kind=kind,
        base=base,
        out=out,
        activations=_given(activations, single),
        bias_column=bias_column,
        tokens=_given(tokens, single),
        scale=scale[0] if one_scale else scale,
        n_threads=n_threads,
    )


def score(
    gradient: Tensor | Sequence[Tensor],
    weight: Tensor | None = None,
    *,
    kind: str = "product",
    base: Tensor | None = None,
    out: Tensor | None = None,
    activations: Tensor | Sequence[Tensor] | None = None,
    bias_column: bool = False,
    tokens: Tensor | Sequence[Tensor] | None = None,
    scale: float | Sequence[float] = 1.0,
    n_threads: int = 0,
) -> Tensor:
    """`tvfast.ops.score`, traced; gradients, activations and tokens are all stacked or all sequences."""
    gradients, single = _listed(gradient)
    one_scale = not isinstance(scale, Sequence)
    arguments = (
        gradients,
        weight,
        kind,
        base,
        _listed(activations)[0],
        bias_column,
        _listed(tokens)[0],
        single,
        [float(one) for one in (scale if isinstance(scale, Sequence) else [scale])],
        one_scale,
        n_threads,
    )
    with torch.no_grad():
        if out is None:
            found: Tensor = _score(*arguments)
            return found
        _score_out(*arguments, out)
        return out


# -- kron -----------------------------------------------------------------------------------------------


def _computed_in(operands: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(one.dtype == torch.float64 for one in operands) else torch.float32


@custom_op("tvfast::kron", mutates_args=())
def _kron(
    x: Tensor,
    a: list[Tensor],
    a_single: bool,
    b: list[Tensor],
    b_single: bool,
    block: int | None,
    scale: float,
    packed: bool,
    square_root: bool,
    n_threads: int,
) -> tuple[Tensor, Tensor]:
    return products.kron(
        x,
        _given(a, a_single),
        _given(b, b_single),
        block=block,
        scale=scale,
        packed=packed,
        square_root=square_root,
        n_threads=n_threads,
    )


@_kron.register_fake
def _(
    x: Tensor, a: list[Tensor], a_single: bool, b: list[Tensor], b_single: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = _computed_in([x, *a, *b])
    return x.new_empty(x.shape, dtype=dtype), x.new_empty([], dtype=dtype)


@custom_op("tvfast::kron_out", mutates_args=("out",))
def _kron_out(
    x: Tensor,
    a: list[Tensor],
    a_single: bool,
    b: list[Tensor],
    b_single: bool,
    block: int | None,
    scale: float,
    packed: bool,
    square_root: bool,
    n_threads: int,
    accumulate: bool,
    out: Tensor,
) -> Tensor:
    return products.kron(
        x,
        _given(a, a_single),
        _given(b, b_single),
        block=block,
        out=out,
        scale=scale,
        accumulate=accumulate,
        packed=packed,
        square_root=square_root,
        n_threads=n_threads,
    )[1]


@_kron_out.register_fake
def _(x: Tensor, a: list[Tensor], a_single: bool, b: list[Tensor], b_single: bool, *rest: Any) -> Tensor:
    return x.new_empty([], dtype=_computed_in([x, *a, *b]))


def kron(
    x: Tensor,
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    *,
    block: int | None = None,
    out: Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
    packed: bool = False,
    square_root: bool = False,
    n_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """`tvfast.ops.kron`, traced.

    Raises:
        ArgumentError: `accumulate` without `out`.
    """
    if out is None and accumulate:
        raise ArgumentError("accumulate was given without out; expected the tensor to add to.")
    factors = (*_listed(a), *_listed(b))
    arguments = (x, *factors, block, scale, packed, square_root, n_threads)
    with torch.no_grad():
        if out is None:
            found: tuple[Tensor, Tensor] = _kron(*arguments)
            return found
        return out, _kron_out(*arguments, accumulate, out)
