"""`score` and `kron` as custom operators; see `tvfast.ops.library`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from tvfast.errors import ArgumentError
from tvfast.ops import products, scores

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
