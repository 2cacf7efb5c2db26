"""Argument checks of the public primitives; what concerns tensor memory is in `_views`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, DTypeError, ShapeError, UnknownNameError
from tvfast.ops._views import Span, check_overlap, check_plain, check_same, span
from tvfast.program import ModelScalars, TensorScalars

Choice = TypeVar("Choice")

_MAY_BE_INFINITE = ("lo", "hi")


def fraction(name: str, value: float) -> float:
    """`value` as a float.

    Raises:
        ArgumentError: not a number in [0, 1].
    """
    found = number(name, value)
    if not 0.0 <= found <= 1.0:
        raise ArgumentError(f"{name} is {found}; expected a number in [0, 1].")
    return found


def number(name: str, value: float) -> float:
    """`value` as a float.

    Raises:
        ArgumentError: not a number; strings and booleans are not.
    """
    if not isinstance(value, str | bytes | bool):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise ArgumentError(f"{name} is {value!r}; expected a number.")


def choice(name: str, found: object, known: Mapping[str, Choice]) -> Choice:
    """The entry of `known` that `found` names.

    Raises:
        UnknownNameError: with the nearest known name.
    """
    if isinstance(found, str) and found in known:
        return known[found]
    near = get_close_matches(str(found), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownNameError(f"{name} is {found!r}; expected one of {', '.join(map(repr, known))}.{hint}")


def models_of(name: str, models: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """K tensors from a sequence of them, or from one tensor [K, ...] as K views.

    Raises:
        ArgumentError: no model, or something that is not a tensor.
    """
    if isinstance(models, Tensor):
        if models.dim() == 0:
            raise ShapeError(f"{name} is one tensor of shape []; expected [K, ...] or a list of K tensors.")
        # a row of a non-contiguous stack can be contiguous, so each row is checked by itself
        found = list(models.detach().unbind(0))
    else:
        found = list(models)
    if not found:
        raise ArgumentError(f"{name} is empty; expected at least one tensor.")
    for k, model in enumerate(found):
        tensor(f"{name}[{k}]", model)
    return found


def tensor(role: str, found: object) -> Tensor:
    """`found`, if it is a tensor.

    Raises:
        ArgumentError: anything else.
    """
    if not isinstance(found, Tensor):
        raise ArgumentError(f"{role} is a {type(found).__name__}; expected a torch.Tensor.")
    return found


def weights_of(weights: Sequence[float] | None, n_models: int) -> list[float]:
    """One finite weight per model; 1 by default.

    Raises:
        ArgumentError: wrong count, or a weight that is not finite.
    """
    if weights is None:
        return [1.0] * n_models
    found = [number(f"weights[{k}]", weight) for k, weight in enumerate(weights)]
    if len(found) != n_models:
        raise ArgumentError(f"weights has {len(found)} values for {n_models} models; expected one per model.")
    for k, weight in enumerate(found):
        if not math.isfinite(weight):
            raise ArgumentError(f"weights[{k}] is {weight}; expected a finite number.")
    return found


def scalars_of(scalars: TensorScalars | None, n_models: int) -> TensorScalars:
    """`scalars`, or all defaults.

    Raises:
        ArgumentError: not one `ModelScalars` per model, or a number that is NaN, or infinite where only
            a band's end may be.
    """
    if scalars is None:
        return TensorScalars(models=[ModelScalars() for _ in range(n_models)])
    if len(scalars.models) != n_models:
        raise ArgumentError(
            f"scalars.models has {len(scalars.models)} entries for {n_models} models; expected one per model."
        )
    for name in ("scale", "majority", "divisor_floor", "divisor_fill"):
        _finite(f"scalars.{name}", getattr(scalars, name))
    for k, own in enumerate(scalars.models):
        for one in fields(own):
            _finite(f"scalars.models[{k}].{one.name}", getattr(own, one.name), one.name in _MAY_BE_INFINITE)
    return scalars


def output(
    out: Tensor,
    like: Tensor,
    like_role: str,
    inputs: Iterable[tuple[str, Tensor]],
    *,
    dtypes: Sequence[torch.dtype],
    may_be: Sequence[Tensor] = (),
    name: str = "",
) -> None:
    """Raise unless `out` can take a result of the shape of `like`.

    Args:
        dtypes: accepted dtypes.
        may_be: inputs that `out` may be, byte for byte; every other input must not share its memory.

    Raises:
        DTypeError, ShapeError, DeviceError, LayoutError: what was found and expected.
    """
    tensor("out", out)
    if out.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(out.dtype).removeprefix("torch.")
        raise DTypeError(f"out has dtype {found}; expected {expected}. Pass an out of that dtype, or none.")
    check_plain(out, name, "out")
    check_same(name, "out", out, like_role, like)
    # a span of another entry may not even be exactly the output
    spans: list[Span] = [
        span(one, name, role, 0 if any(one is allowed for allowed in may_be) else 1) for role, one in inputs
    ]
    check_overlap([span(out, name, "out", 0)], spans)


def _finite(place: str, value: float, may_be_infinite: bool = False) -> None:
    if math.isnan(value) or (math.isinf(value) and not may_be_infinite):
        raise ArgumentError(
            f"{place} is {value}; expected {'no NaN' if may_be_infinite else 'a finite number'}."
        )
