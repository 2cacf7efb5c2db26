"""The line on a terminal: what it says, how often, and that nothing is printed elsewhere."""

from __future__ import annotations

import io
import threading

import pytest

from tvfast.cli import progress as module
from tvfast.cli.progress import TerminalProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_it_is_quiet_when_the_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    progress.start(100, 10)
    progress.read(100)
    progress.wrote(10)
    progress.finish()
    assert stream.getvalue() == ""


def test_bytes_rate_and_time_left(clock: Clock) -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress.start(8_000_000_000, 2_000_000_000)
    clock.now += 2.0
    progress.read(4_000_000_000)
    assert stream.getvalue().endswith(
        "read 4.00 GB of 8.00 GB, written 0 B of 2.00 GB, 2.00 GB/s, 3.00 s left"
    )
    clock.now += 2.0
    progress.wrote(1_000_000_000)
    assert "written 1.00 GB of 2.00 GB, 1.25 GB/s, 4.00 s left" in stream.getvalue()


def test_at_most_ten_updates_a_second(clock: Clock) -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress.start(1000, 0)
    for _ in range(1000):
        clock.now += 0.001
        progress.read(1)
    assert 9 <= stream.getvalue().count("\r") <= 11


def test_finish_clears_the_line_once(clock: Clock) -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress.finish()  # before anything started
    assert stream.getvalue() == ""
    progress = TerminalProgress(stream)
    progress.start(10, 10)
    progress.read(10)
    shown = stream.getvalue()
    progress.finish()
    progress.finish()
    progress.read(1)
    width = len(shown) - 1
    assert stream.getvalue() == shown + "\r" + " " * width + "\r"


def test_a_line_never_wraps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    monkeypatch.setattr(TerminalProgress, "_room", lambda self: 20)
    progress.start(10**12, 10**12)
    clock.now += 5
    progress.read(10**10)
    assert len(stream.getvalue().lstrip("\r")) == 20


def test_many_threads_lose_no_byte(clock: Clock) -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress.start(4000, 4000)

    def work() -> None:
        for _ in range(1000):
            progress.read(1)
            progress.wrote(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.line(clock.now) == "read 4.00 KB of 4.00 KB, written 4.00 KB of 4.00 KB"
