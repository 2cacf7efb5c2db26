"""What ranks take for finished when one of them has opened the output of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.staged import IDENTITY, contents, small_layout
from tvfast.engine.communicator import Alone
from tvfast.engine.joint import open_staging, publish
from tvfast.engine.journal import Journal
from tvfast.engine.run import Outcome
from tvfast.engine.staging import Staging
from tvfast.errors import OutputError
from tvfast.ops.host import crc32c


class _Second(Alone):
    """Rank 0 of two, or rank 1, which is told what rank 0 has said."""

    size = 2

    def __init__(self, rank: int, said: list[Any]) -> None:
        self.rank = rank
        self.said = said

    def gather(self, value: Any, *, to_all: bool = True) -> list[Any]:
        if self.rank == 0:
            self.said.append(value)
        return [self.said[0], {}]


def write(staging: Staging, data: bytes, offset: int) -> None:
    from ctypes import addressof, create_string_buffer

    memory = create_string_buffer(data, len(data))
    staging.write(0, offset, memoryview(memory), addressof(memory))
    staging.done(0, offset, len(data), crc32c(addressof(memory), len(data)))


def test_all_ranks_take_the_same_bytes_for_finished(tmp_path: Path) -> None:
    """Also where earlier runs have cut the work elsewhere, so that their records overlap."""
    layout = small_layout(1)
    out, data, start = str(tmp_path / "out"), contents(layout)[0], len(layout.shards[0].header)
    with Staging.open(out, layout, IDENTITY, resume=True, overwrite=False) as first:
        for begin, end in ((0, 4096), (2048, 6144), (10_000, 11_000)):
            write(first, data[start + begin : start + end], start + begin)
    said: list[Any] = []
    stagings = [
        open_staging(_Second(rank, said), out, layout, IDENTITY, resume=True, overwrite=False, inputs=())
        for rank in range(2)
    ]
    for staging in stagings:
        with staging:
            assert staging.is_done(0, start, 6144)
            assert staging.is_done(0, start + 10_000, 1000)
            assert not staging.is_done(0, start, 6145)
            assert not staging.is_done(0, start + 9_999, 2)
    assert stagings[0].n_resumed_bytes == 6144 + 1000


def test_a_rank_that_has_finished_holds_nothing_open(tmp_path: Path) -> None:
    """Before rank 0 deletes the journals: NFS keeps what is open, in the same directory."""
    layout, out = small_layout(1), str(tmp_path / "out")

    class Telling(_Second):
        def gather(self, value: Any, *, to_all: bool = True) -> list[Any]:
            if isinstance(value, dict) and "records" in value:
                Journal(journal).close()
                raise InterruptedError
            return super().gather(value, to_all=to_all)

    said: list[Any] = []
    arguments: dict[str, Any] = {"resume": True, "overwrite": False, "inputs": ()}
    with open_staging(_Second(0, said), out, layout, IDENTITY, **arguments):
        ranks = Telling(1, said)
        staging = open_staging(ranks, out, layout, IDENTITY, **arguments)
        journal = str(tmp_path / "out" / ".tvfast" / "journal-1")
        with pytest.raises(OutputError, match="still writes here"):
            Journal(journal)
        with pytest.raises(InterruptedError):
            publish(ranks, staging, Outcome(0, 0, 0.0), dict)
