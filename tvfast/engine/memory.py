"""The buffers of a merge: memory within a fixed budget, handed out in the order it is asked for."""

from __future__ import annotations

import ctypes
import mmap
import queue
import threading
from types import TracebackType
from typing import Protocol

from tvfast.ops.pages import ShownPages

PAGE = 4096


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple


class Buffer(Protocol):
    """Memory that someone lends: `address` is a multiple of `PAGE`, `pages` are those of files in it."""

    n_bytes: int
    address: int
    view: memoryview
    pages: ShownPages

    def release(self) -> None:
        """Give the memory back. Slices of `view` must not be used any more."""


class Ranges:
    """Which bytes of some memory are lent: the first range that fits.

    Several threads must ask one at a time, so that a large range gets its turn.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._free = [(0, n_bytes)]  # (begin, end), ascending
        self._changed = threading.Condition()

    def acquire(self, n_bytes: int) -> int:
        """Where a range of `n_bytes` begins; waits until there is one.

        Raises:
            ValueError: more than all of the memory.
        """
        if n_bytes > self.n_bytes:
            raise ValueError(f"a range of {n_bytes} bytes was asked of {self.n_bytes}")
        with self._changed:
            while True:
                for index, (begin, end) in enumerate(self._free):
                    if end - begin >= n_bytes:
                        self._free[index] = (begin + n_bytes, end)
                        return begin
                self._changed.wait()

    def take_back(self, at: int, n_bytes: int) -> None:
        """End a loan; neighbouring free ranges become one."""
        with self._changed:
            ranges = sorted([*self._free, (at, at + n_bytes)])
            merged = ranges[:1]
            for begin, end in ranges[1:]:
                if begin == merged[-1][1]:
                    merged[-1] = (merged[-1][0], end)
                else:
                    merged.append((begin, end))
            self._free = merged
            self._changed.notify_all()


class Block:
    """A range of an arena; a context manager: leaving it gives the memory back."""

    def __init__(self, arena: Arena, at: int, n_bytes: int) -> None:
        self._arena = arena
        self._at = at
        self.n_bytes = n_bytes
        self.address = arena.address + at
        self.view = arena.view[at : at + n_bytes]
        self.pages = ShownPages(self.address, n_bytes)

    def release(self) -> None:
        self.pages.hide()
        self._arena._take_back(self._at, self.n_bytes)

    def drop(self, at: int) -> None:
        """Return the pages from `at` on to the system: they stand for memory that is taken elsewhere."""
        begin = self._at + round_up(at, PAGE)
        if begin < self._at + self.n_bytes:
            self._arena._map.madvise(mmap.MADV_DONTNEED, begin, self._at + self.n_bytes - begin)

    def __enter__(self) -> Block:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Arena:
    """One mapping of `n_bytes`, lent out in ranges, the first that fits.

    Every page is touched for the first time once: faults took a sixth of a merge that mapped memory anew.
    Several threads must ask one at a time, so that a large range gets its turn.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = round_up(max(n_bytes, 1), PAGE)
        # A shared mapping has no huge pages.
        self._map = mmap.mmap(-1, self.n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.view = memoryview(self._map)
        self._ranges = Ranges(self.n_bytes)

    def acquire(self, n_bytes: int) -> Block:
        """A range of at least `n_bytes`; waits until there is one. Its content is what was there.

        Raises:
            ValueError: more than the whole arena.
        """
        wanted = round_up(max(n_bytes, 1), PAGE)
        if wanted > self.n_bytes:
            raise ValueError(f"a block of {wanted} bytes was asked of an arena of {self.n_bytes}")
        return Block(self, self._ranges.acquire(wanted), wanted)

    def close(self) -> None:
        """Return the pages to the system, also where a view of them still lives."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _take_back(self, at: int, n_bytes: int) -> None:
        self._ranges.take_back(at, n_bytes)


class Slot:
    """A part of a block."""

    def __init__(self, slots: Slots, block: Block, at: int, n_bytes: int) -> None:
        self._slots = slots
        self.n_bytes = n_bytes
        self.address = block.address + at
        self.view = block.view[at : at + n_bytes]
        self.pages = ShownPages(self.address, n_bytes)

    def release(self) -> None:
        self.pages.hide()
        self._slots._free.put(self)


class Slots:
    """Equal parts of one block, each lent to one user at a time."""

    def __init__(self, block: Block, n_slots: int) -> None:
        size = block.n_bytes // n_slots // PAGE * PAGE
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for k in range(n_slots):
            self._free.put(Slot(self, block, k * size, size))

    def acquire(self) -> Slot:
        """A free part; waits for one."""
        return self._free.get()
