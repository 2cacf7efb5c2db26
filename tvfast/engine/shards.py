"""The staged files of an output: allocated, and written past the page cache where that works."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tvfast.checkpoint.layout import Layout
from tvfast.engine.durable import allocate, free_bytes, output_error, sync_data, write_fully
from tvfast.engine.memory import PAGE, round_up
from tvfast.errors import OutputError

PIECE_BYTES = 16 * 2**20
"""Longest single write: long enough for full speed, short enough that threads share the device."""

MIN_DIRECT_BYTES = 256 * 2**10
"""Shorter ranges go through the page cache: a direct write waits for the device."""

MAX_OPEN = 64
"""Shards that are open at a time, with up to two descriptors each; processes may have 1024 in all."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)


class _Open:
    """Descriptors of one shard's file."""

    __slots__ = ("buffered", "direct", "n_users", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.buffered = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.direct = -1
        self.n_users = 0

    def close(self) -> None:
        for fd in (self.direct, self.buffered):
            if fd >= 0:
                os.close(fd)


class ShardFiles:
    """The files of `layout` in `folder`.

    `lost(shard)` is called when the system may have dropped bytes that it had accepted: nothing of that shard
    can be taken as finished any more.
    """

    def __init__(self, folder: str, layout: Layout, lost: Callable[[int], None]) -> None:
        self._folder = folder
        self._layout = layout
        self._lost = lost
        self._direct = _O_DIRECT != 0
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def path(self, shard: int) -> str:
        return os.path.join(self._folder, self._layout.shards[shard].name)

    def check_room(self, spare_bytes: int) -> int:
        """How many bytes the files still need on the disk, with `spare_bytes` more; changes nothing.

        Raises:
            OutputError: there is no room for them.
        """
        needed = sum(self._missing_bytes(shard) for shard in range(len(self._layout.shards))) + spare_bytes
        free = free_bytes(self._folder)
        if free is not None and needed > free:
            raise self._no_room(needed, free)
        return needed

    def prepare(self, spare_bytes: int) -> None:
        """Makes or completes every file: its size, blocks on the disk, its header.

        Raises:
            OutputError: there is no room for them and `spare_bytes` more, or they cannot be made.
        """
        needed = self.check_room(spare_bytes)
        for number, shard in enumerate(self._layout.shards):
            path = self.path(number)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                try:
                    allocate(fd, shard.n_bytes)
                    for offset, data in ((0, shard.header), *shard.fills):
                        if os.pread(fd, len(data), offset) != data:
                            write_fully(fd, memoryview(data), offset, PIECE_BYTES)
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise self._no_room(needed, free_bytes(self._folder)) from error
                raise output_error(error, f"allocate {shard.n_bytes} bytes", path) from error

    def _missing_bytes(self, shard: int) -> int:
        try:
            found = os.stat(self.path(shard))
        except OSError:
            return self._layout.shards[shard].n_bytes
        return max(0, self._layout.shards[shard].n_bytes - found.st_blocks * 512)

    def _no_room(self, needed: int, free: int | None) -> OutputError:
        room = "no more are free" if free is None else f"{free} are free"
        return OutputError(
            f"{os.path.dirname(os.path.dirname(self._folder))}: the merge needs {needed} bytes, {room}. Free "
            "space and run again, or name a directory on another disk."
        )

    def write(self, shard: int, offset: int, data: memoryview, address: int) -> None:
        """Writes `data`, which lies at `address`; directly if file and memory lie alike within their pages.

        Any thread may call it.

        Raises:
            OutputError: the system did not take all of it.
        """
        first, last = round_up(offset, PAGE), (offset + len(data)) // PAGE * PAGE
        with self._borrowed(shard) as file:
            try:
                if last - first < MIN_DIRECT_BYTES or (address - offset) % PAGE:
                    write_fully(file.buffered, data, offset, PIECE_BYTES)
                    return
                # The pages at both ends hold a neighbour's bytes too. Only the page cache can share a page.
                write_fully(file.buffered, data[: first - offset], offset, PIECE_BYTES)
                done = first + self._write_directly(file, data[first - offset : last - offset], first)
                write_fully(file.buffered, data[done - offset :], done, PIECE_BYTES)
            except OSError as error:
                raise output_error(error, f"write {len(data)} bytes at {offset}", file.path) from error

    def _write_directly(self, file: _Open, data: memoryview, offset: int) -> int:
        """Bytes written past the page cache; fewer than all where the filesystem does not go on that way."""
        done = 0
        while self._direct and done < len(data):
            try:
                n_written = os.pwrite(self._direct_fd(file), data[done : done + PIECE_BYTES], offset + done)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._direct = False
                break
            done += n_written
            if n_written == 0 or n_written % PAGE:
                break
        return done

    def _direct_fd(self, file: _Open) -> int:
        with self._lock:
            if file.direct < 0:
                file.direct = os.open(file.path, os.O_WRONLY | _O_DIRECT | os.O_CLOEXEC)
            return file.direct

    @contextmanager
    def _borrowed(self, shard: int) -> Iterator[_Open]:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                path = self.path(shard)
                try:
                    file = self._open[shard] = _Open(path)
                except OSError as error:
                    raise output_error(error, "open the staged file", path) from error
            self._open.move_to_end(shard)
            file.n_users += 1
        try:
            while surplus := self._take_surplus():
                self._sync_and_close(*surplus)
            yield file
        finally:
            with self._lock:
                file.n_users -= 1

    def _take_surplus(self) -> tuple[int, _Open] | None:
        """The file that was idle longest, no longer listed, while more are open than may be."""
        with self._lock:
            idle = (shard for shard, file in self._open.items() if not file.n_users)
            if len(self._open) <= MAX_OPEN or (shard := next(idle, None)) is None:
                return None
            return shard, self._open.pop(shard)

    def _sync_and_close(self, shard: int, file: _Open) -> None:
        # Synced before it is closed, since an error of writing back is told to open descriptors only.
        try:
            sync_data(file.buffered)
        except OSError as error:
            self._lost(shard)
            raise output_error(error, "bring written data to the disk", file.path) from error
        finally:
            file.close()

    def sync(self) -> None:
        """Waits until all files are on the disk, and closes them. No write may be under way.

        Raises:
            OutputError: data could not be written, or a file is no longer where it was made.
        """
        for shard, description in enumerate(self._layout.shards):
            with self._borrowed(shard) as file:
                found, held = _stat(file.path), os.fstat(file.buffered)
                if (found.st_dev, found.st_ino, found.st_size) != (
                    held.st_dev,
                    held.st_ino,
                    description.n_bytes,
                ):
                    raise OutputError(
                        f"{file.path}: the staged file was replaced or cut while the merge ran. Run again "
                        "with --resume, and let no other program change this directory."
                    )
            with self._lock:
                del self._open[shard]
            self._sync_and_close(shard, file)

    def sync_written(self) -> None:
        """Waits until what was written here is on the disk, and closes the files. No write may be under way.

        Raises:
            OutputError: data could not be written.
        """
        with self._lock:
            files = list(self._open.items())
            self._open.clear()
        for shard, file in files:
            self._sync_and_close(shard, file)

    def close(self) -> None:
        """Closes all descriptors; may be called twice. No write may be under way."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise output_error(error, "find the staged file again", path) from error
