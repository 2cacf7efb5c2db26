"""Opening the files of a checkpoint: regular files only, read-only, never waiting, never too much."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tvfast.errors import CheckpointError

_SAVE_AGAIN = "The file is damaged or was written by a faulty program; download or save it again."
_SHOWN = 160  # characters of a name or value in a message
_MOST_ITEMS = 16
_MOST_BRACKETS = 200_000
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` where it lies"),
    (b"<!DOCTYPE", "an HTML page, so a download went wrong; download the file again"),
    (b"<html", "an HTML page, so a download went wrong; download the file again"),
    (b"GGUF", "a GGUF file; convert it to safetensors first"),
)


class OpenFile(NamedTuple):
    """A regular file that is open for reading, and what the system said of it at that moment."""

    descriptor: int
    path: str
    n_bytes: int
    mtime_ns: int
    start: int = 0  # where a section begins

    def section(self, start: int, n_bytes: int) -> OpenFile:
        """A part that is a file by itself."""
        return self._replace(start=self.start + start, n_bytes=n_bytes)

    def read(self, n_bytes: int, offset: int) -> bytes:
        """Exactly `n_bytes`.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        parts = []
        missing = n_bytes
        while missing:
            try:
                part = os.pread(self.descriptor, missing, self.start + offset + n_bytes - missing)
            except OSError as error:
                raise unreadable(self.path, error) from None
            if not part:
                raise CheckpointError(
                    f"{self.path}: ended {missing} bytes early while {n_bytes} bytes at {offset} were read; "
                    f"expected {self.n_bytes} in all. Something changes the file; wait until it is done."
                )
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def open_regular(path: str) -> Iterator[OpenFile]:
    """The file at `path`, open for reading.

    Raises:
        CheckpointError: missing, not permitted, or no regular file. A pipe or device is never opened to wait.
    """
    try:
        _check_regular(os.stat(path), path)
        # between the two calls the file may have been replaced by a pipe, whose opening must not wait
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        found = os.fstat(descriptor)
        _check_regular(found, path)
        yield OpenFile(descriptor, path, found.st_size, found.st_mtime_ns)
    finally:
        os.close(descriptor)


def read_json(path: str, most_bytes: int) -> Any:
    """The JSON value that a small file holds. `NaN` and `Infinity` are taken, as transformers writes them.

    Raises:
        CheckpointError: no regular file, longer than `most_bytes`, not UTF-8, or not JSON.
    """
    with open_regular(path) as file:
        if file.n_bytes > most_bytes:
            raise CheckpointError(
                f"{path}: is {file.n_bytes} bytes long; expected JSON of at most {most_bytes} bytes. "
                "This is not the file that its name says; download or save it again."
            )
        raw = file.read(file.n_bytes, 0)
    # a list takes 20 times its two characters once it is parsed
    if raw.count(b"[") + raw.count(b"{") > _MOST_BRACKETS:
        raise damaged(path, f"has more than {_MOST_BRACKETS} lists and objects; expected a few")
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        found = "is nested too deeply"
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 ({error.reason} at byte {error.start})"
    except ValueError as error:
        found = f"is not JSON ({shown(str(error), quote=False)})"
    if other := foreign(raw):
        raise CheckpointError(f"{path}: {other}")
    raise damaged(path, f"{found}; expected a JSON object")


def damaged(where: str, found: str) -> CheckpointError:
    """The error for contents that no correct program writes; `where` is the file, and what in it."""
    return CheckpointError(f"{where}: {found}. {_SAVE_AGAIN}")


def unreadable(path: str, error: OSError) -> CheckpointError:
    """The error for what the system refused."""
    if isinstance(error, FileNotFoundError):
        found = "a symbolic link to nothing" if os.path.islink(path) else "no such file"
        return CheckpointError(f"{path}: {found}; expected a part of the checkpoint. Download it again.")
    return CheckpointError(
        f"{path}: cannot be read: {error.strerror or error}; expected a readable file. "
        "Check its permissions and the disk."
    )


def foreign(raw: bytes) -> str:
    """What the first bytes say a file is instead of a checkpoint's, and what to do; empty if nothing."""
    found = next((text for magic, text in _FOREIGN if raw.startswith(magic)), "")
    return f"is {found}." if found else ""


def shown(value: object, *, quote: bool = True) -> str:
    """`value` for a message: escaped, and cut to a line or two."""
    if isinstance(value, str):
        text = repr(value[:_SHOWN])
        return (text if quote else text[1:-1]) + ("..." if len(value) > _SHOWN else "")
    if isinstance(value, list):
        text = ", ".join(shown(item) for item in value[:_MOST_ITEMS])
        cut = len(value) > _MOST_ITEMS or len(text) > _SHOWN
        return f"[{text[:_SHOWN]}...]" if cut else f"[{text}]"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    return repr(value)


def _check_regular(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "no regular file")
        raise CheckpointError(f"{path}: is {kind}; expected a regular file of the checkpoint. Remove it.")
