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


class Allowance:
    """How many bytes of files may stand in memory of their own at a time."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> bool:
        """Whether so many more may; they count until they are given back."""
        with self._lock:
            if n_bytes > self._left:
                return False
            self._left -= n_bytes
            return True

    def give_back(self, n_bytes: int) -> None:
        with self._lock:
            self._left += n_bytes


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
        if pages.show(descriptor, offset, n_bytes, at):
            return standing
        standing.close()
        return None

    @property
    def lost(self) -> bool:
        """Whether some of them could not be read any more: the file was shortened."""
        return self._pages.lost

    def close(self) -> None:
        self._pages.hide()
        self._memory.close()


def resident_bytes(offset: int, n_bytes: int) -> int:
    """What bytes of a file take in memory, with their neighbours in the same pages."""
    return round_up(offset % PAGE + n_bytes, PAGE)


class Matrices:
    """The matrices of one gather, for several threads.

    They stand in memory from their first use until all rows are taken.

    Args:
        sources: where they are.
        n: elements that are taken from each of them, in all.
        borrow: opens their files.
        allowance: shared with other gathers.
    """

    def __init__(self, sources: Sequence[Stored], n: int, borrow: Borrow, allowance: Allowance) -> None:
        self._sources = sources
        self._n = n
        self._borrow = borrow
        self._allowance = allowance
        self._lock = threading.Lock()
        self._n_users = 0
        self._forget()

    @contextmanager
    def standing(self, n: int) -> Iterator[Sequence[Standing | None]]:
        """Each matrix, or None where it has to be read, while `n` elements are taken from each."""
        with self._lock:
            for k in range(len(self._sources)):
                if not self._asked[k]:
                    self._show(k)
            self._n_users += 1
            found = tuple(self._found)
        try:
            yield found
        finally:
            with self._lock:
                self._n_users -= 1
                self._n_left -= n
                if self._n_left <= 0 and not self._n_users:
                    self._hide()

    def close(self) -> None:
        """Nobody uses them any more."""
        with self._lock:
            self._hide()

    def _show(self, k: int) -> None:
        """Try again when others have given back what they had; what is not in the page cache is read."""
        stored = self._sources[k]
        n_bytes = resident_bytes(stored.offset, stored.n_bytes)
        if not self._allowance.take(n_bytes):
            return
        self._asked[k] = True
        try:
            with self._borrow(stored.path) as descriptor:
                self._found[k] = Standing.made(descriptor, stored.offset, stored.n_bytes)
        finally:
            if self._found[k] is None:
                self._allowance.give_back(n_bytes)

    def _hide(self) -> None:
        for stored, standing in zip(self._sources, self._found, strict=True):
            if standing is not None:
                standing.close()
                self._allowance.give_back(resident_bytes(stored.offset, stored.n_bytes))
        self._forget()

    def _forget(self) -> None:
        self._found: list[Standing | None] = [None] * len(self._sources)
        self._asked = [False] * len(self._sources)
        self._n_left = self._n
