"""One line on a terminal that tells how far a merge is."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TextIO

from tvfast.cli.quantities import bytes_as_text, seconds_as_text

_INTERVAL_S = 0.1
_WARM_UP_S = 0.5  # before that a rate says nothing


class TerminalProgress:
    """Bytes read and written, rate and time left; methods may be called from any thread.

    Nothing is printed where the stream is no terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._lock = threading.Lock()
        self._read = self._written = self._read_total = self._write_total = 0
        self._started = self._next = 0.0
        self._width = 0

    def start(self, read_bytes: int, write_bytes: int) -> None:
        """The whole work; the clock starts."""
        with self._lock:
            self._read_total, self._write_total = read_bytes, write_bytes
            self._started = self._next = time.monotonic()

    def read(self, n_bytes: int) -> None:
        """Some bytes were read."""
        with self._lock:
            self._read += n_bytes
            self._update()

    def wrote(self, n_bytes: int) -> None:
        """Some bytes were written."""
        with self._lock:
            self._written += n_bytes
            self._update()

    def finish(self) -> None:
        """Clear the line; safe to call twice, and without a start."""
        with self._lock:
            if self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()
            self._width = 0
            self._shown = False

    def line(self, now: float) -> str:
        """The text at a time of the monotonic clock."""
        seconds = now - self._started
        done, total = self._read + self._written, self._read_total + self._write_total
        parts = [
            f"read {bytes_as_text(self._read)} of {bytes_as_text(self._read_total)}",
            f"written {bytes_as_text(self._written)} of {bytes_as_text(self._write_total)}",
        ]
        if seconds >= _WARM_UP_S and done:
            rate = done / seconds
            parts.append(f"{rate / 1e9:.2f} GB/s")
            parts.append(f"{seconds_as_text(max(0, total - done) / rate)} left")
        return ", ".join(parts)

    def _room(self) -> int:
        """Columns of the terminal, less one, so that the line does not wrap."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return (columns or 80) - 1  # a terminal that does not know its size says 0

    def _update(self) -> None:
        if not self._shown:
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _INTERVAL_S
        text = self.line(now)[: self._room()]
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)
