"""Device memory that outlives the call that made it: used on other streams, and given back after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.strategies import Part, table_of
from tvfast.ops.cuda_memory import Home
from tvfast.ops.raw import Backend
from tvfast.program import Keep, RankQuery


class Stream:
    """Remembers what it waited for."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def record_event(self) -> object:
        return ("event", id(self))

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class Memory:
    """Remembers the streams that use it besides its own."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.streams.append(stream)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch's current stream, and whether it is being captured."""
    now: dict[str, Any] = {"stream": Stream(), "captured": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["captured"])
    return now


def test_another_stream_waits_for_the_memory_and_the_memory_for_it(current: dict[str, Any]) -> None:
    home, made_on = Home(torch.device("cuda", 1)), current["stream"]
    memory: Any = Memory()
    home.share([memory])
    assert (memory.streams, made_on.waited) == ([], [])
    other = current["stream"] = Stream()
    home.share([memory])  # type: ignore[list-item]
    assert (memory.streams, other.waited) == ([other], [made_on.record_event()])
    current["stream"], current["captured"] = Stream(), True
    home.share([memory])  # type: ignore[list-item]
    assert memory.streams == [other]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tables of CPU tensors are copied there")
def test_a_table_is_shared_whenever_it_is_used_again(gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[tuple[Any, ...]] = []

    class Counted(Home):
        def share(self, memory: Any) -> None:
            shared.append(tuple(memory))

    monkeypatch.setattr(f"tvfast.ops.{gpu.name}.Home", Counted)
    table = table_of([Part([torch.arange(90.0)]), Part([torch.arange(70.0).bfloat16()], group=1)])
    for n in (1, 2, 3):
        gpu.thresholds(table, Keep.BAND, [RankQuery(0, 0, 5)])
        assert len(shared) == n
    assert all(isinstance(one, torch.Tensor) for one in shared[0])
    assert [one.data_ptr() for one in shared[0]] == [one.data_ptr() for one in shared[2]]
