"""Argument checks of the public primitives; what concerns tensor memory is in `_views`."""

from __future__ import annotations

import math
import operator
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
_INTEGERS = {
    "lo_cut": 2**64,
    "hi_cut": 2**64,
    "limit": 2**64,
    "limit_step": 2**64,
    "rank_lo": 2**63,
    "rank_hi": 2**63,
    "key": 2**64,
}
"""Fields of `ModelScalars` that are integers, and the first value that does not fit."""

_LARGEST = torch.finfo(torch.float32).max
_MOST_THREADS = 2**16


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


def integer(name: str, value: int) -> int:
    """`value` as an int.

    Raises:
        ArgumentError: not an integer; booleans are not.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ArgumentError(f"{name} is {value!r}; expected an integer.")


def index(name: str, value: int, end: int = 2**63) -> int:
    """`value` as an int.

    Raises:
        ArgumentError: not an integer in [0, end); booleans are not.
    """
    if not isinstance(value, bool):
        try:
            found = operator.index(value)
        except TypeError:
            found = -1
        if 0 <= found < end:
            return found
    raise ArgumentError(f"{name} is {value!r}; expected an integer in [0, {end - 1}].")


def threads(n_threads: int) -> int:
    """A thread count; 0 stands for all cores.

    Raises:
        ArgumentError: not an integer in [0, 65536].
    """
    return index("n_threads", n_threads, _MOST_THREADS + 1)


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
        ArgumentError: no sequence, no model, or something that is not a tensor.
    """
    if isinstance(models, Tensor):
        if models.dim() == 0:
            raise ShapeError(f"{name} is one tensor of shape []; expected [K, ...] or a list of K tensors.")
        # a row of a non-contiguous stack can be contiguous, so each row is checked by itself
        found = list(models.detach().unbind(0))
    elif isinstance(models, Iterable) and not isinstance(models, str | bytes | Mapping):
        found = list(models)
    else:
        raise ArgumentError(
            f"{name} is a {type(models).__name__}; expected tensors: a list, or one [K, ...]."
        )
    if not found:
        raise ArgumentError(f"{name} is empty; expected at least one tensor.")
    for k, model in enumerate(found):
        tensor(f"{name}[{k}]", model)
    return found


def instance(role: str, found: object, kind: type) -> None:
    """Raise unless `found` is of a type.

    Raises:
        ArgumentError: anything else.
    """
    if not isinstance(found, kind):
        raise ArgumentError(f"{role} is a {type(found).__name__}; expected {kind.__name__}.")


def tensor(role: str, found: object) -> Tensor:
    """`found`, if it is a tensor.

    Raises:
        ArgumentError: anything else.
    """
    if not isinstance(found, Tensor):
        raise ArgumentError(f"{role} is a {type(found).__name__}; expected a torch.Tensor.")
    return found


def weights_of(weights: float | Sequence[float] | None, n_models: int, name: str = "weights") -> list[float]:
    """One finite weight per model, from one for all or one per model; 1 by default.

    Raises:
        ArgumentError: wrong count, or a weight that is not finite.
    """
    if weights is None:
        return [1.0] * n_models
    try:
        listed = list(weights)  # type: ignore[arg-type]
    except TypeError:
        value = number(name, weights)  # type: ignore[arg-type]
        _finite(name, value)
        return [value] * n_models
    found = [number(f"{name}[{k}]", weight) for k, weight in enumerate(listed)]
    if len(found) != n_models:
        raise ArgumentError(
            f"{name} has {len(found)} values for {n_models} models; expected one value or one per model."
        )
    for k, weight in enumerate(found):
        _finite(f"{name}[{k}]", weight)
    return found


def scalars_of(scalars: TensorScalars | None, n_models: int) -> TensorScalars:
    """`scalars`, or all defaults.

    Raises:
        ArgumentError: not one `ModelScalars` per model, a number that is NaN, or infinite where only a
            band's end may be, or an integer that is none or does not fit.
    """
    if scalars is None:
        return TensorScalars(models=[ModelScalars() for _ in range(n_models)])
    instance("scalars", scalars, TensorScalars)
    if len(scalars.models) != n_models:
        raise ArgumentError(
            f"scalars.models has {len(scalars.models)} entries for {n_models} models; expected one per model."
        )
    for name in ("scale", "majority", "divisor_floor", "divisor_fill"):
        _finite(f"scalars.{name}", getattr(scalars, name))
    for k, own in enumerate(scalars.models):
        instance(f"scalars.models[{k}]", own, ModelScalars)
        for one in fields(own):
            place, value = f"scalars.models[{k}].{one.name}", getattr(own, one.name)
            if one.name in _INTEGERS:
                index(place, value, _INTEGERS[one.name])
            else:
                _finite(place, value, one.name in _MAY_BE_INFINITE)
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
    found = number(place, value)
    if not abs(found) <= _LARGEST and not (may_be_infinite and math.isinf(found)):
        expected = "a number that float32 holds" if may_be_infinite else "a finite number that float32 holds"
        raise ArgumentError(f"{place} is {found}; expected {expected}.")
