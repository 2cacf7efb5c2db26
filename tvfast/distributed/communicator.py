"""The ranks of a `torchrun`: values and heartbeats in the store of torch.distributed, no tensor.

Every process sets a heartbeat each second, also while its kernels run. Rank 0 watches all of them, the
others watch rank 0. Who finds one that has stopped writes that down in the store, where everybody reads it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from tvfast.distributed.heartbeats import Beat, Heartbeats
from tvfast.engine.progress import Progress
from tvfast.errors import ArgumentError, RankError

TIMEOUT_S = 60.0
"""A rank whose heartbeat has not changed for so long is lost: it ended, was stopped, or cannot be reached."""

STALL_S = 600.0
"""A rank that neither reads nor writes a byte for so long while it merges hangs, heartbeat or not."""

GRACE_S = 20.0
"""How long a process may take to leave its kernels when another rank is lost."""

_FAILURE = "failure"
_SHORTEST_NAP_S, _POLL_S = 0.001, 0.02

_merges = 0  # of this process: each has keys of its own


def join() -> Group:
    """The processes that `torchrun` started, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT tell.

    `TVFAST_RANK_TIMEOUT` and `TVFAST_STALL_TIMEOUT` are seconds in place of the defaults; a stall timeout
    of 0 never ends.

    Raises:
        ArgumentError: a variable is missing, no number, or out of its range.
        RankError: the store cannot be reached.
    """
    lacking = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if lacking:
        raise ArgumentError(
            f"a merge by several ranks needs the variables that torchrun sets; {', '.join(lacking)} "
            "is missing. Start it with torchrun --nproc-per-node=N -m tvfast merge CONFIG OUT."
        )
    timeout = _seconds("TVFAST_RANK_TIMEOUT", TIMEOUT_S)
    stall = _seconds("TVFAST_STALL_TIMEOUT", STALL_S, or_never=True)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size:
        raise ArgumentError(f"RANK is {rank} of WORLD_SIZE {size}; expected less, as torchrun sets it.")
    is_master = rank == 0 and not _of_agent()
    left = timeout if is_master else _until_listened(os.environ["MASTER_ADDR"], port, timeout)
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            port,
            size,
            is_master=is_master,
            timeout=timedelta(seconds=left),
            wait_for_workers=False,
        )
        store.set_timeout(timedelta(seconds=timeout))
    except (ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise RankError(
            f"the store of the job at {where} cannot be reached within {timeout:g} s: {text}. Check "
            "MASTER_ADDR and MASTER_PORT, and that rank 0 was started."
        ) from error
    global _merges
    _merges += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"tvfast-{attempt}-{_merges}", store)
    return Group(own, rank, size, timeout_s=timeout, stall_s=stall)


def _until_listened(host: str, port: int, timeout: float) -> float:
    """Wait for the store's process, which may come later; seconds that are left for the store.

    The store's client would try again half a second later.
    """
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 1.0:
        try:
            socket.create_connection((host, port), timeout=left).close()
        except (ConnectionRefusedError, TimeoutError):
            time.sleep(_POLL_S)
        except OSError:
            break  # which the store's client says better
        else:
            break
    return max(left, min(1.0, timeout))


def _of_agent() -> bool:
    """Whether torchrun itself has the store; otherwise rank 0 has."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ArgumentError(f"{name} is {text!r}; expected a number, as torchrun sets it.")
    return int(text)


def _seconds(name: str, default: float, *, or_never: bool = False) -> float:
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = -1.0
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not or_never):
        raise ArgumentError(f"{name} is {text!r}; expected seconds, for example {default:g}.")
    return seconds


