"""Files that must survive: allocation, syncs, atomic replacement, and errors that say what to do next."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

from tvfast.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)


def output_error(error: OSError, doing: str, path: str) -> OutputError:
    """What the failed system call means for a merge, and what to do."""
    said = f"{path}: cannot {doing}: {error.strerror or error}."
    if error.errno in _FULL:
        free = free_bytes(path)
        room = "" if free is None else f" {free} bytes are free."
        return OutputError(
            f"{said}{room} What is finished is kept: free space, then run again with --resume."
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{said} The file would pass a size limit, of the shell (ulimit -f) or of the filesystem. "
            "What is finished is kept: raise the limit, then run again with --resume."
        )
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return OutputError(
            f"{said} It was removed or renamed while the merge ran. Run again with --resume, which starts "
            "from what is left."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{said} Make the directory writable for this user, or name another one.")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return OutputError(f"{said} Move away what is there, or name another directory.")
    return OutputError(f"{said} What is finished is kept: remove the cause, then run again with --resume.")


def free_bytes(path: str) -> int | None:
    """What an ordinary user may still write where `path` is or would be; None where that is unknown."""
    while not os.path.exists(path):
        parent = os.path.dirname(path)
        if parent == path:
            return None
        path = parent
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def sync_data(fd: int) -> None:
    """Wait until a file's data, and what is needed to find it, are on the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_file(path: str) -> None:
    """Wait until a whole file is on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: str) -> None:
    """Wait until the names in a directory are on the disk; nothing where the filesystem has no such call."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def write_fully(fd: int, data: memoryview, offset: int, piece_bytes: int) -> None:
    """`pwrite` of everything, in pieces, through short writes."""
    done = 0
    while done < len(data):
        n_written = os.pwrite(fd, data[done : done + piece_bytes], offset + done)
        if n_written <= 0:
            raise OSError(errno.EIO, "the filesystem wrote nothing")
        done += n_written


def write_file(path: str, data: bytes) -> None:
    """A new or replaced file, not synced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_fully(fd, memoryview(data), 0, max(1, len(data)))
    finally:
        os.close(fd)


def replace_file(path: str, data: bytes) -> None:
    """A file that holds either its old bytes or `data`, whenever the machine stops."""
    fresh = path + ".new"
    write_file(fresh, data)
    sync_file(fresh)
    os.replace(fresh, path)
    sync_folder(os.path.dirname(path))


def allocate(fd: int, n_bytes: int) -> None:
    """Gives an open file its final size, with blocks behind it where the filesystem can."""
    held = os.fstat(fd)
    if held.st_size == n_bytes and held.st_blocks * 512 >= n_bytes:
        return
    if held.st_size > n_bytes:
        os.ftruncate(fd, n_bytes)
    if n_bytes == 0:
        return
    try:
        _fallocate(fd, n_bytes)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, n_bytes)


def _libc_fallocate() -> Callable[[int, int, int, int], int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int
    return call


_call_fallocate = _libc_fallocate()


def _fallocate(fd: int, n_bytes: int) -> None:
    # Not os.posix_fallocate: where the filesystem cannot allocate, the C library writes to every block.
    if _call_fallocate is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    while _call_fallocate(fd, 0, 0, n_bytes) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
