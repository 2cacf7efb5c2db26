"""Reading: exact bytes by any path, and files that change under a merge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tvfast.engine.inputs import REQUEST, Extent, FileState, Inputs
from tvfast.engine.memory import PAGE, Arena, Block
from tvfast.errors import MergeError

CONTENT = os.urandom(1 << 20) * 9 + b"tail"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def block() -> Iterator[Block]:
    arena = Arena(16 << 20)
    with arena.acquire(12 << 20) as found:
        yield found
    arena.close()


def reader(path: Path, *, direct: bool = False, seen: list[int] | None = None) -> Inputs:
    state = FileState.of(path.stat())
    return Inputs({str(path): state}, direct=direct, on_read=(seen if seen is not None else []).append)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("offset", "n_bytes"),
    [
        (0, 10),
        (5, 1),
        (4095, 2),
        (4096, 4096),
        (4097, 8191),
        (7, REQUEST * 2),
        (len(CONTENT) - 3, 3),
        (0, len(CONTENT)),
    ],
)
def test_the_bytes_are_those_of_the_file(
    file: Path, block: Block, offset: int, n_bytes: int, direct: bool
) -> None:
    seen: list[int] = []
    inputs = reader(file, direct=direct, seen=seen)
    at = 2 * PAGE + offset % PAGE
    for future in inputs.read([Extent(str(file), offset, n_bytes, at)], block):
        future.result()
    assert bytes(block.view[at : at + n_bytes]) == CONTENT[offset : offset + n_bytes]
    assert sum(seen) == n_bytes
    inputs.check()
    inputs.close()


def test_a_file_that_shrinks_while_it_is_read_is_named(file: Path, block: Block) -> None:
    inputs = reader(file)
    for future in inputs.read([Extent(str(file), 0, 10, 0)], block):
        future.result()
    os.truncate(file, 100)
    with pytest.raises(MergeError, match=r"data: ends at byte 100, expected 5000"):
        inputs.read([Extent(str(file), 0, 5000, 0)], block)[0].result()
    inputs.close()


def test_a_file_that_changed_since_the_plan_is_refused(file: Path, block: Block) -> None:
    inputs = reader(file)
    file.write_bytes(b"other")
    with pytest.raises(MergeError, match="has 5 bytes, had"):
        inputs.read([Extent(str(file), 0, 5, 0)], block)[0].result()
    inputs.close()


def test_a_file_that_vanished_or_was_touched_is_found_at_the_end(file: Path) -> None:
    inputs = reader(file)
    os.utime(file, ns=(1, 1))
    with pytest.raises(MergeError, match="was modified"):
        inputs.check()
    file.unlink()
    with pytest.raises(MergeError, match="input is gone"):
        inputs.check()
    inputs.close()


def test_a_stopped_reader_ends_at_once(file: Path, block: Block) -> None:
    inputs = reader(file)
    inputs.stop()
    with pytest.raises(MergeError, match="stopped"):
        inputs.read([Extent(str(file), 0, 10, 0)], block)[0].result()
    inputs.close()
