"""Ranks as processes: forked from one that has imported torch, so that each starts in milliseconds."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as tvfast.distributed does before torch is loaded
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch.distributed.tensor",
        "torch.distributed.checkpoint",
        "tvfast.distributed",
        "tvfast.checkpoints",
        "tests.distributed.ranks",
    ]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class End:
    """A signal that a rank sends to itself before a step of its merge.

    Attributes:
        step: name of a function in `STEPS`.
        n: before which of its calls, from 0.
    """

    step: str
    n: int = 0
    signal: int = signal.SIGKILL


STEPS = {
    "agree": "tvfast.checkpoints.check_agreement",
    "open": "tvfast.engine.staging.Staging.open",
    "write": "tvfast.engine.staging.Staging.write",
    "done": "tvfast.engine.staging.Staging.done",
    "publish": "tvfast.checkpoints.publish",
    "adopt": "tvfast.engine.staging.Staging.adopt",
    "commit": "tvfast.engine.staging.Staging.commit",
    "move": "tvfast.engine.commit._move",
}


def _end_at(end: End) -> None:
    """Let this process send itself the signal there."""
    name = STEPS[end.step]
    owner = pkgutil.resolve_name(name.rpartition(".")[0])
    method = name.rpartition(".")[2]
    bound = getattr(owner, method)
    lock, calls = threading.Lock(), itertools.count()

    def stepping(*arguments: Any, **keywords: Any) -> Any:
        with lock:
            if next(calls) == end.n:
                os.kill(os.getpid(), end.signal)
                time.sleep(0.1)  # a signal that stops takes effect somewhere
        return bound(*arguments, **keywords)

    setattr(owner, method, stepping)


def _run_rank(
    arguments: Sequence[str], variables: Mapping[str, str], log: str, end: End | None, folder: Path
) -> None:
    from tvfast.cli.main import main
    from tvfast.engine import plan

    plan.UNIT_BYTES = 2**16  # many units of little data
    if end is not None:
        _end_at(end)
    os.chdir(folder)
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = io.TextIOWrapper(io.FileIO(1, "w")), io.TextIOWrapper(io.FileIO(2, "w"))
    sys.exit(main(arguments))


@dataclass
class Rank:
    """A process, and the file that gets what it prints."""

    process: multiprocessing.process.BaseProcess
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


class Job:
    """The ranks of one merge, without an agent: rank 0 has the store. Leaving the context kills what is left.

    Args:
        arguments: of `tvfast`; a sequence for each rank, or one for all.
        variables: of the environment, beside those of `torchrun`.
        ends: of single ranks, by rank.
        folders: working directory of each rank.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[object] | Mapping[int, Sequence[object]],
        size: int,
        variables: Mapping[str, str] | None = None,
        ends: Mapping[int, End] | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        common = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **(variables or {}),
        }
        self.ranks: list[Rank] = []
        self.began = time.monotonic()
        for rank in range(size):
            own = arguments[rank] if isinstance(arguments, Mapping) else arguments
            log = folder / f"rank{rank}.log"
            named = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            place = folders[rank] if folders else Path.cwd()
            arguments_of = (list(map(str, own)), named, str(log), (ends or {}).get(rank), place)
            process = _context.Process(target=_run_rank, args=arguments_of)
            process.start()
            self.ranks.append(Rank(process, log))

    def wait(self, seconds: float = 60.0, *, beside: int = -1) -> list[int | None]:
        """Exit statuses; None: still running after so many seconds since the start.

        Args:
            beside: a rank that is not waited for.
        """
        for number, rank in enumerate(self.ranks):
            if number == beside:
                continue
            rank.process.join(max(0.0, self.began + seconds - time.monotonic()))
        return [rank.process.exitcode for rank in self.ranks]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
            rank.process.join()


def merged(folder: Path, arguments: Sequence[object], size: int, **variables: str) -> Job:
    """A job that must succeed."""
    with Job(folder, arguments, size, variables) as job:
        statuses = job.wait()
    assert statuses == [0] * size, "\n".join(rank.output for rank in job.ranks)
    return job
