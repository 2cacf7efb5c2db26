"""Which bytes of the output are finished: a file of self-checking records, and what they cover."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import zlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from tvfast.engine.durable import output_error, write_fully
from tvfast.errors import OutputError

_BODY = struct.Struct("<4sIQQI")
_CHECK = struct.Struct("<I")
_MARK = b"tvj1"
RECORD_BYTES = _BODY.size + _CHECK.size


@dataclass(frozen=True, slots=True)
class Record:
    """A finished range of one shard's file."""

    shard: int
    offset: int
    n_bytes: int
    crc32c: int

    @property
    def end(self) -> int:
        return self.offset + self.n_bytes

    def pack(self) -> bytes:
        body = _BODY.pack(_MARK, self.shard, self.offset, self.n_bytes, self.crc32c)
        return body + _CHECK.pack(zlib.crc32(body))


def unpack(raw: bytes) -> list[Record]:
    """The records up to the first one that is torn or damaged."""
    records: list[Record] = []
    for start in range(0, len(raw) - RECORD_BYTES + 1, RECORD_BYTES):
        body = raw[start : start + _BODY.size]
        mark, shard, offset, n_bytes, crc = _BODY.unpack(body)
        (check,) = _CHECK.unpack_from(raw, start + _BODY.size)
        if mark != _MARK or check != zlib.crc32(body):
            break
        records.append(Record(shard, offset, n_bytes, crc))
    return records


class Journal:
    """The file of records, for one process at a time. `append` may be called from any thread."""

    def __init__(self, path: str) -> None:
        """Opens or makes the file; what follows the last whole record is cut off.

        Raises:
            OutputError: the file cannot be made, read or cut, or another process has it.
        """
        self._path = path
        self._lock = threading.Lock()
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._claim()
            self._identity = _identity(os.fstat(self._fd))
            with open(path, "rb") as file:
                self.records = unpack(file.read())
            self._end = len(self.records) * RECORD_BYTES
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            self.close()
            raise output_error(error, "open the journal", path) from error

    def _claim(self) -> None:
        """
        Raises:
            OutputError: a rank of an earlier run still writes.
        """
        if not _claimed(self._fd):
            self.close()
            raise _still_written(self._path, "--resume")

    def take_over(self, prefix: str) -> None:
        """Add to `records` those of other journals beside this one, which end here.

        Args:
            prefix: of the others' names.

        Raises:
            OutputError: one cannot be read or removed, or a process still writes to it.
        """
        folder = os.path.dirname(self._path)
        try:
            paths = [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith(prefix)]
            others = [Journal(path) for path in sorted(paths)]
            for other in others:
                other.close()
            self.records += [record for other in others for record in other.records]
            if others:
                self.rewrite(self.records)
            for path in paths:
                os.unlink(path)
        except OSError as error:
            raise output_error(error, "take over the ranks' journals", folder) from error

    def append(self, record: Record) -> None:
        """Adds one record, or leaves the file as it was.

        Raises:
            OutputError: it cannot be written, or the file is no longer where it was made.
        """
        with self._lock:
            self._check_in_place()
            self._write([record])

    def rewrite(self, records: Iterable[Record]) -> None:
        """Keeps only `records`."""
        with self._lock:
            try:
                os.ftruncate(self._fd, 0)
            except OSError as error:
                raise output_error(error, "shorten the journal", self._path) from error
            self._end = 0
            self._write(records)

    def _write(self, records: Iterable[Record]) -> None:
        raw = b"".join(record.pack() for record in records)
        try:
            write_fully(self._fd, memoryview(raw), self._end, max(1, len(raw)))
        except OSError as error:
            with suppress(OSError):  # the next record is written over the torn one in any case
                os.ftruncate(self._fd, self._end)
            raise output_error(error, "write to the journal", self._path) from error
        self._end += len(raw)

    def _check_in_place(self) -> None:
        try:
            found = _identity(os.stat(self._path))
        except OSError as error:
            raise output_error(error, "find the journal again", self._path) from error
        if found != self._identity:
            raise OutputError(
                f"{self._path}: the file was replaced while the merge ran. Run again with --resume, and let "
                "no other program change this directory."
            )

    def close(self) -> None:
        """Closes the file; may be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _claimed(fd: int) -> bool:
    """Lock a journal; False where another process has. Where the filesystem has no locks, nobody is asked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _still_written(path: str, option: str) -> OutputError:
    return OutputError(
        f"{path}: a process of an earlier run still writes here. Wait until it ends, or stop it, then run "
        f"again with {option}."
    )


def check_left(folder: str, prefix: str) -> None:
    """Raise if a process still writes to one of the journals of `folder`, which may not be there.

    Args:
        prefix: of the journals' names.

    Raises:
        OutputError: naming the journal, or one cannot be opened.
    """
    try:
        names = [name for name in os.listdir(folder) if name.startswith(prefix)]
        for path in (os.path.join(folder, name) for name in sorted(names)):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if not _claimed(fd):
                    raise _still_written(path, "--overwrite")
            finally:
                os.close(fd)
    except FileNotFoundError:
        pass  # nothing was begun here
    except OSError as error:
        raise output_error(error, "open the journals of an earlier run", folder) from error


class Coverage:
    """The finished ranges of one file, merged, and the checksums that are known for parts of them."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._records: list[tuple[int, Record]] = []  # ascending by offset, never overlapping

    @property
    def n_bytes(self) -> int:
        return sum(self._ends) - sum(self._starts)

    @property
    def records(self) -> list[Record]:
        return [record for _, record in self._records]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(first byte, end) of what is finished, ascending and apart."""
        return list(zip(self._starts, self._ends, strict=True))

    def cover(self, offset: int, end: int) -> None:
        """Counts [offset, end) as finished, without a checksum."""
        first = bisect_left(self._ends, offset)
        last = bisect_right(self._starts, end)
        start = min([offset, *self._starts[first:last][:1]])
        end = max([end, *self._ends[first:last][-1:]])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def add(self, record: Record) -> None:
        """Counts a range as finished. What it overlaps still counts, but the checksums are dropped."""
        if record.n_bytes == 0:
            return
        self.cover(record.offset, record.end)
        low = bisect_left(self._records, record.offset, key=lambda item: item[0])
        if low and self._records[low - 1][1].end > record.offset:
            low -= 1
        high = bisect_left(self._records, record.end, key=lambda item: item[0])
        del self._records[low:high]
        insort(self._records, (record.offset, record), key=lambda item: item[0])

    def covers(self, offset: int, end: int) -> bool:
        """Whether every byte of [offset, end) is finished."""
        return offset >= end or self.first_gap(offset, end) is None

    def first_gap(self, offset: int, end: int) -> int | None:
        """The first byte of [offset, end) that is not finished."""
        i = bisect_right(self._starts, offset) - 1
        reached = max(offset, self._ends[i]) if i >= 0 else offset
        return reached if reached < end else None

    def pieces(self, offset: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """Cuts a covered range into (offset, n_bytes, crc32c), with None where no checksum is known."""
        reached = offset
        for _, record in self._records:
            if record.offset > reached:
                yield reached, record.offset - reached, None
            yield record.offset, record.n_bytes, record.crc32c
            reached = record.end
        if reached < end:
            yield reached, end - reached, None
