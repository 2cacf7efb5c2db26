"""Importance from gradients: of any tensor, of linear layers in factored form, of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from tvfast.factored import FactoredSample, FactoredScore
from tvfast.ops import _check as check
from tvfast.ops._tracing import traceable
from tvfast.ops._views import DTYPES, check_plain, check_same, view
from tvfast.ops.raw import product_backend_for
from tvfast.program import Entry, ModelScalars, TensorScalars, WorkTable

_KINDS = {"product": "product", "square": "square", "delta": "delta"}


@dataclass(frozen=True, slots=True)
class _Parameter:
    """θ, θ₀ and the accumulator of one call; `weight` and `base` are None where the kind reads none."""

    weight: Tensor | None
    base: Tensor | None
    out: Tensor

    def inputs(self) -> list[tuple[str, Tensor]]:
        return [
            (role, one) for role, one in (("weight", self.weight), ("base", self.base)) if one is not None
        ]


@traceable
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
    """Importance of every entry from per-sample gradients, added to what earlier samples left.

    |g * θ| for kind="product", |g * (θ - θ₀)| for "delta", g² for "square" (the empirical Fisher's diagonal),
    times `scale`, summed over samples. g is a sample's gradient:

    - of any parameter: `gradient` is g;
    - of a linear layer: with `activations`, G_j = Σ_r e_jr a_jrᵀ over the sample's tokens, where `gradient`
      has the gradients e at the layer's outputs. No G_j is ever in memory, nor are all of them;
    - of an embedding: with `tokens`, row v of G_j is the sum of e_jr over the tokens r that are v.

    Args:
        gradient: float32, bfloat16 or float16, contiguous; not modified. g of any shape, for one sample; or
            e, [N, R, o], [R, o] for one sample, or a sequence of N tensors [R_j, o] where samples differ in
            length (a sample without its padding is a view). A sample without tokens adds nothing.
        weight: θ, any of the dtypes: of the shape of g; [o, i] of a linear layer; [V, o] of an embedding. Not
            read for "square".
        kind: "product", "delta" or "square".
        base: θ₀ of the shape of θ, any of the dtypes; for "delta" only.
        out: float32 accumulator of the shape of θ; the scores are added to it, not written over it. Needed
            for kind="square" of an embedding, whose number of rows nothing else says.
        activations: a, the layer's inputs, given as the gradients are: [N, R, i], [R, i] or N of [R_j, i].
        bias_column: the bias is the last column of θ, [o, i + 1], and its activation is 1 for every token.
        tokens: int64 token ids, given as the gradients are: [N, R], [R] or N of [R_j]; each in [0, V).
        scale: one number, or one per sample.
        n_threads: 0: all cores the process may use.

    Returns:
        float32, the shape of θ, on the gradient's device: `out` if given, otherwise a new tensor that holds
        these samples only.

    Raises:
        UnknownNameError: `kind`.
        ArgumentError: a tensor that `kind` needs is missing, or one that it does not read was given; both
            `activations` and `tokens`; a token id out of range; `scale` or `n_threads`.
        ShapeError, DTypeError, DeviceError, LayoutError: tensors do not fit together, or overlap `out`.

    Notes:
        float32. Elementwise: one rounding per operation, the subtraction, the product, the scale, the
        addition. A layer's G is a chain of fused multiply-adds over the tokens in order on CPUs; GPUs and the
        reference use their matrix products (docs/numerics.md, "Products"). Samples are added in order. Bits
        do not depend on threads or instruction set. The absolute value is taken per sample: at a converged θ
        the mean gradient is near zero, and its scores with it. Scratch does not depend on the number of
        samples: about 1 MiB per thread for a layer, and the rows that one sample touches for an embedding.

    Source: |g * θ|: Tian et al. 2024, arXiv:2411.16139 (STA), per sample; g²: Matena & Raffel 2021,
        arXiv:2111.09832.
    """
    form = check.choice("kind", kind, _KINDS)
    if activations is not None and tokens is not None:
        raise ArgumentError("both activations and tokens were given; expected one of them, or neither.")
    if bias_column and activations is None:
        raise ArgumentError("bias_column is set without activations; it belongs to a linear layer.")
    for role, one, needed in (("weight", weight, form != "square"), ("base", base, form == "delta")):
        if needed and one is None:
            raise ArgumentError(f"kind={kind!r} reads {role}, and it is None; pass a tensor of its shape.")
        if not needed and one is not None and role == "base":
            raise ArgumentError(f"kind={kind!r} does not read base; expected None, or kind='delta'.")
    n_threads = check.threads(n_threads)
    weight = None if form == "square" else weight
    if activations is not None:
        return _of_layer(gradient, activations, bias_column, weight, base, out, scale, n_threads)
    if tokens is not None:
        return _of_embedding(gradient, tokens, weight, base, out, scale, n_threads)
    g = _plain("gradient", gradient)
    (share,) = check.weights_of(scale, 1, "scale")
    parameter = _parameter(weight, base, out, g.shape, g.device, "gradient", [("gradient", g)])
    _elementwise(g, parameter, share, n_threads)
    return parameter.out if out is None else out


def _elementwise(g: Tensor, parameter: _Parameter, share: float, n_threads: int) -> None:
    gradient = view(g, "", "gradient")
    base = None if parameter.base is None else view(parameter.base, "", "base")
    model = gradient if parameter.weight is None else view(parameter.weight, "", "weight")
    entry = Entry(
        name="tensor", models=(model,), base=base, scores=(gradient,), out=view(parameter.out, "", "out")
    )
    table = WorkTable([entry], 1)
    scalars = [TensorScalars(models=[ModelScalars(weight=share)])]
    product_backend_for(table).score(table, scalars, n_threads)


def _of_layer(
    gradient: Tensor | Sequence[Tensor],
    activations: Tensor | Sequence[Tensor],
    bias_column: bool,
    weight: Tensor | None,
    base: Tensor | None,
    out: Tensor | None,
    scale: float | Sequence[float],
    n_threads: int,
) -> Tensor:
    e, a = _samples("gradient", gradient, 2), _samples("activations", activations, 2)
    _check_tokens("activations", e, a)
    shares = check.weights_of(scale, len(e), "scale")
    shape = torch.Size([e[0].shape[1], a[0].shape[1] + bias_column])
    inputs = [(f"gradient[{j}]", one) for j, one in enumerate(e)]
    inputs += [(f"activations[{j}]", one) for j, one in enumerate(a)]
    columns = "[o, i + 1]" if bias_column else "[o, i]"
    parameter = _parameter(
        weight, base, out, shape, e[0].device, f"{columns} of gradient and activations", inputs
    )
    layer = FactoredScore(
        name="tensor",
        samples=tuple(
            FactoredSample(
                gradients=view(one, "", f"gradient[{j}]"),
                activations=view(other, "", f"activations[{j}]"),
                n_tokens=len(one),
                weight=share,
            )
            for j, (one, other, share) in enumerate(zip(e, a, shares, strict=True))
        ),
        n_out=shape[0],
        n_in=shape[1],
        out=view(parameter.out, "", "out"),
        model=None if parameter.weight is None else view(parameter.weight, "", "weight"),
        base=None if parameter.base is None else view(parameter.base, "", "base"),
        bias_column=bias_column,
    )
    product_backend_for([layer]).score_factored([layer], n_threads)
    return parameter.out if out is None else out


def _of_embedding(
    gradient: Tensor | Sequence[Tensor],
    tokens: Tensor | Sequence[Tensor],
    weight: Tensor | None,
    base: Tensor | None,
    out: Tensor | None,
    scale: float | Sequence[float],
    n_threads: int,
) -> Tensor:
    e, ids = _samples("gradient", gradient, 2), _samples("tokens", tokens, 1)
    _check_tokens("tokens", e, ids)
    shares = check.weights_of(scale, len(e), "scale")
    table = weight if weight is not None else out
    if table is None:
        raise ArgumentError(
            "out is None and kind='square' reads no weight, so the number of rows is unknown; pass out."
        )
    check.tensor("out" if weight is None else "weight", table)
    if table.dim() != 2 or table.shape[1] != e[0].shape[1]:
        raise ShapeError(
            f"the embedding has shape {list(table.shape)}; expected [V, {e[0].shape[1]}] to fit gradient."
        )
    inputs = [(f"gradient[{j}]", one) for j, one in enumerate(e)]
    inputs += [(f"tokens[{j}]", one) for j, one in enumerate(ids)]
    parameter = _parameter(weight, base, out, table.shape, e[0].device, "the embedding", inputs)
    for j, (one, those, share) in enumerate(zip(e, ids, shares, strict=True)):
        if len(those) == 0:
            continue
        rows, places = torch.unique(those, return_inverse=True)
        if int(rows[0]) < 0 or int(rows[-1]) >= len(table):
            raise ArgumentError(
                f"tokens[{j}] has ids from {int(rows[0])} to {int(rows[-1])}; expected [0, {len(table) - 1}]."
            )
        g = torch.zeros(len(rows), one.shape[1], dtype=torch.float32, device=one.device)
        g.index_add_(0, places, one.detach().to(torch.float32))
        touched = _Parameter(
            None if parameter.weight is None else parameter.weight.detach()[rows],
            None if parameter.base is None else parameter.base.detach()[rows],
            parameter.out[rows],
        )
        _elementwise(g, touched, share, n_threads)
        parameter.out[rows] = touched.out
    return parameter.out if out is None else out


def _samples(role: str, found: Tensor | Sequence[Tensor], n_dims: int) -> list[Tensor]:
    """Contiguous tensors, one per sample, of `n_dims` dimensions and one width and dtype kind."""
    samples = [found] if isinstance(found, Tensor) and found.dim() == n_dims else check.models_of(role, found)
    for j, one in enumerate(samples):
        where = f"{role}[{j}]"
        if one.dim() != n_dims or one.shape[1:] != samples[0].shape[1:]:
            raise ShapeError(
                f"{where} has shape {list(one.shape)}; expected {n_dims} dimensions, the first for tokens"
                f"{f', the last {samples[0].shape[-1]} as in {role}[0]' if n_dims > 1 else ''}."
            )
        check_plain(one, "", where)
        if n_dims == 1 and one.dtype != torch.int64:
            raise DTypeError(f"{where} has dtype {one.dtype}; expected int64 token ids.")
        if n_dims == 2:
            _check_dtype(where, one)
    return samples


def _check_tokens(role: str, e: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    if len(e) != len(other):
        raise ShapeError(f"gradient has {len(e)} samples, {role} has {len(other)}; expected as many.")
    for j, (one, two) in enumerate(zip(e, other, strict=True)):
        if len(one) != len(two):
            raise ShapeError(
                f"gradient[{j}] has {len(one)} tokens, {role}[{j}] has {len(two)}; expected as many."
            )
        if one.device != e[0].device or two.device != e[0].device:
            raise DeviceError(
                f"gradient[{j}] is on {one.device}, {role}[{j}] on {two.device}, gradient[0] on "
                f"{e[0].device}; expected one device."
            )


def _parameter(
    weight: Tensor | None,
    base: Tensor | None,
    out: Tensor | None,
    shape: torch.Size,
    device: torch.device,
    like: str,
    inputs: list[tuple[str, Tensor]],
) -> _Parameter:
    """Checked; `out` is a new tensor of zeros if it was None."""
    stand_in = torch.zeros(1, device=device).as_strided(shape, [0] * len(shape))
    found = _Parameter(weight, base, stand_in)
    for role, one in found.inputs():
        check_same("", role, _plain(role, one), like, stand_in)
    if out is None:
        return _Parameter(weight, base, torch.zeros(shape, dtype=torch.float32, device=device))
    check.output(out, stand_in, like, [*inputs, *found.inputs()], dtypes=[torch.float32])
    return _Parameter(weight, base, out.detach())


def _plain(role: str, found: object) -> Tensor:
    one = check.tensor(role, found)
    check_plain(one, "", role)
    _check_dtype(role, one)
    return one


def _check_dtype(role: str, one: Tensor) -> None:
    if one.dtype not in DTYPES:
        raise DTypeError(
            f"{role} has dtype {one.dtype}; expected float32, bfloat16 or float16. Cast it first."
        )
