"""Writes a statistics file record by record; nothing is at its path until it is whole."""

from __future__ import annotations

import os
from types import TracebackType

from tvfast.checkpoint.layout import PAGE, Described, file_header
from tvfast.errors import ArgumentError, OutputError
from tvfast.statistics.records import (
    DOCUMENT_KEY,
    RECORD_PREFIX,
    Document,
    Record,
    Shared,
    document_text,
    record_text,
    tensor_name,
)

_RECORD_BYTES = 512  # of header that one record usually takes
_PIECE_BYTES = 2**24


class StatisticsWriter:
    """A new statistics file; a context manager that leaves the whole file at `path`, or nothing new.

    Args:
        path: of the file; one that exists is replaced at the end.
        document: model, data and conventions.
        n_records: how many are expected; only saves a copy of the data where it is near the truth.

    Raises:
        OutputError: the file cannot be written.

    Notes:
        Equal records in equal order give equal bytes. Not safe for several threads.
    """

    def __init__(self, path: str | os.PathLike[str], document: Document, *, n_records: int = 0) -> None:
        self.path = os.fspath(path)
        self.document = document
        self._unfinished = f"{self.path}.unfinished"
        self._records: dict[str, str] = {}
        self._tensors: list[Described] = []
        self._names: set[str] = set()
        self._shared: list[tuple[Record, str, str]] = []
        self._start = -(-(PAGE + n_records * _RECORD_BYTES) // PAGE) * PAGE
        try:
            self._fd = os.open(self._unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error) from None
        self._end = self._start
        self._open = True

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, record: Record) -> None:
        """Write one record.

        Raises:
            ArgumentError: a second record of the parameter and kind, or one that the schema does not take.
            OutputError: it cannot be written.
        """
        key = f"{RECORD_PREFIX}{record.parameter}:{record.kind}"
        if key in self._records:
            raise ArgumentError(
                f"{self.path}: record {record.parameter!r}, {record.kind!r} was already written; expected "
                "one record per parameter and kind."
            )
        text = record_text(record)
        for role, found in record.tensors.items():
            if isinstance(found, Shared):
                self._shared.append((record, role, found.parameter))
                continue
            name = tensor_name(record.parameter, record.kind, role)
            self._write(memoryview(found.data).cast("B"))
            self._tensors.append((name, found.dtype, tuple(found.shape)))
            self._names.add(name)
        self._records[key] = text

    def close(self) -> None:
        """Finish the file and put it in place.

        Raises:
            ArgumentError: a shared role names a parameter without the role.
            OutputError: it cannot be written.
        """
        if not self._open:
            return
        try:
            for record, role, other in self._shared:
                if tensor_name(other, record.kind, role) not in self._names:
                    raise ArgumentError(
                        f"{self.path}: record {record.parameter!r}, {record.kind!r}: role {role!r} is shared "
                        f"with {other!r}, which has none; expected its sums there."
                    )
            metadata = {DOCUMENT_KEY: document_text(self.document), **self._records}
            header = file_header(self.path, self._tensors, metadata, at_least=self._start)
            if len(header) > self._start:
                self._move(len(header) - self._start)
            os.pwrite(self._fd, header, 0)
            os.fsync(self._fd)
            os.close(self._fd)
            self._open = False
            os.replace(self._unfinished, self.path)
        except OSError as error:
            self.abort()
            raise self._failed(error) from None
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove what was written; what was at the path before stays."""
        if self._open:
            os.close(self._fd)
            self._open = False
        if os.path.lexists(self._unfinished):
            os.remove(self._unfinished)

    def _write(self, data: memoryview) -> None:
        try:
            for at in range(0, len(data), _PIECE_BYTES):
                piece = data[at : at + _PIECE_BYTES]
                while piece:
                    n_written = os.pwrite(self._fd, piece, self._end)
                    piece = piece[n_written:]
                    self._end += n_written
        except OSError as error:
            self.abort()
            raise self._failed(error) from None

    def _move(self, n_bytes: int) -> None:
        """Make room for a header that is longer than expected, from the end on."""
        end = self._end
        while end > self._start:
            begin = max(self._start, end - _PIECE_BYTES)
            piece = memoryview(os.pread(self._fd, end - begin, begin))
            done = 0
            while done < len(piece):
                done += os.pwrite(self._fd, piece[done:], begin + n_bytes + done)
            end = begin
        self._start += n_bytes
        self._end += n_bytes

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: the statistics cannot be written: {error.strerror or error}. "
            "Free space, or name a place that can be written to."
        )
