"""A backend for GPUs behind CPU tensors: inputs are copied to the device, and what was written back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvfast.ops import raw
from tvfast.program import Entry, View, WorkTable


class _Copies:
    """Views on the device of the CPU views of one call; each tensor is copied once, at its alignment."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[int, tuple[View, Tensor]] = {}

    def of(self, view: View | None) -> View | None:
        if view is None:
            return None
        found = self._known.get(view.address)
        if found is None:
            bytes_ = view.owner.detach().reshape(-1).view(torch.uint8)
            start = view.address - bytes_.data_ptr()
            lead = view.address % 64
            memory = torch.empty(lead + len(bytes_) - start, dtype=torch.uint8, device=self._device)
            memory[lead:] = bytes_[start:].to(self._device)
            self._known[view.address] = found = (view, memory)
        memory = found[1]
        return replace(view, address=memory.data_ptr() + view.address % 64, owner=memory)

    def back(self) -> None:
        for view, memory in self._known.values():
            bytes_ = view.owner.detach().reshape(-1).view(torch.uint8)
            bytes_[view.address - bytes_.data_ptr() :] = memory[view.address % 64 :].cpu()


class _Moved:
    """Calls a backend with tables on a device; `moved` gives it the backend's verbs."""

    def __init__(self, backend: Any, device: torch.device) -> None:
        self.name = backend.name
        self._backend = backend
        self._device = device

    def product_sum(self) -> Any:
        return _MovedSum(self._backend.product_sum(), self._device)


class _MovedSum:
    """`ops.raw.ProductSum` of panels that are moved."""

    def __init__(self, inner: Any, device: torch.device) -> None:
        self._inner = inner
        self._device = device

    def add(self, panel: Any, n_threads: int = 0) -> None:
        copies = _Copies(self._device)
        self._inner.add(_replaced(panel, copies), n_threads)
        copies.back()

    def value(self) -> float:
        return float(self._inner.value())


_RUN_LATER = ("prepared", "trimmed")


def moved(backend: Any, device: torch.device) -> Any:
    """The backend for tables and operands of CPU tensors.

    Its verbs are those of a class, not found when they are asked for: protocols look no further.
    """
    verbs = {
        name: _verb(name)
        for name in dir(type(backend))
        if not name.startswith("_") and name not in (*_RUN_LATER, *vars(_Moved))
        and callable(getattr(type(backend), name))
    }  # fmt: skip
    return type("Moved", (_Moved,), verbs)(backend, device)


def _verb(name: str) -> Callable[..., Any]:
    def call(self: Any, first: Any, *arguments: Any, **options: Any) -> Any:
        copies = _Copies(self._device)
        found = getattr(self._backend, name)(_on_device(first, copies), *arguments, **options)
        copies.back()
        return found

    return call


@contextmanager
def standing_in(backend: Any, device: torch.device) -> Iterator[Any]:
    """Public functions and tests have the backend for CPU tensors."""
    found, usual = moved(backend, device), raw._load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "_load", lambda name: found if name == found.name else usual(name))
        yield found


def _on_device(work: WorkTable | Sequence[Any], copies: _Copies) -> Any:
    if isinstance(work, WorkTable):
        return WorkTable([_entry(entry, copies) for entry in work.entries], work.n_models)
    return [_replaced(one, copies) for one in work]


def _entry(entry: Entry, copies: _Copies) -> Entry:
    return replace(
        entry,
        models=tuple(copies.of(view) for view in entry.models),
        base=copies.of(entry.base),
        out=copies.of(entry.out),
        scores=tuple(copies.of(view) for view in entry.scores),
        masks=tuple(copies.of(view) for view in entry.masks),
    )


def _replaced(value: Any, copies: _Copies) -> Any:
    """A dataclass with every view in it, at any depth, on the device."""
    if isinstance(value, View):
        return copies.of(value)
    if isinstance(value, tuple):
        return tuple(_replaced(one, copies) for one in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(
            value, **{name: _replaced(getattr(value, name), copies) for name in value.__dataclass_fields__}
        )
    return value
