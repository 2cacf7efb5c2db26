"""Sums of a statistics file from and to torch tensors. The only module here that imports torch."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tvfast._leaves import strip_wrappers
from tvfast.errors import ArgumentError, StatisticsError
from tvfast.ops import measure
from tvfast.ops.raw import Wants
from tvfast.statistics.reading import StatisticsFile
from tvfast.statistics.records import SAMPLES, Array, Model, Summary

_TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


def array_of(
    tensor: Tensor,
    where: str,
    *,
    dtype: str | None = None,
    count: str = SAMPLES,
    concatenate: int | None = None,
    summary: bool = False,
) -> Array:
    """A tensor as sums to be written.

    Args:
        tensor: any device, float64, float32, bfloat16 or float16.
        where: what to call it in messages.
        dtype: safetensors name of the storage type; None: the tensor's own.
        count, concatenate: see `Array`.
        summary: store extremes and sums, too, which merges need of scores.

    Raises:
        StatisticsError: NaN or infinity, in the tensor or once it has been rounded to `dtype`.
        ArgumentError: a type that sums are not stored in.
    """
    if dtype is None:
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
    if dtype not in _TORCH:
        raise ArgumentError(f"{where}: sums of type {dtype!r}; expected one of {', '.join(sorted(_TORCH))}.")
    stored = tensor.detach().to("cpu", _TORCH[dtype]).contiguous()
    check_finite(stored, where)
    data = _bytes_of(stored)
    known = summary_of(stored) if summary else None
    return Array(dtype, tuple(stored.shape), data, count, concatenate, known)


def summary_of(tensor: Tensor) -> Summary:
    """Extremes and sums of a finite tensor on the CPU; sums are exact, so they depend on no thread count."""
    if tensor.numel() == 0:
        return Summary(0.0, 0.0, 0.0, 0.0)
    least, most = (float(value) for value in torch.aminmax(tensor))
    narrow = tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor
    sums = measure(None, [narrow], Wants.L1 | Wants.SQUARES)
    return Summary(least, most, sums.l1[0], sums.gram[0][0])


def tensor_of(array: Array, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """Sums as a new tensor on the CPU.

    Args:
        dtype: of the tensor; None: as stored.
    """
    source = _TORCH[array.dtype]
    if not array.n_elements:
        return torch.zeros(array.shape, dtype=dtype or source)
    stored = torch.frombuffer(bytearray(array.data), dtype=source).reshape(array.shape)
    return stored if dtype is None else stored.to(dtype)


def read_sum(
    file: StatisticsFile, parameter: str, kind: str, role: str, dtype: torch.dtype | None = torch.float32
) -> Tensor:
    """The sums of one role, finite.

    Raises:
        StatisticsError: no such record or role, or NaN or infinity in it.
    """
    tensor = tensor_of(file.read_role(parameter, kind, role), dtype)
    check_finite(tensor, f"{file.path}: parameter {parameter!r}: {kind} {role!r}")
    return tensor


def read_mean(
    file: StatisticsFile, parameter: str, kind: str, role: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sums of one role by their count.

    Raises:
        StatisticsError: no such record or role, a count of zero, or NaN or infinity.
    """
    divisor = file.divisor(parameter, kind, role)
    return read_sum(file, parameter, kind, role, dtype).div_(divisor)


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise if an element is NaN or infinite.

    Raises:
        StatisticsError: naming the place and the element.
    """
    # The sum of finite numbers may overflow, so it only tells that a search is worth it.
    if math.isfinite(tensor.sum(dtype=torch.float64).item()):
        return
    bad = (~torch.isfinite(tensor)).reshape(-1)
    if bool(bad.any()):
        raise StatisticsError(
            f"{where} holds NaN or infinity at element {int(bad.int().argmax())} (shape "
            f"{list(tensor.shape)}); expected finite sums. The loss or an activation overflowed: look at the "
            "data, or collect in float32."
        )


def added(arrays: Sequence[Array]) -> Array:
    """The sum, in order."""
    first = arrays[0]
    wide = torch.float64 if first.dtype == "F64" else torch.float32
    total = tensor_of(first, wide)
    for other in arrays[1:]:
        total += tensor_of(other, wide)
    known = first.summary is not None
    return array_of(total, "merged sums", dtype=first.dtype, count=first.count, summary=known)


def concatenated(arrays: Sequence[Array], axis: int) -> Array:
    """Arrays end to end along an axis."""
    first = arrays[0]
    whole = torch.cat([tensor_of(array, None) for array in arrays], dim=axis)
    return array_of(whole, "merged sums", dtype=first.dtype, count=first.count, concatenate=axis)


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by name, each once, without the components that wrappers insert."""
    found = dict(model.named_parameters())
    return {stripped: found[name] for name, stripped in strip_wrappers(found).items()}


def model_identity(model: nn.Module, name: str = "", *, content: bool = False) -> Model:
    """Whose statistics are collected.

    Args:
        name: path or id, for people; the class's name if empty.
        content: digest the values, too: reads every parameter once.

    Notes:
        Digests are SHA-256 over the parameters in order of name, 32 hexadecimal digits of it: of "name shape"
        lines, or of names and bytes as they are stored.
    """
    parameters = sorted(parameter_names(model).items())
    sizes: Counter[str] = Counter()
    for _, parameter in parameters:
        sizes[_NAMES.get(parameter.dtype, str(parameter.dtype))] += parameter.numel()
    return Model(
        name or type(model).__name__,
        structure_digest((found, tuple(parameter.shape)) for found, parameter in parameters),
        _content_digest(parameters) if content else "",
        sizes.most_common(1)[0][0] if sizes else "",
    )


def structure_digest(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """The digest of names and shapes."""
    lines = [f"{name} {list(shape)}\n" for name, shape in sorted(shapes)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def _content_digest(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(name.encode() + b"\0")
        stored = parameter.detach().to("cpu").contiguous()
        digest.update(_bytes_of(stored))
    return digest.hexdigest()[:32]


def _bytes_of(stored: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which it shares."""
    return memoryview(stored.reshape(-1).view(torch.uint8).numpy().data)
