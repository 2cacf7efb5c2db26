"""The benchmark of maps on little: what is timed, and what an interrupt leaves."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from bench import disentanglement


def test_forward_passes_alone_are_taken_from_the_time_of_the_map() -> None:
    ticks = itertools.count()
    spent = disentanglement.Spent(lambda: float(next(ticks)), lambda task: torch.tensor([task]))
    spent.start = spent.clock()
    for task in (0, 1, 1):
        assert spent(task) == task  # one tick up to its end, one for the pass alone
    assert (spent.n_forward, spent.map_s, spent.alone_s, spent.ratio) == (3, 3.0, 3.0, 1.0)


def test_a_map_and_a_part_of_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disentanglement, "VOCABULARY", 50)
    monkeypatch.setattr(disentanglement, "LAYERS", 1)
    few = ["--points", "3", "--texts", "4", "--length", "3", "--threads", "1"]
    assert disentanglement.main([*few, "--rounds", "2"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["complete"]
    assert whole["n_forward"] == [18, 18]
    assert whole["ratio"] > 0
    assert disentanglement.main([*few, "--seconds", "0"]) == 0
    part = json.loads(capsys.readouterr().out)
    assert not part["complete"]
    assert part["n_forward"] == [1]
    assert part["ratio"] > 0
