"""From torch tensors to `View`s: every check of a public call, once, without device synchronisation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tvfast.errors import DeviceError, DTypeError, LayoutError, ShapeError
from tvfast.program import DType, View

DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


def where(name: str, role: str) -> str:
    """How every message names a tensor: its name, then the argument that brought it."""
    return f"tensor {name!r}: {role}" if name else role


def check_plain(tensor: Tensor, name: str, role: str) -> None:
    """Raise unless `tensor` owns ordinary, dense, contiguous memory.

    Raises:
        LayoutError: meta, sparse, DTensor or another wrapper subclass, a negated view, or not contiguous.
    """
    place = where(name, role)
    kind = type(tensor).__name__
    if kind == "DTensor":
        raise LayoutError(
            f"{place} is a DTensor; expected a local tensor. Pass tensor.to_local(), or merge it with "
            "tvfast.merge_, which takes DTensors."
        )
    if tensor.is_meta:
        raise LayoutError(f"{place} is on the meta device and has no data; expected a materialised tensor.")
    if tensor.layout != torch.strided:
        raise LayoutError(
            f"{place} has layout {tensor.layout}; expected torch.strided. Convert it with .to_dense()."
        )
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise LayoutError(
            f"{place} is a {kind}, a tensor subclass that wraps other tensors; expected a plain tensor. "
            "Unwrap or dequantise it first."
        )
    if tensor.is_neg():
        raise LayoutError(
            f"{place} is a view with a pending negation; expected its values in memory. Pass "
            "tensor.resolve_neg()."
        )
    if not tensor.is_contiguous():
        raise LayoutError(
            f"{place} is not contiguous: shape {list(tensor.shape)}, strides {list(tensor.stride())}; "
            "expected contiguous memory. Pass tensor.contiguous()."
        )


def view(tensor: Tensor, name: str, role: str, *, float64: bool = False) -> View:
    """The `View` of a contiguous float tensor; shares its memory and keeps it alive.

    Args:
        tensor: any shape; float32, bfloat16 or float16, and float64 where `float64` is set. Not modified.
        name: the tensor's name, for messages; "" for none.
        role: the argument it came from, for messages, as in "models[1]".
        float64: accept float64, which only the reference backend reads; the view then says `DType.F32`
            and its owner is the float64 tensor.

    Raises:
        DTypeError: any other dtype.
        LayoutError: see `check_plain`.
    """
    check_plain(tensor, name, role)
    dtype = check_dtype(tensor, name, role, float64=float64)
    owner = tensor.detach()
    return View(owner.data_ptr(), owner.numel(), dtype, owner)


def check_dtype(tensor: Tensor, name: str, role: str, *, float64: bool = False) -> DType:
    """What a `View` of the tensor says of its elements; arguments as for `view`.

    Raises:
        DTypeError: kernels do not read its dtype.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None and float64 and tensor.dtype == torch.float64:
        dtype = DType.F32
    if dtype is None:
        raise DTypeError(
            f"{where(name, role)} has dtype {_short(tensor.dtype)}; expected float32, bfloat16 or float16"
            f"{' or float64' if float64 else ''}. Cast it first."
        )
    return dtype


def check_same(
    name: str, role: str, tensor: Tensor, reference_role: str, reference: Tensor, *, dtype: bool = False
) -> None:
    """Raise unless two tensors have the same shape and device, and the same dtype if asked.

    Raises:
        ShapeError, DeviceError, DTypeError: naming both tensors and what each has.
    """
    place = where(name, role)
    if tensor.shape != reference.shape:
        raise ShapeError(
            f"{place} has shape {list(tensor.shape)}, {reference_role} has {list(reference.shape)}; "
            "expected equal shapes. Align the tensors first."
        )
    if tensor.device != reference.device:
        raise DeviceError(
            f"{place} is on {tensor.device}, {reference_role} on {reference.device}; "
            "expected one device. Move one of them with .to()."
        )
    if dtype and tensor.dtype != reference.dtype:
        raise DTypeError(
            f"{place} has dtype {_short(tensor.dtype)}, {reference_role} has {_short(reference.dtype)}; "
            "expected equal dtypes. Cast one of them."
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a tensor, how messages name it, and its row of the work table."""

    start: int
    stop: int
    device: torch.device
    entry: int
    label: str


def span(tensor: Tensor, name: str, role: str, entry: int = 0) -> Span:
    """The bytes of a contiguous tensor."""
    start = tensor.data_ptr()
    n_bytes = tensor.numel() * tensor.element_size()
    return Span(start, start + n_bytes, tensor.device, entry, where(name, role))


def check_overlap(outs: Sequence[Span], inputs: Iterable[Span]) -> None:
    """Raise if an output shares memory with another output, or with an input other than exactly itself.

    An input may be its own entry's output, byte for byte: every element is read before it is written.

    Raises:
        LayoutError: naming both tensors.
    """
    by_device: dict[torch.device, list[Span]] = {}
    for out in outs:
        if out.start < out.stop:
            by_device.setdefault(out.device, []).append(out)
    starts: dict[torch.device, list[int]] = {}
    for device, spans in by_device.items():
        spans.sort(key=lambda s: s.start)
        starts[device] = [s.start for s in spans]
        for left, right in pairwise(spans):
            if right.start < left.stop:
                raise LayoutError(
                    f"{right.label} and {left.label} share memory, and both are written; "
                    "expected separate tensors. Clone one of them."
                )
    for item in inputs:
        spans = by_device.get(item.device, [])
        if item.start == item.stop or not spans:
            continue
        # outputs are disjoint and sorted: only those that start before the input's end can reach into it
        index = bisect_right(starts[item.device], item.stop - 1) - 1
        while index >= 0 and spans[index].stop > item.start:
            out = spans[index]
            exact = (out.start, out.stop) == (item.start, item.stop)
            if not (exact and out.entry == item.entry):
                raise LayoutError(
                    f"{item.label} overlaps the memory of {out.label}, which is written; expected "
                    "separate tensors, or exactly the same one. Clone it first."
                )
            index -= 1


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
