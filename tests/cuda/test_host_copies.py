"""What is read on the host of the device's answers is still there while it is read."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from tests.cuda.test_selection import on_device
from tests.strategies import Part
from tvfast import ops
from tvfast.ops.raw import Wants
from tvfast.program import ModelScalars, Program, TensorScalars


class Reading:
    """A module whose readers of host memory look whether it is that of a living copy."""

    def __init__(self, module: Any, copies: list[weakref.ref[torch.Tensor]]) -> None:
        self._module = module
        self._copies = copies
        self.n_read = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in ("moments", "dot_value"):
            return found

        def read(address: int, *rest: Any) -> Any:
            alive = [copy for one in self._copies if (copy := one()) is not None]
            assert address in [copy.data_ptr() for copy in alive], "the copy is gone"
            self.n_read += 1
            return found(address, *rest)

        return read


@pytest.fixture
def reading(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Reading:
    """`Tensor.cpu` copies, as it does on a device."""
    copies: list[weakref.ref[torch.Tensor]] = []

    def cpu(self: torch.Tensor) -> torch.Tensor:
        copy = torch.empty_like(self, device="cpu").copy_(self)
        copies.append(weakref.ref(copy))
        return copy

    found = Reading(emulated._module, copies)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(emulated, "_module", found)
    return found


def test_sums_are_read_from_a_living_copy(emulated: Any, reading: Reading) -> None:
    table = on_device([Part([torch.tensor([3.0, -4.0])])])
    scalars = [TensorScalars(models=[ModelScalars()])]
    (found,) = emulated.measure(table, Program(), scalars, Wants.GRAM)
    assert (found.gram, reading.n_read) == ([[25.0]], 1)


def test_products_are_read_from_a_living_copy(reading: Reading) -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x, factor = torch.eye(2, device=where), [torch.eye(2, device=where)]
    assert float(ops.kron(x, factor, factor, block=2)[1]) == 2.0
    assert reading.n_read == 1
