"""`TorchDevice` where there is no GPU: a stand-in for `torch.cuda` whose memory and streams are the CPU's."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tvfast.engine import torch_device
from tvfast.engine.device import OutOfDeviceMemory, Transfer
from tvfast.engine.torch_device import TorchDevice, find
from tvfast.errors import BackendError, MergeError
from tvfast.ops.raw import Backend, BackendStatus
from tvfast.program import DType, View


class Stream:
    """Remembers what was put into it."""

    def __init__(self, device: torch.device) -> None:
        self.log: list[str] = []

    def wait_event(self, event: Event) -> None:
        self.log.append(f"wait {event.stream.log[-1] if event.stream else 'nothing'}")


class Event:
    """Of a stream; synchronising fails where the stand-in was told so."""

    failure: str | None = None

    def __init__(self, blocking: bool) -> None:
        assert blocking
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.log.append("event")

    def synchronize(self) -> None:
        if Event.failure:
            raise RuntimeError(Event.failure)


class Runtime:
    """The CUDA runtime's pins."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.code = 0

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        if not self.code:
            self.pinned[address] = n_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """One GPU of 1 MB that torch believes in; the reference is forced to run there."""
    runtime = Runtime()
    fraction = [1.0]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        chosen.log.append("work")
        yield

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda device: (900_000, 1_000_000),
        "memory_reserved": lambda device: 150_000,
        "memory_allocated": lambda device: 100_000,
        "max_memory_allocated": lambda device: 123_456,
        "reset_peak_memory_stats": lambda device: None,
        "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        "get_per_process_memory_fraction": lambda device: fraction[0],
        "set_per_process_memory_fraction": lambda share, device: fraction.__setitem__(0, share),
        "cudart": lambda: runtime,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "device", lambda kind, index=0: "cpu")
    monkeypatch.setattr(Event, "failure", None)
    monkeypatch.setenv("TVFAST_BACKEND", "reference")
    yield runtime
    assert not runtime.pinned, "pins were left"
    assert fraction == [1.0], "the limit was left"


@pytest.fixture
def host() -> Iterator[int]:
    memory = mmap.mmap(-1, 8192)
    view = (ctypes.c_uint8 * 8192).from_buffer(memory)
    yield ctypes.addressof(view)
    del view
    memory.close()


def opened(host: int) -> TorchDevice:
    device = find(0)
    device.open(host, 8192, 4096, 5000)
    return device


def test_bytes_go_there_are_merged_and_come_back(cuda: Runtime, host: int) -> None:
    device = opened(host)
    assert cuda.pinned == {host: 8192}
    assert device.traits.free_bytes == 900_000 + 50_000, "what torch keeps unused counts as free"
    assert torch.cuda.get_per_process_memory_fraction(None) == pytest.approx(0.105)
    ctypes.memmove(host + 100, bytes(range(64)), 64)
    uploaded = device.upload([Transfer(host + 100, 256, 64)])
    with device.compute(uploaded) as computed:
        view = device.view(256, 32, DType.BF16)
        assert (view.owner.dtype, view.n_elements, view.address) == (
            torch.bfloat16,
            32,
            view.owner.data_ptr(),
        )
        plane = device.plane(512, 70)
        assert (plane.owner.dtype, plane.owner.tolist()) == (torch.int64, [0, 0])
        view.owner.view(torch.uint8).add_(1)
    device.download([Transfer(host + 4000, 256, 64)], computed).wait()
    assert ctypes.string_at(host + 4000, 64) == bytes(range(1, 65))
    assert device.peak_bytes() == 123_456
    streams: list[Any] = [device._uploads, device._computations, device._downloads]
    # each queue runs its own work in order, after the event of the one before it
    assert [one.log for one in streams] == [
        ["work", "event"],
        ["work", "wait event", "event"],
        ["work", "wait event", "event"],
    ]
    device.close()


def test_failures_name_the_device_and_say_how_to_go_on(cuda: Runtime, host: int) -> None:
    device = opened(host)
    uploaded = device.upload([])
    short = pytest.raises(OutOfDeviceMemory, match=r"cuda:0: CUDA out of memory. Tried to allocate 2 GiB")
    with short, device.compute(uploaded):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    broken = pytest.raises(MergeError, match=r"cuda:0: an illegal access. What is merged so far is kept: run")
    with broken, device.compute(uploaded):
        raise RuntimeError("an illegal access.\nCompile with DSA")
    with pytest.raises(MergeError, match="stopped"), device.compute(uploaded):
        raise MergeError("stopped")
    Event.failure = "unspecified launch failure"
    with pytest.raises(MergeError, match=r"cuda:0: unspecified launch failure.*--resume --device cpu"):
        uploaded.wait()
    device.drain()
    device.close()


def test_memory_that_cannot_be_pinned_is_named(cuda: Runtime, host: int) -> None:
    cuda.code = 2
    with pytest.raises(MergeError, match=r"cuda:0: 8192 bytes of host memory cannot be pinned \(CUDA er"):
        opened(host)


def test_a_ring_that_is_no_longer_free_is_named(
    cuda: Runtime, host: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = find(0)

    def none_left(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", none_left)
    with pytest.raises(MergeError, match=r"a ring of 4096 bytes was planned, of which 950000 .* no more"):
        device.open(host, 8192, 4096, 5000)


def test_a_gpu_that_does_not_exist_is_named(cuda: Runtime) -> None:
    with pytest.raises(BackendError, match=r"device 'cuda:9' does not exist; found 1 GPU\(s\), exp"):
        find(9)


def test_the_reference_runs_there_only_where_it_is_asked_for(
    cuda: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(0).traits.backend == "reference"
    chosen: list[Backend] = [find(0).backend]
    monkeypatch.delenv("TVFAST_BACKEND")
    monkeypatch.setattr(torch_device, "backend_for", lambda table: chosen[0])
    statuses = [BackendStatus("triton", False, "no triton"), BackendStatus("cpp", True, "")]
    monkeypatch.setattr(torch_device, "backend_statuses", lambda: statuses)
    with pytest.raises(BackendError, match=r"device 'cuda:0': no backend can run there \(triton: no triton"):
        find(0)


def test_torch_without_cuda_is_named() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    with pytest.raises(BackendError, match=r"device 'cuda:1': torch .* was built without CUDA. Pass"):
        find(1)


def test_views_are_of_the_ring(cuda: Runtime, host: int) -> None:
    device = opened(host)
    found: list[View] = [device.view(16 * k, 4, dtype) for k, dtype in enumerate(DType)]
    assert [view.owner.element_size() for view in found] == [4, 2, 2]
    assert [view.address - found[0].address for view in found] == [0, 16, 32]
    device.close()
