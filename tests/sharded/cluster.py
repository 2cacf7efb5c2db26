"""Processes that make the same call: gloo on one machine, 1 to 4 of them, started once."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

SIZE = 4
TIMEOUT = 60.0
"""Seconds until a call that does not return is a failure of the test."""

PRELOADED = [
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "tests.sharded.test_merging",
]
"""What every process would import at its first call."""

Work = Callable[..., Any]


def _serve(pipe: connection.Connection, rank: int) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # what is imported is not searched again for garbage
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module.*returned a view")
    while (message := pipe.recv()) is not None:
        n, store, work, arguments = message
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=n,
                timeout=timedelta(seconds=TIMEOUT / 2),
            )
            answer = (True, work(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # What an error's traceback holds of the group goes here: where a collective was given up, that
            # waits for the connections of the other ranks to close.
            gc.collect()
        pipe.send(answer)


class Cluster:
    """Runs functions in up to `SIZE` processes of one group."""

    def __init__(self) -> None:
        os.environ["TORCH_LOGS"] = "-distributed"
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipes = []
        self._processes = []
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, n: int, work: Work, *arguments: Any) -> list[Any]:
        """[rank] what `work(rank, *arguments)` returned in a group of n processes.

        Raises:
            AssertionError: with the traceback of a rank that failed, or if one did not return in time.
        """
        with tempfile.TemporaryDirectory() as directory:
            for pipe in self._pipes[:n]:
                pipe.send((n, os.path.join(directory, "store"), work, arguments))
            answers = [self._answer(rank) for rank in range(n)]
        for rank, (good, found) in enumerate(answers):
            assert good, f"rank {rank} of {n}:\n{found}"
        return [found for _, found in answers]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self._pipes[rank].poll(TIMEOUT):
            raise AssertionError(f"rank {rank} did not return in {TIMEOUT} seconds")
        try:
            answer: tuple[bool, Any] = self._pipes[rank].recv()
        except EOFError:
            raise AssertionError(f"rank {rank} died") from None
        return answer

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(10.0)
            if process.is_alive():
                process.kill()


def same_bits(left: Any, right: Any) -> bool:
    """Whether two tensors hold the same bytes."""
    import torch

    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(words), right.contiguous().view(words)
    )


def failures(found: Sequence[list[str]]) -> list[str]:
    """What any rank complained about."""
    return [f"rank {rank}: {line}" for rank, lines in enumerate(found) for line in lines]
