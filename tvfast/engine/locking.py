"""One process at a time per output directory."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress

from tvfast.engine.durable import output_error
from tvfast.errors import OutputError

LOCK_NAME = "lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY)


class FolderLock:
    """An advisory lock on a file in `folder`; it ends with the process, however that ends.

    Attributes:
        is_held: False where the filesystem has no locks.
    """

    def __init__(self, folder: str) -> None:
        self.is_held = True
        self._path = os.path.join(folder, LOCK_NAME)
        self._fd = -1

    @classmethod
    def acquire(cls, folder: str) -> FolderLock:
        """Makes `folder` if need be and locks it, without waiting.

        Raises:
            OutputError: another process holds the lock, or the folder cannot be made.
        """
        lock = cls(folder)
        try:
            while not lock._attempt(folder):
                pass
        except OSError as error:
            raise output_error(error, "make and lock the staging directory", folder) from error
        return lock

    def _attempt(self, folder: str) -> bool:
        """False where the owner before us removed file or folder before we had locked it."""
        fd = -1
        try:
            try:
                os.mkdir(folder)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._flock(fd)
            held, named = os.fstat(fd), os.stat(self._path)
            if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                os.truncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                self._fd, fd = fd, -1
                return True
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and fd >= 0:
                raise self._taken(folder, fd) from error
            raise
        finally:
            if fd >= 0:
                os.close(fd)
        return False

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.is_held = False

    @staticmethod
    def _taken(folder: str, fd: int) -> OutputError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
        who = f"process {owner}" if owner.isdigit() else "another process"
        return OutputError(
            f"{os.path.dirname(folder)}: {who} is writing a merge here. Wait until it ends, stop it, or name "
            "another directory."
        )

    def remove(self) -> None:
        """Deletes the file, gives the lock back and deletes the folder, if nobody has anything there.

        In this order: NFS keeps a name for what is deleted while it is open. What is in the folder after
        that belongs to others: to a process that waits for its turn, or to one that has not closed its files.

        Raises:
            OutputError: the file or the folder cannot be deleted.
        """
        folder = os.path.dirname(self._path)
        try:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            self.release()
            with suppress(FileNotFoundError):
                os.rmdir(folder)
        except OSError as error:
            if error.errno not in NOT_EMPTY:
                raise output_error(error, "delete the staging directory", folder) from error

    def release(self) -> None:
        """Gives the lock back; may be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
