"""Matrices of files that stand in memory while rows are taken from them, no more than are allowed."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from tvfast.checkpoint.stored import Stored
from tvfast.engine.memory import round_up
from tvfast.ops.pages import PAGE, ShownPages

Borrow = Callable[[str], AbstractContextManager[int]]
"""A descriptor of an input file, open for buffered reading."""


class Standing:
    """Bytes of a file in memory of their own; the first of them is at `address`."""

    def __init__(self, memory: mmap.mmap, pages: ShownPages, address: int) -> None:
        self._memory, self._pages = memory, pages
        self.address = address

    @staticmethod
    def made(descriptor: int, offset: int, n_bytes: int) -> Standing | None:
        """None where the page cache does not hold all of them, or no memory can be had."""
        size = resident_bytes(offset, n_bytes)
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return None
        begin, at = ctypes.addressof(ctypes.c_char.from_buffer(memory)), offset % PAGE
        pages = ShownPages(begin, size)
        standing = Standing(memory, pages, begin + at)
        shown = False
        try:
            shown = pages.show(descriptor, offset, n_bytes, at)
        finally:
            if not shown:
                standing.close()
        return standing if shown else None

    @property
    def lost(self) -> bool:
        """Whether some of them could not be read any more: the file was shortened."""
        return self._pages.lost

    def close(self) -> None:
        self._pages.forget()
        self._memory.close()


def resident_bytes(offset: int, n_bytes: int) -> int:
    """What bytes of a file take in memory, with their neighbours in the same pages."""
    return round_up(offset % PAGE + n_bytes, PAGE)


class Allowance:
    """How many bytes of files may stand in memory of their own at a time.

    Attributes:
        left: bytes that nobody has taken.
        lock: is held by who takes and gives back.
    """

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes
        self.lock = threading.Lock()
        self._most = n_bytes
        self._holders: list[Matrices] = []

    def take(self, n_bytes: int, holder: Matrices) -> bool:
        """Whether so many more may, after others that are idle have given back theirs."""
        if n_bytes > self._most:
            return False
        for other in list(self._holders):
            if n_bytes > self.left and other is not holder and not other.n_users:
                other.hide()
        if n_bytes > self.left:
            return False
        self.left -= n_bytes
        if holder not in self._holders:
            self._holders.append(holder)
        return True

    def give_back(self, n_bytes: int) -> None:
        """They do not stand in memory any more."""
        self.left += n_bytes


class Matrices:
    """The matrices of one gather, for several threads.

    They stand in memory from their first use until others need the room, or nobody takes rows any more.

    Args:
        sources: where they are.
        borrow: opens their files.
        allowance: shared with other gathers.

    Attributes:
        n_users: threads that take rows.
    """

    def __init__(self, sources: Sequence[Stored], borrow: Borrow, allowance: Allowance) -> None:
        self.n_users = 0
        self._sources = sources
        self._borrow = borrow
        self._allowance = allowance
        self._found: list[Standing | None] = [None] * len(sources)
        self._cached = [True] * len(sources)  # as far as anybody knows

    @contextmanager
    def standing(self) -> Iterator[Sequence[Standing | None]]:
        """Each matrix, or None where it has to be read."""
        with self._allowance.lock:
            for k in range(len(self._sources)):
                if self._found[k] is None and self._cached[k]:
                    self._show(k)
            self.n_users += 1
            found = tuple(self._found)
        try:
            yield found
        finally:
            with self._allowance.lock:
                self.n_users -= 1

    def close(self) -> None:
        """Nobody takes rows any more."""
        with self._allowance.lock:
            self.hide()

    def hide(self) -> None:
        """With the allowance's lock held, where nobody takes rows."""
        for k, standing in enumerate(self._found):
            if standing is not None:
                self._found[k] = None
                self._allowance.give_back(self._n_bytes(k))
                standing.close()

    def _show(self, k: int) -> None:
        """Let a matrix stand in memory if it is allowed and the page cache holds it, which is asked once."""
        n_bytes = self._n_bytes(k)
        if not self._allowance.take(n_bytes, self):
            return
        try:
            stored = self._sources[k]
            with self._borrow(stored.path) as descriptor:
                self._found[k] = Standing.made(descriptor, stored.offset, stored.n_bytes)
        finally:
            if self._found[k] is None:
                self._cached[k] = False
                self._allowance.give_back(n_bytes)

    def _n_bytes(self, k: int) -> int:
        return resident_bytes(self._sources[k].offset, self._sources[k].n_bytes)
