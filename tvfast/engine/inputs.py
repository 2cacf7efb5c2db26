"""Reading: many large requests in flight, from files that must stay as they were when planned."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tvfast.engine.memory import PAGE, Buffer
from tvfast.errors import MergeError

REQUEST = 4 * 2**20
"""Bytes of one read. Smaller ones cost calls, larger ones leave threads idle at the end of a tensor."""

N_READERS = 8
"""Reads in flight; a virtio disk is saturated by four, NVMe wants more."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive bytes of one file and where in a block they go: `at` equals `offset` modulo the page."""

    path: str
    offset: int
    n_bytes: int
    at: int


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells that a file is still the one that was planned with."""

    n_bytes: int
    mtime_ns: int

    @staticmethod
    def of(status: os.stat_result) -> FileState:
        return FileState(status.st_size, status.st_mtime_ns)


class Inputs:
    """The input files of a merge, opened once each and never written.

    Args:
        files: the state of every file when its header was read.
        direct: read past the page cache, for inputs that do not fit into it anyway.
        on_read: called with the bytes of each finished request, from any thread.
    """

    def __init__(
        self, files: Mapping[str, FileState], *, direct: bool, on_read: Callable[[int], None]
    ) -> None:
        self._files = files
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._on_read = on_read
        self._descriptors: dict[str, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._readers = ThreadPoolExecutor(N_READERS, "tvfast-read")

    def read(self, extents: Sequence[Extent], block: Buffer) -> list[Future[None]]:
        """Start to fill a block; the data is there when every future is done."""
        futures = []
        for extent in extents:
            begin, end = extent.offset, extent.offset + extent.n_bytes
            while begin < end:
                stop = min(end, (begin // REQUEST + 1) * REQUEST)  # at pages of the file, for direct reads
                piece = Extent(extent.path, begin, stop - begin, extent.at + begin - extent.offset)
                futures.append(self._readers.submit(self._read, piece, block))
                begin = stop
        return futures

    def stop(self) -> None:
        """Let every read that has not begun fail, so that those who wait for one end soon."""
        self._stopped = True

    def check(self) -> None:
        """Raise unless every file is still as planned.

        Raises:
            MergeError: a file was changed, replaced or removed.
        """
        for path, state in self._files.items():
            try:
                found = FileState.of(os.stat(path))
            except OSError as error:
                raise MergeError(f"{path}: input is gone ({error.strerror}). {_AGAIN}") from error
            _same(path, state, found)

    def close(self) -> None:
        """Stop reading and close every file."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        for descriptor, _ in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, path: str) -> tuple[int, bool]:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = self._open_one(path)
                except OSError as error:
                    raise MergeError(
                        f"{path}: input cannot be opened ({error.strerror}). {_AGAIN}"
                    ) from error
            return self._descriptors[path]

    def _open_one(self, path: str) -> tuple[int, bool]:
        flags = os.O_RDONLY | os.O_CLOEXEC
        direct = self._direct
        try:
            descriptor = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError:
            if not direct:
                raise
            direct = False  # the file system has no direct reads
            descriptor = os.open(path, flags)
        _same(path, self._files[path], FileState.of(os.fstat(descriptor)))
        return descriptor, direct

    def _read(self, piece: Extent, block: Buffer) -> None:
        if self._stopped:
            raise MergeError("stopped")
        descriptor, direct = self._open(piece.path)
        begin, end, at = piece.offset, piece.offset + piece.n_bytes, piece.at
        if direct:  # whole pages; the bytes around the piece belong to this extent's own pages
            at -= begin % PAGE
            begin -= begin % PAGE
            last = -(-end // PAGE) * PAGE
        else:
            last = end
        done = begin
        while done < end:
            try:
                n = os.preadv(descriptor, [block.view[at + done - begin : at + last - begin]], done)
            except OSError as error:
                raise MergeError(
                    f"{piece.path}: reading at byte {done} failed ({error.strerror}). {_AGAIN}"
                ) from error
            if n == 0:
                raise MergeError(f"{piece.path}: ends at byte {done}, expected {end} or more. {_AGAIN}")
            done += n
            if direct and done < end and done % PAGE:
                done -= done % PAGE  # a short direct read ends anywhere; the next must start at a page
        self._on_read(piece.n_bytes)


_AGAIN = "What is merged so far is kept: restore the file and run again with --resume."


def _same(path: str, expected: FileState, found: FileState) -> None:
    if found != expected:
        what = (
            f"has {found.n_bytes} bytes, had {expected.n_bytes}"
            if found.n_bytes != expected.n_bytes
            else "was modified"
        )
        raise MergeError(
            f"{path}: input {what} since the merge was planned; the result would mix two versions. "
            "Run again with --overwrite."
        )
