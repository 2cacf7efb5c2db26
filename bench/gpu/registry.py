"""A row on a GPU: what runs, the least it must move or multiply, what it is compared with, what is asked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.checkpoints.family import Architecture
from bench.gpu.clock import Run
from bench.gpu.inputs import DeviceBuffers
from bench.gpu.limits import Cost
from bench.registry import LIMIT, UnavailableError
from tvfast.ops.raw import ProductBackend

BACKENDS = ("cuda", "triton")
BASELINE = "torch"


@dataclass(frozen=True, slots=True)
class Goal:
    """`LIMIT`: a share of it. A row's name: how many times faster, or with `by_rate` in bytes per second.

    A row of the same backend comes before a baseline of that name.
    """

    against: str
    at_least: float = 0.0  # 0: compared, nothing asked
    by_rate: bool = False


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of the rows that do not go by `--elements`."""

    limit_bytes: int
    columns: int  # of the tensors of --elements
    side: int  # of a layer
    n_samples: int
    n_tokens: int
    large: Architecture  # a table of real shapes, whose tensors share memory
    narrow: Architecture  # a table whose tensors have memory of their own
    preset: str  # of the family on disk


FULL = Shapes(
    limit_bytes=2**31,
    columns=8192,
    side=8192,
    n_samples=16,
    n_tokens=512,
    large=Architecture(8192, 80, 28672, 128256, 64, 8),  # the shape of Llama 3 70B: 723 tensors
    narrow=Architecture(1024, 80, 3584, 16032, 64, 8),  # an eighth as wide
    preset="0.5b",
)
_ONE_LAYER = Architecture(32, 1, 64, 64, 2, 2)
TINY = Shapes(2**16, 64, 64, 2, 8, _ONE_LAYER, _ONE_LAYER, "tiny")


@dataclass
class Place:
    """Where a row runs. `backend` is None for what torch does."""

    device: torch.device
    shapes: Shapes
    buffers: DeviceBuffers | None = None
    backend_name: str | None = None

    @cached_property
    def backend(self) -> Any:
        """The backend itself.

        Raises:
            ImportError: it is not in this build, or has no device.
        """
        return importlib.import_module(f"tvfast.ops.{self.backend_name}").backend()

    @property
    def inputs(self) -> DeviceBuffers:
        if self.buffers is None:
            raise UnavailableError("this group of rows has no inputs of --elements")
        return self.buffers

    def need_products(self) -> None:
        """Raise unless public functions can be forced to the backend for `score` and `kron`.

        Raises:
            UnavailableError: it does not have all of their verbs.
        """
        if not isinstance(self.backend, ProductBackend):
            raise UnavailableError(f"backend {self.backend_name} has no score and kron in this build")

    def verb(self, name: str) -> Callable[..., Any]:
        """A verb of the backend.

        Raises:
            UnavailableError: the backend has none of that name.
        """
        found = getattr(self.backend, name, None)
        if found is None:
            raise UnavailableError(f"backend {self.backend_name} has no {name} in this build")
        verb: Callable[..., Any] = found
        return verb


@dataclass(frozen=True, slots=True)
class Ready:
    """A call with its operands, and what it must move. `written` is checked for gaps after the first call."""

    run: Run
    cost: Cost | None = None
    written: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One line of the table, for every backend; or once if it is a baseline."""

    name: str
    make: Callable[[Place], Ready]
    goals: tuple[Goal, ...] = ()
    baseline: bool = False
    most_elements: int | None = None  # more would take minutes


def against_limit(share: float = 0.0) -> Goal:
    return Goal(LIMIT, share)
