"""A rank that fails in the middle of a call ends it on all of them, long before the group's timeout."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest

import tvfast
from tests.sharded.cluster import Cluster
from tests.sharded.test_agreement import spread
from tvfast.errors import RankError

FAILING = 2
SOON = 10.0
"""Seconds; the group's timeout is 30."""


def thresholds() -> None:
    base, *models = spread()
    tvfast.merge_(base, models, "ties", density=0.5)


def new_tensors() -> None:
    base, *models = spread()
    tvfast.merge(base, models, "ties", density=0.5)


def moments() -> None:
    base, *models = spread()
    tvfast.compare(base, models)


def gradient() -> None:
    base, *models = spread()
    with tvfast.LiveMerge(base, models=models) as live:
        live.set([0.5, 0.5])
        live.gradient(models[0])


_SAMPLE = "tvfast.sharded.keys.LocalKeys.sample"
_SUMS = "tvfast.sharded.backend.ShardedBackend._accumulation"


def ended(rank: int, call: Callable[[], None], fails: str, leaves: bool) -> tuple[str, float]:
    """What a call raises where one rank finds no memory, and after how many seconds."""
    import torch.distributed as dist

    lacking = mock.patch(fails, side_effect=MemoryError("no room for it"))
    began = time.monotonic()
    with lacking if rank == FAILING else nullcontext(), pytest.raises((MemoryError, RankError)) as error:
        call()
    seconds = time.monotonic() - began
    assert error.type is (MemoryError if rank == FAILING else RankError)
    if rank == FAILING and leaves:
        dist.destroy_process_group()
    elif rank == FAILING:
        time.sleep(4.0)  # it is there still, so that no closed connection tells the others
    return str(error.value), seconds


@pytest.mark.parametrize(
    ("call", "fails", "leaves"),
    [
        (thresholds, _SAMPLE, False),
        (thresholds, _SAMPLE, True),
        (new_tensors, _SAMPLE, False),
        (moments, _SUMS, False),
        (gradient, _SUMS, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failure_in_the_middle_is_named_on_every_rank(
    cluster: Cluster, call: Callable[[], None], fails: str, leaves: bool
) -> None:
    found = cluster.run(4, ended, call, fails, leaves)
    for rank, (message, seconds) in enumerate(found):
        assert seconds < SOON
        if rank != FAILING:
            assert f"not finished: rank {FAILING} failed in it: MemoryError: no room for it" in message


def after_a_while(rank: int) -> bool:
    """Rank by rank later than others have looked for a note."""
    from tvfast.sharded.keys import LocalKeys

    sample = LocalKeys.sample

    def late(self: LocalKeys, *given: Any) -> Any:
        time.sleep(2.5)
        return sample(self, *given)

    with mock.patch.object(LocalKeys, "sample", late) if rank == FAILING else nullcontext():
        thresholds()
    return True


def test_a_slow_rank_is_waited_for(cluster: Cluster) -> None:
    assert all(cluster.run(4, after_a_while))
