"""Pages of files in the place of memory: what the page cache holds is shown there, not copied."""

from __future__ import annotations

import mmap

import tvfast._C_cpu as _C_cpu

PAGE = mmap.PAGESIZE


class ShownPages:
    """The files that stand in `n_bytes` of private memory at `address`, a multiple of `PAGE`.

    One thread at a time shows, hides and forgets; nobody uses the memory meanwhile.
    """

    def __init__(self, address: int, n_bytes: int) -> None:
        self._address, self._n_bytes = address, n_bytes
        self._shown: list[tuple[int, int]] = []  # address, bytes
        self._guard = -1

    def show(self, descriptor: int, offset: int, n_bytes: int, at: int) -> bool:
        """Let `n_bytes` of a file stand at `at`, with their neighbours in the same pages.

        False where the page cache does not hold them all, or the system cannot tell: they have to be read.
        `at` equals `offset` modulo the page. Writing to the memory leaves the file as it is.
        """
        if self._guard < 0:
            self._guard = int(_C_cpu.guard_pages(self._address, self._n_bytes))
            if self._guard < 0:
                return False
        before = offset % PAGE
        begin, size = self._address + at - before, -(-(before + n_bytes) // PAGE) * PAGE
        if not _C_cpu.show_pages(begin, size, descriptor, offset - before):
            return False
        self._shown.append((begin, size))
        return True

    @property
    def lost(self) -> bool:
        """Whether a page that was shown could not be read any more: its file was shortened. It has zeros."""
        return self._guard >= 0 and bool(_C_cpu.lost_pages(self._guard))

    @property
    def n_shown(self) -> int:
        """How often something was shown since the memory was hidden."""
        return len(self._shown)

    def hide(self) -> None:
        """Make it memory again, whose content is nothing in particular."""
        while self._shown:
            _C_cpu.hide_pages(*self._shown.pop())
        self.forget()

    def forget(self) -> None:
        """The memory itself is given back next: nobody looks after it any more."""
        self._shown.clear()
        if self._guard >= 0:
            _C_cpu.end_guard(self._guard)
            self._guard = -1
