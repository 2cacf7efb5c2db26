"""crc32c of ranges of files, by a few threads that read large pieces."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tvfast.checkpoint.layout import Shard
from tvfast.engine.journal import Coverage, Record
from tvfast.engine.memory import Arena, Block
from tvfast.errors import MergeError, OutputError
from tvfast.ops.host import crc32c, crc32c_combine

_BUFFER_BYTES = 4 * 2**20
_MAX_THREADS = 4
_RANGE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of one file."""

    path: str
    offset: int
    n_bytes: int


def checksums(ranges: Sequence[Range]) -> list[int | None]:
    """The crc32c of every range; None of those that cannot be read, or end before they should."""
    if not ranges:
        return []
    n_threads = min(_MAX_THREADS, len(ranges))
    arena = Arena(n_threads * _BUFFER_BYTES)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(lambda item: _checksum_in(item, arena), ranges))
    finally:
        arena.close()


def file_checksum(path: str, n_bytes: int) -> int | None:
    """The crc32c of a file's first `n_bytes`; None where they cannot be read."""
    ranges = [
        Range(path, start, min(_RANGE_BYTES, n_bytes - start)) for start in range(0, n_bytes, _RANGE_BYTES)
    ]
    return combined(zip((r.n_bytes for r in ranges), checksums(ranges), strict=True))


def combined(parts: Iterable[tuple[int, int | None]]) -> int | None:
    """The crc32c of consecutive parts, given as (n_bytes, crc32c); None if one of them is."""
    total = 0
    for n_bytes, crc in parts:
        if crc is None:
            return None
        total = crc32c_combine(total, crc, n_bytes)
    return total


def known_coverage(number: int, shard: Shard) -> Coverage:
    """What is finished of a shard's data before any tensor is: its fills."""
    coverage = Coverage()
    for offset, data in shard.fills:
        memory = ctypes.create_string_buffer(data, len(data))
        crc = crc32c(ctypes.addressof(memory), len(data))
        coverage.add(Record(number, offset, len(data), crc))
    return coverage


def shard_checksum(shard: Shard, path: str, coverage: Coverage) -> int:
    """The crc32c of a finished shard's file, from those of what was written to it.

    Raises:
        MergeError: bytes are missing.
        OutputError: what has no checksum yet cannot be read.
    """
    start = len(shard.header)
    gap = coverage.first_gap(start, shard.n_bytes)
    if gap is not None:
        raise MergeError(
            f"{shard.name}: byte {gap} and more have not been merged, so the output is not complete. "
            "Run again with --resume."
        )
    pieces = [(0, start, None), *coverage.pieces(start, shard.n_bytes)]
    unknown = [Range(path, offset, n_bytes) for offset, n_bytes, crc in pieces if crc is None]
    computed = iter(checksums(unknown))
    total = combined((n_bytes, next(computed) if crc is None else crc) for _, n_bytes, crc in pieces)
    if total is None:
        raise OutputError(f"{path}: cannot be read back. Run again with --resume.")
    return total


def _checksum_in(item: Range, arena: Arena) -> int | None:
    with arena.acquire(_BUFFER_BYTES) as block:
        try:
            fd = os.open(item.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _checksum(fd, item, block)
        except OSError:
            return None
        finally:
            os.close(fd)


def _checksum(fd: int, item: Range, block: Block) -> int | None:
    crc = 0
    done = 0
    while done < item.n_bytes:
        wanted = min(_BUFFER_BYTES, item.n_bytes - done)
        n_read = os.preadv(fd, [block.view[:wanted]], item.offset + done)
        if n_read == 0:
            return None
        crc = crc32c(block.address, n_read, crc)
        done += n_read
    return crc
