"""What the machine needs to move a merge's bytes without merging them.

Warm: `cat` of the inputs to /dev/null, then `cp` of as many bytes as the merge writes and `sync -d` of them.
Cold: the inputs read by cat, and with O_DIRECT by one to eight threads, the best of these; and the output's
bytes written with O_DIRECT.

Moved: the inputs read through the page cache by some threads, while as many bytes as the merge writes go with
O_DIRECT into a preallocated file, and are synced: what a merge does beside merging, by the same calls.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.checkpoints.running import evict, remove, run, total_bytes

_BLOCK = 8 << 20
_PAGE = 4096
DEPTHS = (1, 2, 4, 8)


def warm_limit(inputs: Sequence[Path], like: Sequence[Path], scratch: Path) -> dict[str, float]:
    """Seconds of cat, and of cp with sync -d; `like` are files with the bytes to write."""
    cat = _shell('cat "$@" > /dev/null', inputs)
    remove(scratch)
    scratch.mkdir(parents=True)
    try:
        cp = _shell(f'cp "$@" "{scratch}" && sync -d "{scratch}"/*', like)
    finally:
        remove(scratch)
    return {"cat_s": cat, "cp_s": cp, "seconds": cat + cp}


def moved(inputs: Sequence[Path], scratch: Path, n_bytes: int, threads: int = 2) -> float:
    """Seconds of reading every input while `n_bytes` go to one file of whole pages, and of fdatasync.

    Past the page cache, as a merge writes: through it, the same bytes have waited for their turn among those
    of other processes, and for memory. What is deleted before and after is not in the figure.
    """
    n_bytes += -n_bytes % _PAGE
    reads = [(path, place) for path in inputs for place in range(0, path.stat().st_size, _BLOCK)]
    writes = range(0, n_bytes, _BLOCK)
    sources = {path: os.open(path, os.O_RDONLY) for path in inputs}
    remove(scratch)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    target = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        os.posix_fallocate(target, 0, n_bytes)

        def move(mine: int) -> None:
            block = mmap.mmap(-1, _BLOCK)
            own, sought = writes[mine::threads], reads[mine::threads]
            for number, (path, place) in enumerate(sought):
                os.preadv(sources[path], [block], place)
                for at in own[len(own) * number // len(sought) : len(own) * (number + 1) // len(sought)]:
                    part = memoryview(block)[: n_bytes - at]
                    if os.pwrite(target, part, at) != len(part):
                        raise OSError(f"{scratch}: fewer than {len(part)} bytes written at {at}")

        _in_threads(threads, range(threads), move)
        os.fdatasync(target)
        return time.perf_counter() - start
    finally:
        for descriptor in (target, *sources.values()):
            os.close(descriptor)
        remove(scratch)


def _shell(script: str, files: Sequence[Path]) -> float:
    return run(["/bin/sh", "-c", script, "sh", *map(str, files)]).seconds


def cold_reads(inputs: Sequence[Path], depths: Sequence[int] = DEPTHS) -> dict[str, Any]:
    """GB/s of reading every input once: by cat, and with O_DIRECT by so many threads."""
    n_bytes = total_bytes(inputs)
    evict(inputs)
    seconds = {"cat": _shell('cat "$@" > /dev/null', inputs)}
    for depth in depths:
        evict(inputs)
        seconds[str(depth)] = _direct_read(inputs, depth)
    best = min(seconds, key=lambda way: seconds[way])
    return {
        "gb_per_s": {way: n_bytes / taken / 1e9 for way, taken in seconds.items()},
        "best": best,
        "seconds": seconds[best],
        "n_bytes": n_bytes,
    }


def direct_write(scratch: Path, n_bytes: int, threads: int = 2) -> float:
    """Seconds of writing a preallocated file of whole pages with O_DIRECT, and fdatasync."""
    n_bytes += -n_bytes % _PAGE
    remove(scratch)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)

        def write(places: range) -> None:
            block = mmap.mmap(-1, _BLOCK)
            block.write(os.urandom(_PAGE) * (_BLOCK // _PAGE))
            for place in places:
                part = memoryview(block)[: n_bytes - place]
                written = os.pwrite(descriptor, part, place)
                if written != len(part):
                    raise OSError(f"{scratch}: {written} of {len(part)} bytes written at {place}")

        _in_threads(threads, [range(k * _BLOCK, n_bytes, threads * _BLOCK) for k in range(threads)], write)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
        remove(scratch)
    return time.perf_counter() - start


def _direct_read(inputs: Sequence[Path], threads: int) -> float:
    """Seconds; blocks of all files are dealt to the threads in turn."""
    blocks = [(path, place) for path in inputs for place in range(0, path.stat().st_size, _BLOCK)]
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in inputs}

    def read(mine: Sequence[tuple[Path, int]]) -> None:
        block = mmap.mmap(-1, _BLOCK)
        for path, place in mine:
            if not os.preadv(descriptors[path], [block], place):
                raise OSError(f"{path}: nothing at {place}")

    try:
        start = time.perf_counter()
        _in_threads(threads, [blocks[k::threads] for k in range(threads)], read)
        return time.perf_counter() - start
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _in_threads(threads: int, parts: Sequence[Any], work: Any) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, part) for part in parts]:
            done.result()
