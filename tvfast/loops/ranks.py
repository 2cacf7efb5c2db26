"""The processes of one loop under torchrun: who tunes what, and how experts reach everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tvfast.errors import ArgumentError, MergeError
from tvfast.loops.live import State


class Ranks:
    """This process among those of the default group; alone where there is none.

    Attributes:
        rank, world: of this process, and how many there are.
        shares_tasks: whether every task is tuned by one process; otherwise all tune each of them together.
    """

    def __init__(self, parallel: str) -> None:
        is_running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_running else 0
        self.world = dist.get_world_size() if is_running else 1
        self.shares_tasks = self.world > 1 and parallel == "tasks"

    def tunes(self, task: int) -> bool:
        """Whether this process has a part in a task."""
        return not self.shares_tasks or task % self.world == self.rank

    def keeps(self, task: int) -> bool:
        """Whether this process is the one that writes the expert of a task."""
        return self.rank == (task % self.world if self.shares_tasks else 0)

    def gathered(self, mine: Any) -> list[Any]:
        """What every process has to say, by rank."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def check_same(self, what: str, mine: Any) -> None:
        """
        Raises:
            ArgumentError: processes differ.
        """
        for rank, other in enumerate(self.gathered(mine)):
            if other != mine:
                raise ArgumentError(
                    f"{what} of rank {rank} is {other!r}, of rank {self.rank} it is {mine!r}; expected the "
                    "same in every process."
                )

    def meet(self, failure: BaseException | None) -> None:
        """Wait for everyone.

        Raises:
            MergeError: another process failed. What failed here is raised as it is.
        """
        said = self.gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, reason in enumerate(said):
            if reason is not None:
                raise MergeError(
                    f"rank {rank} failed while it tuned: {reason}. With a state folder the tasks that were "
                    "tuned are kept: remove the cause, then run again."
                )

    def exchange(self, experts: Sequence[State]) -> None:
        """Fill every process's experts with those of the processes that tuned them."""
        for task, expert in enumerate(experts):
            for tensor in expert.values():
                if tensor.numel():
                    dist.broadcast(tensor.view(-1).view(torch.uint8), src=task % self.world)
