"""Loops of two processes over gloo: the weights of one, whoever tunes what; failures are everyone's."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from tests.loops.networks import Task, equal, network, tasks, tune, weights
from tvfast.errors import ArgumentError, MergeError
from tvfast.loops import Turn, alternate

WORLD = 2


def joined(rank: int, place: str, script: Callable[[int, Path], None]) -> None:
    """One process of a group, which runs the script."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=WORLD)
    try:
        script(rank, Path(place))
    finally:
        dist.destroy_process_group()


def noted(names: list[str], turn: Turn[Task]) -> None:
    names.append(turn.name)


def shared_tasks(rank: int, place: Path) -> None:
    """Three tasks in two processes, with and without a folder; a failure in one; different starts."""
    expected = torch.load(place / "expected.pt")
    for state in (None, place / "state"):
        model = network()
        mine: list[str] = []
        alternate(
            model,
            tasks(),
            tune,
            rounds=2,
            merge="ties",
            density=0.5,
            state=state,
            before_turn=partial(noted, mine),
        )
        assert mine == [["red", "blue"], ["green"]][rank] * 2
        assert equal(weights(model), expected)

    def fails(model: nn.Module, data: Task) -> None:
        tune(model, data)
        if rank == 1:
            raise KeyError("the data are gone")

    model = network()
    with pytest.raises(KeyError if rank == 1 else MergeError, match="the data are gone") as found:
        alternate(model, tasks(), fails, rounds=2, merge="ties", density=0.5, state=place / "broken")
    assert rank == 1 or "rank 1 failed while it tuned: KeyError" in str(found.value)
    assert equal(weights(model), weights(network()))
    dist.barrier()
    names = sorted(path.name for path in (place / "broken").iterdir())
    assert names == [
        "round-0000.safetensors",
        "round-0001-task-0000.safetensors",
        "round-0001-task-0002.safetensors",
    ]
    dist.barrier()
    resumed: list[str] = []
    done = alternate(
        model,
        tasks(),
        tune,
        rounds=2,
        merge="ties",
        density=0.5,
        state=place / "broken",
        before_turn=lambda turn: resumed.append(f"{turn.round} {turn.name}"),
    )
    assert done.resumed_after == 0
    assert resumed == [["2 red", "2 blue"], ["1 green", "2 green"]][rank]
    assert equal(weights(model), expected)
    with pytest.raises(ArgumentError, match=r"the checksum of the start weights of rank . is"):
        alternate(network(rank), tasks(), tune, rounds=1)
    with pytest.raises(ArgumentError, match="expected the same in every process"):
        alternate(network(), tasks(), tune, rounds=1 + rank)


def tuned_together(rank: int, place: Path) -> None:
    """Both processes tune every task: DistributedDataParallel averages gradients of halves of a batch."""

    def tune_half(model: nn.Module, data: Task) -> None:
        whole = DistributedDataParallel(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            rows = slice(rank, None, WORLD)
            optimiser.zero_grad()
            nn.functional.cross_entropy(whole(data[0][rows]), data[1][rows]).backward()
            optimiser.step()

    expected = torch.load(place / "expected.pt")
    for state in (None, place / "state"):
        model = plain()
        told: list[str] = []
        alternate(
            model,
            tasks(),
            tune_half,
            rounds=2,
            parallel="tuning",
            state=state,
            before_turn=partial(noted, told),
        )
        assert len(told) == 6
        for name, tensor in weights(model).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def plain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def tune_whole(model: nn.Module, data: Task) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimiser.step()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_processes_share_the_tasks(tmp_path: Path) -> None:
    model = network()
    alternate(model, tasks(), tune, rounds=2, merge="ties", density=0.5)
    torch.save(weights(model), tmp_path / "expected.pt")
    multiprocessing.spawn(joined, (str(tmp_path), shared_tasks), nprocs=WORLD)


@pytest.mark.slow
def test_processes_tune_every_task_together(tmp_path: Path) -> None:
    model = plain()
    alternate(model, tasks(), tune_whole, rounds=2)
    torch.save(weights(model), tmp_path / "expected.pt")
    multiprocessing.spawn(joined, (str(tmp_path), tuned_together), nprocs=WORLD)
