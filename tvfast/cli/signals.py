"""SIGINT and SIGTERM as exceptions, so that a run unwinds, releases its lock and says how it goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Stopped(KeyboardInterrupt):
    """The command was stopped from outside; its text is the message, `status` the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def stoppable(how_to_continue: str) -> Iterator[None]:
    """Turns SIGINT and SIGTERM within the block into `Stopped`.

    Args:
        how_to_continue: second half of the message.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"terminated; {how_to_continue}", TERMINATED)

    # only the main thread may set handlers; elsewhere the signal is not ours to treat
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    except Stopped:
        raise
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; {how_to_continue}", INTERRUPTED) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
