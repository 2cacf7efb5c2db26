"""What the engine needs of a device: a ring of memory, transfers and computations that overlap; no torch.

Work is put into three queues: uploads, computations, downloads. Each runs its own work in order, and beside
the others. The `Ticket` of some work is what other queues wait for, and the host before it uses or lends
again what the work touches.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

from tvfast.errors import BackendError, MergeError, TvfastError
from tvfast.ops.raw import Backend
from tvfast.program import DType, View

ALIGNMENT = 256
"""Of arrays in the ring; kernels read 16 bytes at a time, GPUs fetch lines of 128."""


class OutOfDeviceMemory(MergeError):
    """A computation found no memory beside the ring; smaller pieces may."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a plan knows of a device. Sizes are bytes.

    Attributes:
        name: "cuda:0".
        description: what its maker calls it.
        backend: the name of the one that computes there.
        total_bytes: of its memory.
        free_bytes: of that, what this process can still take.
        host_bytes: resident memory of the process beside its tensors, the device's libraries included.
        resumable: whether its backend answers for data that comes in parts.
    """

    name: str
    description: str
    backend: str
    total_bytes: int
    free_bytes: int
    host_bytes: int
    resumable: bool = False


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes at a host address and their place in the ring."""

    address: int
    at: int
    n_bytes: int


class Ticket(Protocol):
    """Work that was put into a queue."""

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            MergeError: the device failed.
        """


class Device(Protocol):
    """A device between `open` and `close`. Methods may be called from several threads.

    Attributes:
        traits: what plans know of it.
        backend: computes on `View`s of the ring.
    """

    traits: Traits
    backend: Backend

    def open(self, address: int, n_bytes: int, ring_bytes: int, limit_bytes: int) -> None:
        """Pin host memory, allocate the ring, and bound what this process takes of the device.

        Args:
            address, n_bytes: the host memory that all transfers use.
            ring_bytes: size of the ring.
            limit_bytes: of the ring and of everything that computations allocate.

        Raises:
            MergeError: either cannot be had; nothing is kept then.
        """

    def view(self, at: int, n_elements: int, dtype: DType) -> View:
        """Elements of the ring; `at` is a multiple of 16."""

    def plane(self, at: int, n_bits: int) -> View:
        """A bit plane in the ring, zeroed in the order of the computations."""

    def upload(self, transfers: Sequence[Transfer]) -> Ticket:
        """Copy to the ring."""

    def compute(self, after: Ticket) -> AbstractContextManager[Ticket]:
        """What the backend does inside comes after another queue's work; the ticket is valid outside.

        Raises:
            OutOfDeviceMemory: there was none for the backend's scratch.
            MergeError: the device failed.
        """

    def download(self, transfers: Sequence[Transfer], after: Ticket) -> Ticket:
        """Copy from the ring when another queue's work is done."""

    def drain(self) -> None:
        """Wait for everything, whatever has failed, and return memory that nobody uses."""

    def peak_bytes(self) -> int:
        """The most that this process took of the device since `open`."""

    def close(self) -> None:
        """Give ring and pins back; only after every ticket was waited for, or `drain`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a merge runs; `device` is None for the CPU. `why` completes "cpu: ..." or "cuda:0: ..."."""

    device: Device | None
    why: str


def choose(name: str, local_rank: int = 0) -> Choice:
    """The device that `--device` names: "auto", "cpu", "cuda" or "cuda:1".

    Args:
        local_rank: which GPU is meant where no number is given: one for each rank of a machine.

    Raises:
        BackendError: it was named, and is not here or cannot run.
    """
    if name == "cpu":
        return Choice(None, "as asked")
    asked = "" if name == "auto" else f"device {name!r}: "
    try:
        lacking = no_driver()
        if lacking:
            raise BackendError(f"{asked}{lacking}. Pass --device cpu, or run `tvfast doctor`.")
        found = find(f"cuda:{local_rank}" if name in ("auto", "cuda") else name)
    except TvfastError as error:
        if asked:
            raise
        return Choice(None, str(error).removesuffix(".").split(". Pass")[0])
    return Choice(found, found.traits.description)


def find(name: str) -> Device:
    """A device of torch.

    Raises:
        BackendError: torch has none of that name, or no backend can run there.
    """
    module = importlib.import_module("tvfast.engine.torch_device")
    return cast(Device, module.find(int(re.sub(r"\D", "", name) or 0)))


def no_driver() -> str | None:
    """Why there is no GPU, found without torch; None: there may be one."""
    if os.path.exists("/dev/kfd"):
        return None  # of AMD
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    code = driver.cuInit(0)
    count = ctypes.c_int()
    if code == 0:
        code = driver.cuDeviceGetCount(ctypes.byref(count))
    if code not in (0, 100):
        return f"the NVIDIA driver does not start (error {code})"
    return None if code == 0 and count.value else "the NVIDIA driver shows no GPU to this process"


GB = 10**9

NOMINAL = {
    "a100": Traits("a100", "an A100 of 40 GB", "cuda", 40 * GB, 40 * GB, 2 * GB),
    "h100": Traits("h100", "an H100 of 80 GB", "cuda", 80 * GB, 80 * GB, 2 * GB),
    "h200": Traits("h200", "an H200 of 141 GB", "cuda", 141 * GB, 141 * GB, 2 * GB),
}
"""Cards that can be planned for without having one; what torch takes of the host there is assumed."""
