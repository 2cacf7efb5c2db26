"""Parts of tensors of several checkpoints in memory, the next ones being read while one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from tvfast.checkpoint.files import OpenFile, open_regular
from tvfast.engine.arrange import Arrangement, Part, arrange, block_bytes
from tvfast.engine.assembly import Assembly
from tvfast.engine.conversions import widen_inputs
from tvfast.engine.inputs import N_READERS, REQUEST
from tvfast.engine.memory import Arena, Block
from tvfast.engine.reading import descriptor_of, fill
from tvfast.engine.run import raise_file_limit
from tvfast.program import DType, Entry, View

_IN_FLIGHT = 3  # one chunk is used, two are read


@dataclass(frozen=True, slots=True)
class Loaded:
    """A part in memory: the entry of its task vectors, and that of the base alone."""

    part: Part
    entry: Entry
    base: Entry


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Parts that are being read."""

    parts: Sequence[Part]
    arrangement: Arrangement
    block: Block
    reads: Sequence[Future[None]]


class Reader:
    """Reads parts whose tasks have a base; a context manager.

    Args:
        chunk_bytes: of inputs that are in memory together; three times that is taken.
        told: how many bytes were read, from several threads.
    """

    def __init__(self, chunk_bytes: int, told: Callable[[int], None]) -> None:
        self.chunk_bytes = chunk_bytes
        self._told = told
        self._pool = ThreadPoolExecutor(N_READERS, "tvfast-read")
        self._files = ExitStack()
        self._opened: dict[str, OpenFile] = {}
        self._arena = Arena(_IN_FLIGHT * (chunk_bytes + REQUEST))

    def __enter__(self) -> Reader:
        raise_file_limit()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()
        self._arena.close()

    def loaded(self, parts: Sequence[Part]) -> Iterator[list[Loaded]]:
        """Parts in order, as many together as a chunk holds; valid until the next are asked for.

        Raises:
            CheckpointError: a file is shorter than its header says, or cannot be read.
        """
        waiting = _gathered(parts, self.chunk_bytes)
        ahead: deque[_Ahead] = deque()
        while True:
            while len(ahead) < _IN_FLIGHT - 1 and (group := next(waiting, None)):
                ahead.append(self._begin(group))
            if not ahead:
                return
            one = ahead.popleft()
            with one.block:
                for read in one.reads:
                    read.result()
                widen_inputs(one.parts, one.arrangement, one.block.address)
                yield [
                    _entries(part, one.block.address, at)
                    for part, at in zip(one.parts, one.arrangement.inputs, strict=True)
                ]

    def _begin(self, parts: Sequence[Part]) -> _Ahead:
        arrangement = arrange(parts, None)
        block = self._arena.acquire(arrangement.n_bytes)
        reads = []
        for extent in arrangement.extents:
            file = self._file(extent.path)
            for at in range(0, extent.n_bytes, REQUEST):
                n = min(REQUEST, extent.n_bytes - at)
                view = block.view[extent.at + at : extent.at + at + n]
                reads.append(self._pool.submit(self._read, file, extent.offset + at, view))
        reads += [
            self._pool.submit(self._assemble, some, block.view)
            for assembly in arrangement.assemblies
            for some in assembly.pieces()
        ]
        return _Ahead(parts, arrangement, block, reads)

    def _file(self, path: str) -> OpenFile:
        if path not in self._opened:
            self._opened[path] = self._files.enter_context(open_regular(path))
        return self._opened[path]

    def _assemble(self, some: Assembly, view: memoryview) -> None:
        some.fill(view, descriptor_of)
        self._told(some.n_bytes)

    def _read(self, file: OpenFile, offset: int, view: memoryview) -> None:
        fill(file, offset, view)
        self._told(len(view))


def _gathered(parts: Iterable[Part], chunk_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    used = 0
    for part in parts:
        size = block_bytes(part)
        if group and used + size > chunk_bytes:
            yield group
            group, used = [], 0
        group.append(part)
        used += size
    if group:
        yield group


def _entries(part: Part, address: int, inputs: Sequence[int]) -> Loaded:
    base, *models = (
        View(address + at, part.n, DType[stored.operand])
        for stored, at in zip(part.task.inputs, inputs, strict=True)
    )
    return Loaded(
        part,
        Entry(name=part.task.key, models=tuple(models), base=base, offset=part.start),
        Entry(name=part.task.key, models=(base,), offset=part.start),
    )
