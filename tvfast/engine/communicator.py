"""Several processes on one merge: what they tell each other, and the one process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from tvfast.engine.progress import Progress

Stop: TypeAlias = Callable[[BaseException], None]


class Communicator(Protocol):
    """The ranks of one merge.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process among those of this machine.
        per_host: how many of them are on this machine and share its cores and memory.
    """

    rank: int
    size: int
    local_rank: int
    per_host: int

    def gather(self, value: Any, *, to_all: bool = True) -> list[Any]:
        """The JSON value of every rank, by rank; every rank calls it, in the same order.

        Unless `to_all`, rank 0 alone waits for the others; those get nothing.

        Raises:
            RankError: another rank failed, is lost, or has not come within the time that is allowed.
        """

    def describe(self, rank: int) -> str:
        """A rank and its host, for messages."""

    def progress(self, own: Progress) -> Progress:
        """What a run is to tell of its work, so that rank 0 shows everybody's."""

    def watching(
        self, stop: Callable[[BaseException], None], *, steady: bool
    ) -> AbstractContextManager[None]:
        """While it lasts, `stop` is called with a `RankError` when another rank fails or is lost.

        Args:
            steady: bytes come and go all the time, so that none for long means that this rank hangs.
        """


class Alone:
    """The only process of a merge."""

    rank, size, local_rank, per_host = 0, 1, 0, 1

    def gather(self, value: Any, *, to_all: bool = True) -> list[Any]:
        return [value]

    def describe(self, rank: int) -> str:
        return f"rank {rank}"

    def progress(self, own: Progress) -> Progress:
        return own

    @contextmanager
    def watching(self, stop: Stop, *, steady: bool) -> Iterator[None]:
        yield