class Group:
    """`Communicator` over a store. A context manager: leaving it by an error tells the others.

    Args:
        store: that all ranks see.
        timeout_s: see `TIMEOUT_S`.
        stall_s: see `STALL_S`; 0: never.
        grace_s: see `GRACE_S`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        stall_s: float,
        grace_s: float = GRACE_S,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._store = store
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._hosts = [""] * size
        self._beat = Beat()
        self._watched = Heartbeats(range(1, size) if rank == 0 else [0], timeout_s, stall_s)
        self._error: RankError | None = None
        self._stop: Callable[[BaseException], None] | None = None
        self._guard = threading.Lock()
        self._own: Progress | None = None
        self._n_gathered = 0
        self._leaving = threading.Event()
        self._answered = time.monotonic()
        self._threads = [
            threading.Thread(target=target, name="tvfast-ranks", daemon=True)
            for target in (self._watch, self._watch_store)
        ]

    # -- Communicator -------------------------------------------------------------------------------

    def gather(self, value: Any, *, to_all: bool = True) -> list[Any]:
        topic = f"value-{self._n_gathered}"
        self._n_gathered += 1
        self._asked(lambda: self._store.set(f"{topic}-{self.rank}", json.dumps(value)))
        if self.rank and not to_all:
            return []
        keys = [f"{topic}-{rank}" for rank in range(self.size)]
        nap = _SHORTEST_NAP_S
        while not self._asked(lambda: self._store.check(keys)):
            if self._error is not None:
                raise self._error
            time.sleep(nap)
            nap = min(2 * nap, _POLL_S)
        return [json.loads(found) for found in self._asked(lambda: self._store.multi_get(keys))]

    def describe(self, rank: int) -> str:
        host = self._hosts[rank]
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def progress(self, own: Progress) -> Progress:
        return _Counted(self._beat, own, self)

    def begin(self, own: Progress, read_bytes: int, write_bytes: int) -> None:
        """What all ranks are about to do, to the progress of rank 0."""
        totals = self.gather([read_bytes, write_bytes])
        if self.rank == 0:
            own.start(sum(found[0] for found in totals), sum(found[1] for found in totals))
            self._own = own

    @contextmanager
    def watching(self, stop: Callable[[BaseException], None], *, steady: bool) -> Iterator[None]:
        with self._guard:
            self._stop = stop
            error = self._error
        if error is not None:
            stop(error)
        self._beat.steady = steady
        try:
            yield
        finally:
            self._beat.steady = False
            with self._guard:
                self._stop = None

    # -- life ---------------------------------------------------------------------------------------

    def __enter__(self) -> Group:
        self._answered = time.monotonic()
        for thread in self._threads:
            thread.start()
        try:
            self._hosts = self.gather(socket.gethostname())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how this rank has ended, and, where the store is this process, wait for theirs."""
        try:
            if error is None:
                self.gather(None)
            elif error is not self._error:
                self._announce(f"{self.describe(self.rank)} failed: {_reason(error)}")
        finally:
            self._leaving.set()
            for thread in self._threads:
                thread.join(timeout=self._timeout_s)
            with suppress(RuntimeError):
                self._beat.left = True
                self._store.set(f"beat-{self.rank}", self._beat.pack())
                self._wait_for_readers()

    def _wait_for_readers(self) -> None:
        """The store ends with rank 0, unless the agent of torchrun has it."""
        if self.rank or _of_agent():
            return
        keys = [f"beat-{rank}" for rank in range(1, self.size)]
        deadline = time.monotonic() + (self._grace_s if self._error is None else 2.0)
        while time.monotonic() < deadline:
            there = [key for key in keys if self._store.check([key])]
            if all(Beat.unpack(self._store.get(key)).left for key in there):
                return
            time.sleep(_SHORTEST_NAP_S)

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The store's answer.

        Raises:
            RankError: it gives none.
        """
        try:
            return question()
        except RuntimeError as error:
            if self._error is not None:
                raise self._error from None
            raise self._no_store(error) from error

    def _no_store(self, error: Exception) -> RankError:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        text = " ".join(str(error).split())[:200]
        return RankError(
            f"the store of the job at {where} does not answer any more ({text}): its process, of torchrun or "
            f"{self.describe(0)}, ended or cannot be reached. Run again with --resume."
        )

    # -- the monitor --------------------------------------------------------------------------------

    def _watch(self) -> None:
        interval = min(1.0, self._timeout_s / 8)
        while not self._leaving.is_set():
            try:
                self._store.set(f"beat-{self.rank}", self._beat.next().pack())
                if self._store.check([_FAILURE]):
                    self._fail(RankError(self._store.get(_FAILURE).decode()))
                    return
                self._look_after_others()
                self._answered = time.monotonic()
            except RuntimeError as error:
                if not self._leaving.is_set():
                    self._fail(self._no_store(error))
                return
            self._leaving.wait(interval)

    def _watch_store(self) -> None:
        """A store whose process is stopped, or whose host is gone, lets those who ask wait for ever."""
        while not self._leaving.wait(min(1.0, self._timeout_s / 8)):
            if time.monotonic() - self._answered > self._timeout_s and self._error is None:
                self._fail(self._no_store(TimeoutError(f"silent for {self._timeout_s:g} s")))
                return

    def _look_after_others(self) -> None:
        for rank in self._watched.ranks:
            key = f"beat-{rank}"
            raw = self._store.get(key) if self._store.check([key]) else None
            read, wrote = self._watched.heard(rank, raw, time.monotonic())
            if self._own is not None and (read or wrote):
                self._own.read(read)
                self._own.wrote(wrote)
        lost = self._watched.lost(time.monotonic())
        if lost is not None:
            rank, how = lost
            self._announce(f"{self.describe(rank)} {how}. Its work is not finished: run again with --resume.")

    def _announce(self, text: str) -> None:
        """Write down why the merge ends; the first to do so is right."""
        with suppress(RuntimeError):
            self._store.compare_set(_FAILURE, "", text)

    def _fail(self, error: RankError) -> None:
        with self._guard:
            self._error = error
            stop = self._stop
        if stop is not None:
            stop(error)
        if not self._leaving.wait(self._grace_s):
            print(f"tvfast: error: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # a kernel or a read does not come back: what is on the disk is good for --resume


class _Counted:
    """A run's progress: into the heartbeat, and, of rank 0, to whoever shows it."""

    def __init__(self, beat: Beat, own: Progress, group: Group) -> None:
        self._beat = beat
        self._shown: Progress | None = own if group.rank == 0 else None
        self._own = own
        self._group = group

    def start(self, read_bytes: int, write_bytes: int) -> None:
        self._group.begin(self._own, read_bytes, write_bytes)

    def read(self, n_bytes: int) -> None:
        self._beat.add(n_bytes, 0)
        if self._shown is not None:
            self._shown.read(n_bytes)

    def wrote(self, n_bytes: int) -> None:
        self._beat.add(0, n_bytes)
        if self._shown is not None:
            self._shown.wrote(n_bytes)

    def finish(self) -> None:
        if self._shown is not None:
            self._shown.finish()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
