"""Disks that are full, refuse direct writes or take less than was asked; and how bytes reach them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.staged import (
    IDENTITY,
    Memory,
    Unit,
    contents,
    expected,
    files_in,
    folder_in_memory,
    is_model,
    large_layout,
    merge,
    small_layout,
    units_of,
    write_units,
)
from tvfast.checkpoint.layout import PAGE, Layout, make_layout
from tvfast.engine import durable, shards
from tvfast.engine.staging import Staging
from tvfast.errors import OutputError


@pytest.fixture(params=["disk", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk, and one on a filesystem in memory."""
    if request.param == "disk":
        yield tmp_path / "out"
    elif not os.access("/dev/shm", os.W_OK):
        pytest.skip("this machine has no /dev/shm")
    else:
        with folder_in_memory(tmp_path) as folder:
            yield folder / "out"


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """Every write of this process: whether it is direct, its offset, its length."""
    made: list[tuple[bool, int, int]] = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        made.append((is_direct(fd), offset, len(data)))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return made


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_large_data_goes_past_the_page_cache(out: Path, writes: list[tuple[bool, int, int]]) -> None:
    layout = large_layout()
    merge(out, layout)
    place = layout.places["b"]
    first, last = -(-place.offset // PAGE) * PAGE, (place.offset + place.n_bytes) // PAGE * PAGE
    direct = [(offset, n) for is_direct, offset, n in writes if is_direct]
    assert direct in ([(first, last - first)], [])
    if not direct:
        pytest.skip("this filesystem takes no direct writes")
    # No page of a direct write holds a byte of another tensor.
    assert (False, place.offset, first - place.offset) in writes
    assert (False, last, place.offset + place.n_bytes - last) in writes
    assert files_in(out).items() >= expected(layout).items()


def test_data_that_lies_otherwise_is_written_all_the_same(
    out: Path, writes: list[tuple[bool, int, int]]
) -> None:
    layout = large_layout()
    merge(out, layout, skew=1)
    assert not any(is_direct for is_direct, _, _ in writes)
    assert files_in(out).items() >= expected(layout).items()


def test_long_data_is_written_in_pieces(
    out: Path, writes: list[tuple[bool, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 16 * PAGE)
    layout = large_layout()
    for skew in (0, 1):
        writes.clear()
        merge(out, layout, skew=skew, overwrite=True)
        assert max(n for _, offset, n in writes if offset >= PAGE) == 16 * PAGE
        assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_filesystem_that_refuses_direct_writes(
    out: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real_open, real_pwrite, refused = os.open, os.pwrite, []

    def refuse() -> None:
        refused.append(1)
        raise OSError(errno.EINVAL, "Invalid argument")

    def fake_open(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        if flags & os.O_DIRECT:
            refuse()
        return real_open(path, flags, mode, **options)

    def fake_pwrite(fd: int, data: memoryview, offset: int) -> int:
        if is_direct(fd):
            refuse()
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, call, fake_open if call == "open" else fake_pwrite)
    tensors = [(f"w{i}", "U8", (600_000,)) for i in range(4)]
    layout = make_layout(tensors, 2**30, {})
    merge(out, layout)
    assert len(refused) == 1, "once is enough"
    assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("seed", range(4))
def test_short_writes_are_continued(out: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    real, drawn = os.pwrite, random.Random(seed)

    def short(fd: int, data: memoryview, offset: int) -> int:
        n = drawn.randint(1, len(data))
        if is_direct(fd):
            # What direct writes may do: end at a block of the device, or, at the end of its space, anywhere.
            taken = n if drawn.random() < 0.3 else n // 512 * 512
            done = real(fd, data[: taken // PAGE * PAGE], offset) if taken >= PAGE else 0
            if taken > done:
                other = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
                done += real(other, data[done:taken], offset + done)
                os.close(other)
            return taken or real(fd, data[:PAGE], offset)
        return real(fd, data[:n], offset)

    monkeypatch.setattr(os, "pwrite", short)
    for layout in (large_layout(), small_layout()):
        merge(out, layout, overwrite=True)
        assert files_in(out).items() >= expected(layout).items()


def test_a_write_that_makes_no_progress_is_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0 if len(data) > 4096 else real(fd, data, at))
    for layout in (large_layout(), small_layout()):
        with pytest.raises(OutputError, match=r"cannot write .* bytes at .* wrote nothing"):
            merge(out, layout, overwrite=True)


def test_more_shards_than_descriptors(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    layout = make_layout([(f"w{i}", "U8", (300_000,)) for i in range(7)], 300_000, {})
    data, units = contents(layout), units_of(layout)
    before = len(os.listdir("/proc/self/fd"))
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        write_units(staging, data, [u for i in (0, 3, 6, 1, 4, 0, 2, 5) for u in [units[i]]])
        assert len(os.listdir("/proc/self/fd")) <= before + 2 + 2 * 2
        staging.commit()
    assert len(os.listdir("/proc/self/fd")) == before
    assert [files_in(out)[shard.name] for shard in layout.shards] == data


# Full disks.


class Filling:
    """A disk that takes some bytes more, and then fails every write that is not direct or comes later."""

    def __init__(self, room: int, code: int) -> None:
        self.room = room
        self.code = code
        self._pwrite = os.pwrite

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        if self.room <= 0:
            raise OSError(self.code, os.strerror(self.code))
        n = len(data) if is_direct(fd) else min(len(data), self.room)
        self.room -= n
        return self._pwrite(fd, data[:n], offset)


def write_until_full(staging: Staging, layout: Layout, finished: list[Unit]) -> None:
    for unit in units_of(layout):
        write_units(staging, contents(layout), [unit])
        finished.append(unit)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize(("layout", "n_bytes"), [(small_layout(), 60_000), (large_layout(), 700_000)])
def test_a_failing_write_anywhere_keeps_what_is_finished(
    out: Path, layout: Layout, n_bytes: int, code: int
) -> None:
    drawn = random.Random(code)
    for _ in range(5):
        shutil.rmtree(out, ignore_errors=True)
        finished: list[Unit] = []
        with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "pwrite", Filling(drawn.randrange(n_bytes), code))
                with pytest.raises(OutputError, match=r"cannot write .*--resume") as caught:
                    write_until_full(staging, layout, finished)
            assert ("bytes are free" in str(caught.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
            assert ("ulimit" in str(caught.value)) == (code == errno.EFBIG)
        written = merge(out, layout, resume=True)
        assert [u for u in units_of(layout) if u[2] and u not in written] == [u for u in finished if u[2]]
        assert files_in(out).items() >= expected(layout).items()


def test_a_real_size_limit(out: Path) -> None:
    """The process may not write beyond 200,000 bytes of a file, as under `ulimit -f`."""
    layout = large_layout()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for skew in (0, 1):
        shutil.rmtree(out, ignore_errors=True)
        with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            try:
                with pytest.raises(OutputError, match=r"File too large.*ulimit -f.*--resume"):
                    write_units(staging, contents(layout), units_of(layout), skew)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert merge(out, layout, resume=True) == units_of(layout)[1:]
        assert files_in(out).items() >= expected(layout).items()


def test_a_real_size_limit_at_the_start(out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot allocate \d+ bytes: File too large.*ulimit -f"):
            merge(out, large_layout())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()


def huge_layout() -> Layout:
    return make_layout([("w", "U8", (2**43,))], 2**50, {})


@pytest.mark.parametrize("overwrite", [False, True])
def test_room_is_checked_before_anything_is_written(out: Path, overwrite: bool) -> None:
    layout = huge_layout()
    if overwrite:
        merge(out, small_layout())
        before = files_in(out)
    with pytest.raises(
        OutputError, match=rf"the merge needs {layout.n_bytes} bytes, \d+ are free\. Free space"
    ):
        merge(out, layout, overwrite=overwrite)
    if overwrite:
        assert files_in(out) == before
    assert (out / ".tvfast").exists() is False
    assert out.exists() is overwrite


def test_allocation_may_find_the_disk_full(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = durable._call_fallocate, []
    assert real is not None

    def full(fd: int, mode: int, offset: int, n_bytes: int) -> int:
        sizes.append(n_bytes)
        if len(sizes) < 3:
            return real(fd, mode, offset, n_bytes)
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(durable, "_call_fallocate", full)
    layout = small_layout()
    with pytest.raises(OutputError, match=rf"the merge needs {layout.n_bytes} bytes, \d+ are free"):
        merge(out / "deep" / "er", layout)
    assert sizes == [shard.n_bytes for shard in layout.shards]
    assert not out.exists()


def test_companions_need_room_too(out: Path) -> None:
    layout = small_layout()
    with pytest.raises(OutputError, match=rf"needs {layout.n_bytes + 2**60} bytes"):
        Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False, spare_bytes=2**60)
    assert not out.exists()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, None])
def test_a_filesystem_that_cannot_allocate(
    out: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(fd: int, mode: int, offset: int, n_bytes: int) -> int:
        ctypes.set_errno(code or 0)
        return -1

    monkeypatch.setattr(durable, "_call_fallocate", refuse if code else None)
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=True, overwrite=False):
        staged = out / ".tvfast" / "files"
        assert all((staged / shard.name).stat().st_size == shard.n_bytes for shard in layout.shards)
    shutil.rmtree(out)
    merge(out, layout)
    assert files_in(out).items() >= expected(layout).items()


def test_space_is_really_taken(out: Path) -> None:
    layout = large_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False):
        staged = (out / ".tvfast" / "files" / layout.shards[0].name).stat()
        assert staged.st_size == layout.n_bytes
        assert staged.st_blocks * 512 >= layout.n_bytes


@pytest.mark.parametrize("name", ["config.json", "tvfast_manifest.json", "manifest.json.new", "journal"])
def test_small_files_that_do_not_fit(out: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    layout = small_layout()
    real, broken = os.pwrite, True

    def full(fd: int, data: memoryview, offset: int) -> int:
        if broken and os.readlink(f"/proc/self/fd/{fd}").endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        OutputError, match=rf"{name.removesuffix('.new')}: .*No space left on device.*are free"
    ):
        merge(out, layout)
    assert not is_model(out)
    broken = False
    merge(out, layout, resume=True)
    assert files_in(out).items() >= expected(layout).items()


def test_no_framework_is_loaded() -> None:
    code = "import sys, tvfast.engine.staging; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_is_placed_as_these_tests_say() -> None:
    memory = Memory(b"abc", 5, 1)
    assert memory.address % PAGE == 6
    assert bytes(memory.view) == b"abc"
