"""Pages of files in the place of memory, on a system that says what its page cache holds."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tvfast.ops.pages import PAGE, ShownPages

CONTENT = os.urandom(100 * PAGE + 123)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cachestat is a call of Linux")


class Memory:
    """Private memory whose pages begin at `address`."""

    def __init__(self, n_bytes: int) -> None:
        self._map = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.view = memoryview(self._map)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def opened(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDONLY)
    if not ShownPages(Memory(PAGE).address, PAGE).show(descriptor, 0, 1, 0):
        pytest.skip("this system does not say what its page cache holds")
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    ("offset", "n_bytes"),
    [
        (0, 1),
        (0, PAGE),
        (1, PAGE),
        (PAGE - 1, 2),
        (3 * PAGE + 7, 50 * PAGE),
        (0, len(CONTENT)),
        (PAGE, len(CONTENT) - PAGE),
    ],
)
def test_shown_bytes_are_those_of_the_file(opened: int, offset: int, n_bytes: int) -> None:
    memory = Memory(120 * PAGE)
    memory.view[:] = b"\7" * len(memory.view)
    pages = ShownPages(memory.address, 120 * PAGE)
    at = 4 * PAGE + offset % PAGE
    assert pages.show(opened, offset, n_bytes, at)
    assert memory.view[at : at + n_bytes] == CONTENT[offset : offset + n_bytes]
    last = -(-(at + n_bytes) // PAGE) * PAGE
    assert memory.view[: 4 * PAGE] == b"\7" * 4 * PAGE
    assert memory.view[last:] == b"\7" * (120 * PAGE - last)
    assert not pages.lost
    pages.hide()
    memory.view[4 * PAGE : last] = b"\1" * (last - 4 * PAGE)


def test_writing_there_leaves_the_file_as_it_is(opened: int, file: Path) -> None:
    memory = Memory(8 * PAGE)
    pages = ShownPages(memory.address, 8 * PAGE)
    assert pages.show(opened, 0, 4 * PAGE, 0)
    memory.view[5] = (CONTENT[5] + 1) % 256
    pages.hide()
    assert file.read_bytes() == CONTENT


def test_what_the_cache_does_not_hold_is_not_shown(opened: int, file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    memory = Memory(101 * PAGE)
    memory.view[0] = 9
    pages = ShownPages(memory.address, 101 * PAGE)
    if pages.show(opened, 0, len(CONTENT), 0):
        pytest.skip("a file system that lives in the page cache")
    assert memory.view[0] == 9


def test_a_file_that_is_shortened_loses_its_range_and_no_other(opened: int, file: Path) -> None:
    memory = Memory(200 * PAGE)
    short, other = ShownPages(memory.address, 100 * PAGE), ShownPages(memory.address + 100 * PAGE, 100 * PAGE)
    assert short.show(opened, 0, 100 * PAGE, 0)
    assert other.show(opened, 0, PAGE, 0)
    os.truncate(file, 10 * PAGE)
    assert bytes(memory.view[20 * PAGE : 30 * PAGE]) == bytes(10 * PAGE)
    assert memory.view[: 10 * PAGE] == CONTENT[: 10 * PAGE]
    assert short.lost
    assert not other.lost
    short.hide()
    assert not short.lost
    assert not short.show(opened, 0, 100 * PAGE, 0)  # it ends before


OTHER = """
import ctypes, faulthandler, mmap, os, sys
from tvfast.ops.pages import ShownPages
if sys.argv[2] == "handled":
    faulthandler.enable()
memory = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pages = ShownPages(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1 << 16)
descriptor = os.open(sys.argv[1], os.O_RDWR)
assert pages.show(descriptor, 0, 1 << 16, 0)
own = mmap.mmap(descriptor, 1 << 16)
os.truncate(sys.argv[1], 0)
assert memory[40000] == 0 and pages.lost
print("ours", flush=True)
own[40000]
"""


@pytest.mark.parametrize("handler", ["handled", "default"])
def test_such_a_fault_elsewhere_ends_the_process_as_before(opened: int, file: Path, handler: str) -> None:
    command = [sys.executable, "-c", OTHER, str(file), handler]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "ours\n"
    assert ("Fatal Python error: Bus error" in done.stderr) == (handler == "handled")
