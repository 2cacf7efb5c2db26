"""A GPU through torch: streams, events, and one allocation as the ring. Imported only where a GPU is used."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from tvfast.engine.device import OutOfDeviceMemory, Ticket, Traits, Transfer
from tvfast.errors import BackendError, MergeError, TvfastError
from tvfast.ops.raw import Backend, ResumableBackend, backend_for, backend_statuses
from tvfast.program import DType, Entry, View, WorkTable

DTYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}

HOST_BYTES = 256 * 2**20
"""What kernels that are loaded later add to the resident memory; an assumption, not yet seen on a device."""


def find(index: int) -> TorchDevice:
    """One GPU.

    Raises:
        BackendError: torch has no such GPU, or no backend can run on it.
    """
    name = f"cuda:{index}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds no GPU" if built else f"torch {torch.__version__} was built without CUDA"
        raise BackendError(f"device {name!r}: {why}. Pass --device cpu, or run `tvfast doctor`.")
    count = torch.cuda.device_count()
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise BackendError(f"device {name!r} does not exist; found {count} GPU(s), expected {there}.")
    device = torch.device("cuda", index)
    with _named(name):
        backend = _backend_on(device, name)
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    traits = Traits(
        name=name,
        description=torch.cuda.get_device_name(device),
        backend=backend.name,
        total_bytes=total,
        free_bytes=free + kept,
        host_bytes=_resident_bytes() + HOST_BYTES,
        resumable=isinstance(backend, ResumableBackend),
    )
    return TorchDevice(device, traits, backend)


class Event:
    """A point of a stream."""

    def __init__(self, name: str, stream: torch.cuda.Stream) -> None:
        self._name = name
        # Blocking: waiting takes no core from those that read and write.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        with _named(self._name):
            self.event.synchronize()


class _Computed:
    """The ticket of a computation: its event exists when the computation was put into its queue."""

    event: Event | None = None

    def wait(self) -> None:
        if self.event is not None:
            self.event.wait()


class TorchDevice:
    """`engine.device.Device` on one GPU."""

    def __init__(self, device: torch.device, traits: Traits, backend: Backend) -> None:
        self.traits = traits
        self.backend = backend
        self._device = device
        with _named(traits.name):
            streams = (torch.cuda.Stream(device) for _ in range(3))  # type: ignore[no-untyped-call]
            self._uploads, self._computations, self._downloads = streams
        self._ring: Tensor | None = None
        self._host: Tensor | None = None
        self._address = 0
        self._fraction = 1.0

    def open(self, address: int, n_bytes: int, ring_bytes: int, limit_bytes: int) -> None:
        name, cuda = self.traits.name, torch.cuda
        with _named(name):
            self._fraction = cuda.get_per_process_memory_fraction(self._device)
            cuda.reset_peak_memory_stats(self._device)
            held = cuda.memory_allocated(self._device)
            share = min(1.0, (held + limit_bytes) / self.traits.total_bytes)
            cuda.set_per_process_memory_fraction(share, self._device)
            runtime = cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(runtime.cudaHostRegister(address, n_bytes, 0))
        if code:
            cuda.set_per_process_memory_fraction(self._fraction, self._device)
            raise MergeError(
                f"{name}: {n_bytes} bytes of host memory cannot be pinned (CUDA error {code}). "
                "Lower --memory, or pass --device cpu."
            )
        memory = (ctypes.c_uint8 * n_bytes).from_address(address)
        self._host, self._address = torch.frombuffer(memory, dtype=torch.uint8), address
        try:
            with _named(name):
                self._ring = torch.empty(ring_bytes, dtype=torch.uint8, device=self._device)
                cuda.synchronize(self._device)
        except BaseException as error:
            self.close()
            if not isinstance(error, OutOfDeviceMemory):
                raise
            raise MergeError(
                f"{name}: a ring of {ring_bytes} bytes was planned, of which {self.traits.free_bytes} bytes "
                "were free; they are no more. Free the device's memory, or lower --device-memory."
            ) from error

    def view(self, at: int, n_elements: int, dtype: DType) -> View:
        kind = DTYPES[dtype]
        owner = self._slice(at, n_elements * kind.itemsize).view(kind)
        return View(owner.data_ptr(), n_elements, dtype, owner)

    def plane(self, at: int, n_bits: int) -> View:
        words = self._slice(at, (n_bits + 63) // 64 * 8).view(torch.int64)
        words.zero_()
        return View(words.data_ptr(), n_bits, DType.F32, words)

    def upload(self, transfers: Sequence[Transfer]) -> Ticket:
        with _named(self.traits.name), torch.cuda.stream(self._uploads):
            for one in transfers:
                self._slice(one.at, one.n_bytes).copy_(self._pinned(one), non_blocking=True)
            return Event(self.traits.name, self._uploads)

    @contextmanager
    def compute(self, after: Ticket) -> Iterator[Ticket]:
        done = _Computed()
        with _named(self.traits.name), torch.no_grad(), torch.cuda.stream(self._computations):
            self._follow(self._computations, after)
            yield done
            done.event = Event(self.traits.name, self._computations)

    def download(self, transfers: Sequence[Transfer], after: Ticket) -> Ticket:
        with _named(self.traits.name), torch.cuda.stream(self._downloads):
            self._follow(self._downloads, after)
            for one in transfers:
                self._pinned(one).copy_(self._slice(one.at, one.n_bytes), non_blocking=True)
            return Event(self.traits.name, self._downloads)

    def drain(self) -> None:
        gc.collect()  # an error's frames may hold tensors in a cycle
        with suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def close(self) -> None:
        self.drain()
        self._ring = None
        if self._host is not None:
            self._host = None
            with suppress(RuntimeError):
                runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                runtime.cudaHostUnregister(self._address)
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(self._fraction, self._device)

    def _slice(self, at: int, n_bytes: int) -> Tensor:
        assert self._ring is not None
        return self._ring[at : at + n_bytes]

    def _pinned(self, transfer: Transfer) -> Tensor:
        assert self._host is not None
        at = transfer.address - self._address
        return self._host[at : at + transfer.n_bytes]

    @staticmethod
    def _follow(stream: torch.cuda.Stream, after: Ticket) -> None:
        event = after.event if isinstance(after, _Computed) else after
        assert isinstance(event, Event)
        stream.wait_event(event.event)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of torch as errors of a merge, which name the device."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(f"{name}: {_first_line(error)}") from error
    except TvfastError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise MergeError(
            f"{name}: {_first_line(error)}. What is merged so far is kept: run again with --resume, or with "
            "--resume --device cpu."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _backend_on(device: torch.device, name: str) -> Backend:
    """Who merges there; the reference only where it is forced, since its scratch has no bound.

    Raises:
        BackendError: with the reason of every other.
    """
    tensor = torch.zeros(16, dtype=torch.float32, device=device)
    view = View(tensor.data_ptr(), 16, DType.F32, tensor)
    backend = backend_for(WorkTable([Entry(name="probe", models=(view,), base=view, out=view)], 1))
    if backend.name == "reference" and os.environ.get("TVFAST_BACKEND") != "reference":
        reasons = [f"{one.name}: {one.detail}" for one in backend_statuses() if not one.usable]
        raise BackendError(
            f"device {name!r}: no backend can run there ({'; '.join(reasons) or 'none is built'}). "
            "Pass --device cpu, or run `tvfast doctor`."
        )
    return backend


def _resident_bytes() -> int:
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
