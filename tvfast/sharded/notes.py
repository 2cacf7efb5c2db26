"""What a rank that fails in the middle of a call leaves for those that wait for it.

No collective can say it: the others are in one of their own, of sizes that the failed rank may not know. So
it is a note in the store of the process group, and those who have waited for a second look for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from tvfast.errors import RankError

TOKEN_BYTES = 8
PATIENCE_S = 1.0
"""How long a collective is waited for before the store is asked, and then between questions."""

_LONGEST_NAP_S = 1e-3


@dataclass(slots=True)
class Note:
    """The place of one call's note in the store.

    Attributes:
        key: None before ranks have agreed on one, and where there is no store.
    """

    key: str | None = None
    _store: Store | None = field(default_factory=lambda: _default_store())
    _left: bool = False

    def agree(self, token: bytes) -> None:
        """From here on there is a place; all ranks of the call know the token, and no other call has it."""
        self.key = None if self._store is None else f"tvfast-failed-{token.hex()}"

    @contextmanager
    def leaving(self, rank: int) -> Iterator[None]:
        """An exception in here is told to the others. Who comes back has got over the last one."""
        if self._left and self._store is not None and self.key is not None:
            self._left = False
            with suppress(RuntimeError):
                self._store.set(self.key, "")
        try:
            yield
        except RankError:
            raise  # told by another
        except BaseException as error:
            if self._store is not None and self.key is not None:
                text = " ".join(str(error).split())[:2000]
                self._left = True
                with suppress(RuntimeError):
                    self._store.set(self.key, f"rank {rank} failed in it: {type(error).__name__}: {text}")
            raise

    def wait(self, work: dist.Work) -> None:
        """Until a collective is done.

        Raises:
            RankError: a rank that belongs to it has failed meanwhile.
            RuntimeError: the collective has failed, or the timeout of its group is over.
        """
        nap, asked = 1e-5, time.monotonic()
        while self.key is not None and not work.is_completed():
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)
            if time.monotonic() - asked > PATIENCE_S:
                self._look()
                asked = time.monotonic()
        try:
            work.wait()
        except RuntimeError as error:
            self._look(error)  # its process may have ended already, and that is what the collective tells
            raise

    def _look(self, cause: Exception | None = None) -> None:
        """Raise if a note is there.

        Raises:
            RankError: with what it says.
        """
        if self._store is None or self.key is None:
            return
        try:
            found = self._store.get(self.key).decode() if self._store.check([self.key]) else ""
        except RuntimeError:
            return  # the store went with its process; the group's timeout is left
        if found:
            raise RankError(
                f"the call was not finished: {found}. What it was to write is incomplete on this rank too. "
                "Load the weights again, in new processes or a new process group."
            ) from cause


def _default_store() -> Store | None:
    try:
        store: Store = dist.distributed_c10d._get_default_store()
    except (AttributeError, KeyError, ValueError):
        return None
    return store
