"""The division of a merge over ranks: everything once, in balance, the same for everybody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.checkpoints import bound, checkpoint
from tvfast.engine.arrange import Part
from tvfast.engine.cuts import CUT
from tvfast.engine.partition import BULKY, partition, weight_of
from tvfast.engine.tasks import Task

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"parameters": {"density": 0.5}},
    "paper": {"parameters": {"density": 0.5}, "tvfast": {"dialect": "paper"}},
}


def tasks_of(method: str, sizes: Sequence[int]) -> tuple[Task, ...]:
    shapes = {f"model.layers.0.t{number}.weight": ("BF16", (n, 64)) for number, n in enumerate(sizes)}
    models = {path: checkpoint(path, 1, dtype="BF16", tensors=shapes) for path in ("base", "a", "b")}
    recipe = {
        "merge_method": "ties" if method == "paper" else method,
        "base_model": "base",
        "models": [{"model": path, "parameters": {"weight": 1.0}} for path in ("a", "b")],
        "dtype": "bfloat16",
        **METHODS[method],
    }
    return bound(json.dumps(recipe), **models).tasks


def loads(shares: Sequence[Sequence[Part]]) -> list[int]:
    return [sum(map(weight_of, share)) for share in shares]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=12), n_ranks=st.integers(1, 9))
def test_every_element_is_written_once(method: str, sizes: list[int], n_ranks: int) -> None:
    tasks = tasks_of(method, sizes)
    shares = partition(tasks, n_ranks)
    assert len(shares) == n_ranks
    for task in tasks:
        found = sorted((part.start, part.n) for share in shares for part in share if part.task is task)
        ends = [0]
        for start, n in found:
            assert start == ends[-1]
            assert n > 0 or method == "paper"  # empty tensors are of their group
            ends.append(start + n)
        assert ends[-1] == task.n_elements
        if method != "task_arithmetic":
            assert len(found) <= 1
        assert all(end % CUT == 0 for end in ends[:-1])
    order = [task.name for task in tasks]
    for share in shares:
        places = [(order.index(part.task.name), part.start) for part in share]
        assert places == sorted(places)
    assert shares == partition(tasks, n_ranks)


@pytest.mark.parametrize("n_ranks", [2, 3, 8])
def test_shares_are_equal_within_a_cut(n_ranks: int) -> None:
    """What can be cut anywhere; norms and small tensors are beside it."""
    found = loads(partition(tasks_of("task_arithmetic", [90_000, 3, 70_000, 1, 200_000]), n_ranks))
    assert max(found) - min(found) <= 2 * CUT * 2 * 4


@pytest.mark.parametrize("n_ranks", [2, 3, 8])
def test_shares_of_whole_tensors_are_equal_within_a_small_one(n_ranks: int) -> None:
    """An embedding that is a large part of a share, and many others."""
    found = loads(partition(tasks_of("ties", [30_000, *[1000, 250, 500] * 40]), n_ranks))
    embedding, rest = 30_000 * 64 * 2 * 4, sorted(found)[:-1]
    if n_ranks == 8:  # the embedding is more than a share, and alone
        assert max(found) == embedding
        assert max(rest) <= sum(rest) / len(rest) * (1 + 2 / BULKY)
    else:
        assert max(found) <= sum(found) / n_ranks * (1 + 2 / BULKY)


def test_what_is_ranked_together_stays_together() -> None:
    shares = partition(tasks_of("paper", [100, 200, 300]), 3)
    assert sorted(map(bool, shares)) == [False, False, True]


def test_what_is_done_is_left_out_and_the_rest_is_divided_anew() -> None:
    tasks = tasks_of("ties", [1000] * 40)
    first = {task.name for task in tasks[:20]}
    shares = partition(tasks, 4, lambda part: part.task.name in first)
    assert not first & {part.task.name for share in shares for part in share}
    found = loads(shares)
    assert max(found) - min(found) <= 1000 * 64 * 2 * 4
