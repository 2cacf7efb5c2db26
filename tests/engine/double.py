"""A device made of CPU memory: queues that finish in any order, and proof that no buffer is used too early.

Work that is put into a queue stays there until someone must wait for it. Then a random choice of what could
run next runs, until that work is done. Whatever the choice, two pieces of work that touch the same bytes, one
of them writing, must be ordered by a queue, by a ticket or by the host's waiting: every new piece is checked
against all that the host does not know to be finished.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tvfast.engine.device import OutOfDeviceMemory, Traits, Transfer
from tvfast.errors import MergeError
from tvfast.ops.raw import Backend, ResumableBackend, TrimmingBackend
from tvfast.program import DType, View, WorkTable

DTYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}
QUEUES = ("upload", "compute", "download")

Fault = Callable[[str, int], None]
"""Is called with the queue and the number of a piece of work in it; may raise."""


@dataclass(frozen=True)
class Bytes:
    """A range of the ring or of host memory."""

    space: str
    begin: int
    end: int

    def meets(self, other: Bytes) -> bool:
        return self.space == other.space and self.begin < other.end and other.begin < self.end


@dataclass
class Work:
    """A piece of work; `before` has a bit for everything that is ordered before it, `bit` is its own."""

    device: HostDouble
    run: Callable[[], None]
    after: list[Work]
    reads: list[Bytes]
    writes: list[Bytes]
    bit: int
    before: int
    done: bool = False
    error: BaseException | None = None

    def wait(self) -> None:
        self.device.finish(self)


@dataclass
class _Later:
    """The ticket of a computation, which is valid when its context has been left."""

    work: Work | None = None

    def wait(self) -> None:
        assert self.work is not None
        self.work.wait()


@dataclass
class HostDouble:
    """`engine.device.Device` in host memory.

    Attributes:
        inner: computes.
        seed: of the order in which work is done; None: at once.
        fault: see `Fault`; called when work is put into a queue.
        late_fault: the same, when it is done.
        limit_scratch: whether allocations of a torch backend count, and fail beyond the limit.
    """

    inner: Backend
    seed: int | None = None
    total_bytes: int = 10**9
    fault: Fault = lambda queue, number: None
    late_fault: Fault = lambda queue, number: None
    limit_scratch: bool = False
    resumable: bool = True
    peak_scratch: int = 0
    n_drains: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(QUEUES, 0))

    def __post_init__(self) -> None:
        resumable = self.resumable and isinstance(self.inner, ResumableBackend)
        self.traits = Traits(
            "cuda:0", "a double", self.inner.name, self.total_bytes, self.total_bytes, 0, resumable
        )
        self.backend: Any = (ResumableDeferred if resumable else Deferred)(self)
        self._lock = threading.RLock()
        self._drawn = random.Random(self.seed)
        self._last: dict[str, Work | None] = dict.fromkeys(QUEUES)
        self._waiting: dict[str, deque[Work]] = {name: deque() for name in QUEUES}
        self._unknown: list[Work] = []  # not known to the host to be done
        self._known = 0
        self._n_works = 0
        self._ring: Tensor | None = None
        self._broken: Exception | None = None
        self.is_open = False

    # -- the protocol -----------------------------------------------------------------------------------

    def open(self, address: int, n_bytes: int, ring_bytes: int, limit_bytes: int) -> None:
        assert not self.is_open
        assert ring_bytes <= limit_bytes <= self.total_bytes
        self._host = Bytes("host", address, address + n_bytes)
        self._scratch = _Scratch(limit_bytes - ring_bytes if self.limit_scratch else None)
        self._ring = torch.full((ring_bytes,), 255, dtype=torch.uint8)
        self.is_open = True

    def view(self, at: int, n_elements: int, dtype: DType) -> View:
        assert at % 16 == 0
        owner = self._slice(at, n_elements * DTYPES[dtype].itemsize).view(DTYPES[dtype])
        return View(owner.data_ptr(), n_elements, dtype, owner)

    def plane(self, at: int, n_bits: int) -> View:
        words = self._slice(at, (n_bits + 63) // 64 * 8).view(torch.int64)
        view = View(words.data_ptr(), n_bits, DType.F32, words)
        self.put("compute", lambda: _ignore(words.zero_()), writes=[self.ring_bytes(view)])
        return view

    def upload(self, transfers: Sequence[Transfer]) -> Work:
        def run() -> None:
            for one in transfers:
                ctypes.memmove(self._ring_address + one.at, one.address, one.n_bytes)

        host, ring = self._both(transfers)
        return self.put("upload", run, reads=host, writes=ring)

    @contextmanager
    def compute(self, after: Any) -> Iterator[_Later]:
        later = _Later()
        self.put("compute", lambda: None, after=[_work(after)])
        with self._scratch:
            yield later
        later.work = self.put("compute", lambda: None)

    def download(self, transfers: Sequence[Transfer], after: Any) -> Work:
        def run() -> None:
            for one in transfers:
                ctypes.memmove(one.address, self._ring_address + one.at, one.n_bytes)

        host, ring = self._both(transfers)
        return self.put("download", run, after=[_work(after)], reads=ring, writes=host)

    def drain(self) -> None:
        self.n_drains += 1
        with self._lock:
            while any(self._waiting.values()):
                self._step()
            self._known |= (1 << self._n_works) - 1
            self._unknown.clear()

    def peak_bytes(self) -> int:
        assert self._ring is not None
        self.peak_scratch = self._scratch.peak
        return self._ring.numel() + self.peak_scratch

    def close(self) -> None:
        assert self.is_open
        self.drain()
        self.is_open = False

    # -- queues -----------------------------------------------------------------------------------------

    def put(
        self,
        queue: str,
        run: Callable[[], None],
        *,
        after: Sequence[Work] = (),
        reads: Sequence[Bytes] = (),
        writes: Sequence[Bytes] = (),
    ) -> Work:
        """Put work into a queue.

        Raises:
            AssertionError: it touches bytes that unfinished work touches, without being ordered after that.
        """
        with self._lock:
            self.fault(queue, self.counts[queue])
            number = self.counts[queue]
            self.counts[queue] += 1
            before = self._known
            last = self._last[queue]
            for other in (*after, *([] if last is None else [last])):
                before |= other.before | other.bit

            def run_with_faults() -> None:
                self.late_fault(queue, number)
                run()

            bit = 1 << self._n_works
            work = Work(self, run_with_faults, list(after), list(reads), list(writes), bit, before)
            self._n_works += 1
            for other in self._unknown:
                if not other.bit & before:
                    _check_apart(work, other)
            self._unknown.append(work)
            self._last[queue] = work
            self._waiting[queue].append(work)
            if self.seed is None:
                while not work.done:
                    self._step()
            return work

    def finish(self, work: Work) -> None:
        """Run what is drawn until some work is done; the host knows it then."""
        with self._lock:
            while not work.done:
                self._step()
            self._known |= work.before | work.bit
            self._unknown = [other for other in self._unknown if not other.bit & self._known]
            if work.error is not None:
                raise MergeError(f"cuda:0: {work.error}")

    def check_unused(self, address: int, n_bytes: int) -> None:
        """Raise unless the host knows that nothing uses these bytes of its memory any more."""
        lent = Work(self, lambda: None, [], [], [Bytes("host", address, address + n_bytes)], 0, 0)
        with self._lock:
            for other in self._unknown:
                _check_apart(lent, other)

    def _step(self) -> None:
        ready = [q for q in QUEUES if self._waiting[q] and all(w.done for w in self._waiting[q][0].after)]
        work = self._waiting[self._drawn.choice(ready)].popleft()
        try:
            if self._broken is not None:
                raise self._broken
            work.run()
        except OutOfDeviceMemory as error:
            work.error = error
        except Exception as error:
            work.error = self._broken = error  # as of a context, which never works again
        work.done = True

    def _both(self, transfers: Sequence[Transfer]) -> tuple[list[Bytes], list[Bytes]]:
        host = [Bytes("host", one.address, one.address + one.n_bytes) for one in transfers]
        ring = [Bytes("ring", one.at, one.at + one.n_bytes) for one in transfers]
        assert all(self._host.begin <= one.begin and one.end <= self._host.end for one in host), "not pinned"
        assert self._ring is not None
        assert all(one.begin >= 0 and one.end <= self._ring.numel() for one in ring)
        return host, ring

    @property
    def _ring_address(self) -> int:
        assert self._ring is not None
        return self._ring.data_ptr()

    def _slice(self, at: int, n_bytes: int) -> Tensor:
        assert self._ring is not None
        assert 0 <= at <= at + n_bytes <= self._ring.numel()
        return self._ring[at : at + n_bytes]

    def ring_bytes(self, view: View) -> Bytes:
        at = view.address - self._ring_address
        return Bytes("ring", at, at + view.owner.numel() * view.owner.element_size())


class Deferred:
    """A backend whose results are there when the queue of computations has come to them."""

    def __init__(self, device: HostDouble) -> None:
        self.name = device.inner.name
        self.device = device
        self.inner: Any = device.inner
        if isinstance(device.inner, TrimmingBackend):
            self.combine_trimmed = self._combine_trimmed

    def why_not(self, table: WorkTable) -> str | None:
        found: str | None = self.inner.why_not(table)
        return found

    def thresholds(self, table: WorkTable, *arguments: Any) -> Any:
        return self._ask(table, lambda: self.inner.thresholds(table, *arguments))

    def nth_equal(self, table: WorkTable, *arguments: Any) -> Any:
        return self._ask(table, lambda: self.inner.nth_equal(table, *arguments))

    def measure(self, table: WorkTable, *arguments: Any) -> Any:
        return self._ask(table, lambda: self.inner.measure(table, *arguments))

    def row_masks(self, table: WorkTable, *arguments: Any) -> None:
        planes = [self.device.ring_bytes(plane) for entry in table.entries for plane in entry.masks]
        self._later(table, lambda: self.inner.row_masks(table, *arguments), planes)

    def combine(self, table: WorkTable, *arguments: Any) -> None:
        outs = [self.device.ring_bytes(entry.out) for entry in table.entries if entry.out is not None]
        self._later(table, lambda: self.inner.combine(table, *arguments), outs)

    def _combine_trimmed(self, table: WorkTable, *arguments: Any) -> None:
        outs = [self.device.ring_bytes(entry.out) for entry in table.entries if entry.out is not None]
        self._later(table, lambda: self.inner.combine_trimmed(table, *arguments), outs)

    def _later(self, table: WorkTable, run: Callable[[], None], writes: list[Bytes]) -> Work:
        work = self.device.put("compute", run, reads=self._inputs(table), writes=writes)
        error = work.error
        if isinstance(error, OutOfDeviceMemory):  # allocations fail where they are made
            work.error = None
            try:
                raise error
            finally:
                del error  # with its frames it would keep alive what was allocated
        return work

    def _ask(self, table: WorkTable, run: Callable[[], Any]) -> Any:
        answers: list[Any] = []
        self._later(table, lambda: answers.append(run()), []).wait()
        return answers[0]

    def _inputs(self, table: WorkTable) -> list[Bytes]:
        views = (
            view
            for entry in table.entries
            for view in (entry.base, *entry.models, *entry.scores, *entry.masks)
            if view is not None
        )
        return [self.device.ring_bytes(view) for view in views]


class ResumableDeferred(Deferred):
    """The same of a backend with resumable forms; their state is read where the queue has come to."""

    def select(self, *arguments: Any) -> Any:
        return _Parts(self, self.inner.select(*arguments))

    def accumulate(self, *arguments: Any) -> Any:
        return _Parts(self, self.inner.accumulate(*arguments))

    def count_equal(self, table: WorkTable, *arguments: Any) -> Any:
        return self._ask(table, lambda: self.inner.count_equal(table, *arguments))


@dataclass
class _Parts:
    """`Selection` and `Accumulation`."""

    backend: Deferred
    state: Any

    def sample(self, table: WorkTable, *arguments: Any) -> None:
        self.backend._later(table, lambda: self.state.sample(table, *arguments), [])

    def count(self, table: WorkTable, *arguments: Any) -> None:
        self.backend._later(table, lambda: self.state.count(table, *arguments), [])

    def measure(self, table: WorkTable, *arguments: Any) -> None:
        self.backend._later(table, lambda: self.state.measure(table, *arguments), [])

    def guesses(self, *arguments: Any) -> Any:
        return self.backend._ask(WorkTable([], 0), lambda: self.state.guesses(*arguments))

    def finish(self) -> Any:
        return self.backend._ask(WorkTable([], 0), self.state.finish)


class _Scratch(TorchDispatchMode):
    """Counts the bytes of tensors that a torch backend allocates and still holds.

    Raises:
        OutOfDeviceMemory: beyond `limit`.
    """

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = limit
        self.held = self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self) -> Any:
        return super().__enter__() if self.limit is not None else self

    def __exit__(self, *error: Any) -> None:
        if self.limit is not None:
            super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        assert self.limit is not None
        self._storages = {key: one for key, one in self._storages.items() if not one[0].expired()}
        self.held = sum(n_bytes for _, n_bytes in self._storages.values())
        if self.held > self.limit:
            raise OutOfDeviceMemory(f"cuda:0: {self.held} bytes of scratch, {self.limit} are allowed")
        self.peak = max(self.peak, self.held)
        return found


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(tuple(found.values()))
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)


def _work(ticket: Any) -> Work:
    found = ticket.work if isinstance(ticket, _Later) else ticket
    assert isinstance(found, Work)
    return found


def _check_apart(work: Work, other: Work) -> None:
    for mine, theirs in ((work.writes, other.reads + other.writes), (work.reads, other.writes)):
        for one in mine:
            for two in theirs:
                assert not one.meets(two), f"{one} is used while {two} may still be in use"


def _ignore(value: object) -> None: ...
