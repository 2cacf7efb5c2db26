"""A merge without arithmetic: a small layout, the bytes that belong in it, and runs that stage them."""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvfast.checkpoint.layout import PAGE, Layout, make_layout
from tvfast.engine.staging import Staging
from tvfast.ops.host import crc32c

Unit = tuple[int, int, int]
"""Shard, offset in its file, n_bytes."""

COMPANIONS = {"config.json": b'{"model_type": "none"}\n', "templates/chat.jinja": b"{{ messages }}"}

IDENTITY: dict[str, Any] = {
    "version": "0.1.0",
    "recipe": "5f1d",
    "seed": 0,
    "inputs": {
        "models/base": [{"name": "model.safetensors", "size": 100, "mtime_ns": 10**18, "crc32": 7}],
        "models/math": [{"name": "model.safetensors", "size": 100, "mtime_ns": 10**18 + 1, "crc32": 8}],
    },
}


def changed_identity(**changes: Any) -> dict[str, Any]:
    """`IDENTITY` with other values of top-level keys."""
    return {**copy.deepcopy(IDENTITY), **changes}


def small_layout(n_shards: int = 3, tag: str = "w") -> Layout:
    """Shards of some pages whose tensors end inside of pages; one tensor is empty."""
    tensors = []
    for shard in range(n_shards):
        for part, n in enumerate((5000, 0, 4096, 7001, 20000 + shard)):
            tensors.append((f"{tag}.{shard}.{part}", "U8", (n,)))
    return make_layout(tensors, 5000 + 4096 + 7001 + 20000 + n_shards, {})


def large_layout() -> Layout:
    """One shard with a tensor that is written directly, between two that are not."""
    return make_layout([("a", "U8", (100,)), ("b", "F16", (700_001,)), ("c", "U8", (9000,))], 2**30, {})


def contents(layout: Layout, seed: int = 0) -> list[bytes]:
    """What the shards' files shall hold."""
    drawn = random.Random(seed)
    return [shard.header + drawn.randbytes(shard.n_bytes - len(shard.header)) for shard in layout.shards]


def units_of(layout: Layout) -> list[Unit]:
    """One unit a tensor."""
    return [(place.shard, place.offset, place.n_bytes) for place in layout.places.values()]


def recut(layout: Layout, seed: int) -> list[Unit]:
    """Other units that cover the same bytes."""
    drawn = random.Random(seed)
    units = []
    for number, shard in enumerate(layout.shards):
        at = len(shard.header)
        while at < shard.n_bytes:
            n = min(drawn.randint(1, 9000), shard.n_bytes - at)
            units.append((number, at, n))
            at += n
    return units


def expected(layout: Layout, seed: int = 0) -> dict[str, bytes]:
    """All files of a finished output but the manifest."""
    found = {shard.name: data for shard, data in zip(layout.shards, contents(layout, seed), strict=True)}
    if layout.index is not None:
        found["model.safetensors.index.json"] = layout.index
    return {**found, **COMPANIONS}


class Memory:
    """Bytes at an address that is congruent to a file offset modulo a page, plus `skew`."""

    def __init__(self, data: bytes, offset: int, skew: int = 0) -> None:
        start = (offset + skew) % PAGE
        self._map = mmap.mmap(-1, start + len(data) + 1)
        self._map[start : start + len(data)] = data
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + start
        self.view = memoryview(self._map)[start : start + len(data)]


def write_units(staging: Staging, data: Sequence[bytes], units: Iterable[Unit], skew: int = 0) -> list[Unit]:
    """Writes what is not done yet; returns it."""
    written = []
    for shard, offset, n_bytes in units:
        if staging.is_done(shard, offset, n_bytes):
            continue
        memory = Memory(data[shard][offset : offset + n_bytes], offset, skew)
        staging.write(shard, offset, memory.view, memory.address)
        staging.done(shard, offset, n_bytes, crc32c(memory.address, n_bytes))
        written.append((shard, offset, n_bytes))
    return written


def merge(
    out: str | os.PathLike[str],
    layout: Layout,
    *,
    identity: dict[str, Any] = IDENTITY,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    units: Sequence[Unit] | None = None,
    skew: int = 0,
    inputs: Sequence[str] = (),
) -> list[Unit]:
    """A whole run; returns the units that it wrote."""
    written: list[Unit] = []
    with Staging.open(
        os.fspath(out), layout, identity, resume=resume, overwrite=overwrite, inputs=inputs
    ) as staging:
        if not staging.finished:
            written = write_units(staging, contents(layout, seed), units or units_of(layout), skew)
            for name, data in COMPANIONS.items():
                staging.add_file(name, data)
            staging.commit()
    return written


def begin(
    out: str | os.PathLike[str], layout: Layout, n_units: int, *, overwrite: bool = False
) -> list[Unit]:
    """A run that ends after some units."""
    with Staging.open(os.fspath(out), layout, IDENTITY, resume=False, overwrite=overwrite) as staging:
        return write_units(staging, contents(layout), units_of(layout)[:n_units])


def files_in(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every file below a directory."""
    root = Path(folder)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@contextmanager
def folder_in_memory(otherwise: Path) -> Iterator[Path]:
    """A directory in memory where the machine has one: hundreds of syncs take long on a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield otherwise
        return
    with tempfile.TemporaryDirectory(prefix="tvfast-test-", dir=memory) as folder:
        yield Path(folder)


def is_model(out: str | os.PathLike[str]) -> bool:
    """Whether a loader would take `out` for a checkpoint."""
    names = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
    return any(os.path.exists(os.path.join(out, name)) for name in names)


def points(n: int, count: int, seed: int = 0) -> Iterator[int]:
    """Some of 0..n-1: the ends, and others drawn at random."""
    drawn = random.Random(seed).sample(range(n), min(n, count))
    yield from sorted({0, n - 1, *drawn})
