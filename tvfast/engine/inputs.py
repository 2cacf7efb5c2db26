"""Reading: many large requests in flight, from files that must stay as they were when planned."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from tvfast.engine.assembly import Assembly
from tvfast.engine.gather import Gather, Window
from tvfast.engine.gathering import Gatherer
from tvfast.engine.memory import PAGE, Buffer
from tvfast.engine.shown import Allowance
from tvfast.errors import MergeError

REQUEST = 4 * 2**20
"""Bytes of one read. Smaller ones cost calls, larger ones leave threads idle at the end of a tensor."""

N_READERS = 8
"""Reads in flight. A virtio disk gave 1.1 GB/s to two direct readers and 1.2 to eight."""

MAX_OPEN = 128
"""Input files that are open at a time; a family of large models has a thousand, a process may have fewer."""


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


@dataclass(slots=True)
class _Open:
    """One input file's descriptor."""

    descriptor: int
    direct: bool
    n_users: int = 0


class Inputs:
    """The input files of a merge, never written.

    Args:
        files: the state of every file when its header was read.
        direct: read past the page cache, for inputs that do not fit into it anyway.
        shown: what the page cache holds stands in a block instead of being read into it.
        matrices: bytes of whole matrices that may stand in memory besides, while rows are taken from them.
        on_read: called with the bytes of each finished request, from any thread.
    """

    def __init__(
        self,
        files: Mapping[str, FileState],
        *,
        direct: bool,
        on_read: Callable[[int], None],
        shown: bool = False,
        matrices: int = 0,
    ) -> None:
        self._files = files
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._shown = shown and not self._direct and mmap.PAGESIZE == PAGE
        self._allowance = Allowance(matrices if self._shown else 0)
        self._on_read = on_read
        self._open: OrderedDict[tuple[str, bool], _Open] = OrderedDict()  # used last at the end
        self._gatherers: dict[Gather, Gatherer] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._readers = ThreadPoolExecutor(N_READERS, "tvfast-read")

    def read(self, extents: Sequence[Extent], block: Buffer) -> list[Future[None]]:
        """Start to fill a block; the data is there when every future is done."""
        futures = []
        for extent in extents:
            if self._show(extent, block):
                continue
            begin, end = extent.offset, extent.offset + extent.n_bytes
            while begin < end:
                stop = min(end, (begin // REQUEST + 1) * REQUEST)  # at pages of the file, for direct reads
                piece = Extent(extent.path, begin, stop - begin, extent.at + begin - extent.offset)
                futures.append(self._readers.submit(self._read, piece, block))
                begin = stop
        return futures

    def gather(self, windows: Sequence[Window], block: Buffer) -> list[Future[None]]:
        """Start to gather rows into a block, as `read`."""
        return [
            self._readers.submit(self._gather, piece, block)
            for window in windows
            for piece in window.pieces()
        ]

    def assemble(self, assemblies: Sequence[Assembly], block: Buffer) -> list[Future[None]]:
        """Start to read tensors in pieces into a block, as `read`."""
        return [
            self._readers.submit(self._assemble, part, block)
            for assembly in assemblies
            for part in assembly.pieces()
        ]

    def stop(self) -> None:
        """Let every read that has not begun fail, so that those who wait for one end soon."""
        self._stopped = True

    def check_shown(self, extents: Sequence[Extent], block: Buffer) -> None:
        """Raise if what stood in a block was not there to the end of its use: zeros stand for what is lost.

        Raises:
            MergeError: a file was changed meanwhile, or its system could not read it again.
        """
        if not block.pages.n_shown:
            return
        for path in dict.fromkeys(extent.path for extent in extents):
            _check(path, self._files[path])
        if block.pages.lost:
            raise MergeError(f"an input cannot be read any more. {_AGAIN}")

    def check(self) -> None:
        """Raise unless every file is still as planned.

        Raises:
            MergeError: a file was changed, replaced or removed.
        """
        for path, state in self._files.items():
            _check(path, state)

    def close(self) -> None:
        """Stop reading and close every file."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        for gatherer in self._gatherers.values():
            gatherer.close()
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    @contextmanager
    def _borrowed(self, path: str, *, direct: bool) -> Iterator[_Open]:
        key = (path, direct)
        with self._lock:
            file = self._open.get(key)
            if file is None:
                try:
                    file = self._open[key] = self._open_one(path, direct)
                except OSError as error:
                    raise MergeError(
                        f"{path}: input cannot be opened ({error.strerror}). {_AGAIN}"
                    ) from error
            self._open.move_to_end(key)
            file.n_users += 1
            idle = [name for name, other in self._open.items() if not other.n_users]
            for name in idle[: max(0, len(self._open) - MAX_OPEN)]:
                os.close(self._open.pop(name).descriptor)
        try:
            yield file
        finally:
            with self._lock:
                file.n_users -= 1

    def _open_one(self, path: str, direct: bool) -> _Open:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError:
            if not direct:
                raise
            direct = False  # the file system has no direct reads
            descriptor = os.open(path, flags)
        try:
            _same(path, self._files[path], FileState.of(os.fstat(descriptor)))
        except BaseException:
            os.close(descriptor)
            raise
        return _Open(descriptor, direct)

    def _show(self, extent: Extent, block: Buffer) -> bool:
        if not self._shown or not extent.n_bytes or self._stopped:
            return False
        with self._borrowed(extent.path, direct=False) as file:
            if not block.pages.show(file.descriptor, extent.offset, extent.n_bytes, extent.at):
                return False
        self._on_read(extent.n_bytes)
        return True

    def _read(self, piece: Extent, block: Buffer) -> None:
        if self._stopped:
            raise MergeError("stopped")
        with self._borrowed(piece.path, direct=self._direct) as file:
            _fill(piece, block, file)
        self._on_read(piece.n_bytes)

    def _gather(self, piece: Window, block: Buffer) -> None:
        if self._stopped:
            raise MergeError("stopped")
        with self._lock:
            gatherer = self._gatherers.get(piece.gather)
            if gatherer is None:
                gatherer = Gatherer(
                    piece.gather, self._buffered, ahead=not self._direct, allowance=self._allowance
                )
                self._gatherers[piece.gather] = gatherer
        gatherer.fill(piece, block.address)
        self._on_read(piece.n_bytes)

    def _assemble(self, part: Assembly, block: Buffer) -> None:
        if self._stopped:
            raise MergeError("stopped")
        part.fill(block.view, self._buffered)
        self._on_read(part.n_bytes)

    @contextmanager
    def _buffered(self, path: str) -> Iterator[int]:
        """A descriptor for reads of any size; rows are no pages."""
        with self._borrowed(path, direct=False) as file:
            yield file.descriptor


def _fill(piece: Extent, block: Buffer, file: _Open) -> None:
    """Read one piece.

    Raises:
        MergeError: the file ends before it, or the system cannot read it.
    """
    begin, end, at = piece.offset, piece.offset + piece.n_bytes, piece.at
    direct = file.direct
    if direct:  # whole pages; the bytes around the piece belong to this extent's own pages
        at -= begin % PAGE
        begin -= begin % PAGE
        last = -(-end // PAGE) * PAGE
    else:
        last = end
    done = begin
    while done < end:
        try:
            n = os.preadv(file.descriptor, [block.view[at + done - begin : at + last - begin]], done)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:  # opened so, but not read so, by this file system
                flags = fcntl.fcntl(file.descriptor, fcntl.F_GETFL)
                fcntl.fcntl(file.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                direct = False
                continue
            raise MergeError(
                f"{piece.path}: reading at byte {done} failed ({error.strerror}). {_AGAIN}"
            ) from error
        # A short direct read ends anywhere, and the next must start at a page; less than one is the end.
        whole = n - n % PAGE if direct and done + n < end else n
        if whole == 0:
            raise MergeError(f"{piece.path}: ends at byte {done + n}, expected {end} or more. {_AGAIN}")
        done += whole


_AGAIN = "What is merged so far is kept: restore the file and run again with --resume."


def _check(path: str, expected: FileState) -> None:
    try:
        found = FileState.of(os.stat(path))
    except OSError as error:
        raise MergeError(f"{path}: input is gone ({error.strerror}). {_AGAIN}") from error
    _same(path, expected, found)


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
