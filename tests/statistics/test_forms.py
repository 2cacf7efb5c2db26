"""What records say of stored factors, and what damaged ones say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tvfast.curvature import Statistics
from tvfast.errors import StatisticsError
from tvfast.statistics import Document, Model, Record, StoredForm
from tvfast.statistics.tensors import array_of


@pytest.mark.parametrize(
    ("said", "shape", "n_entries"),
    [
        ({"form": "dense", "size": 5}, [15], 25),
        ({"form": "block", "size": 5, "block": 2}, [7], 10),
        ({"form": "block", "size": 4, "block": 2}, [6], 8),
        ({"form": "block", "size": 3, "block": 4}, [6], 12),
        ({"form": "diagonal", "size": 5}, [5], 5),
        ({"form": "root", "size": 5}, [5, 3], 25),
    ],
)
def test_forms(said: dict[str, Any], shape: list[int], n_entries: int) -> None:
    form = StoredForm.of({"A": said}, "A", "file")
    assert form.holds(shape)
    assert not form.holds([*shape[:-1], shape[-1] + 1]) or form.name == "root"
    assert not form.holds([shape[0] + 1, *shape[1:]])
    assert form.n_entries == n_entries


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "A has no form"),
        ({"form": "sparse", "size": 3}, "'sparse', which this release does not know"),
        ({"form": "dense"}, "size None"),
        ({"form": "dense", "size": -3}, "size -3"),
        ({"form": "block", "size": 3}, "block 0"),
        ({"form": "dense", "size": 4}, r"A has shape \[6\], which holds no dense matrix of side 4"),
    ],
)
def test_damaged_records_are_named(said: dict[str, Any] | None, words: str) -> None:
    sums = array_of(torch.ones(6), "A", count="tokens")
    counts = {"samples": 1, "tokens": 2, "draws": 1, "token_draws": 2}
    record = Record("w", "kfac", (2, 3), {"A": sums}, counts, {} if said is None else {"A": said})
    document = Document(Model("m", "F32", "", ""), (), {})
    found = Statistics({("w", "kfac"): record}, document)
    with pytest.raises(StatisticsError, match=rf"parameter 'w': {words}|{words}"):
        found.read("w")
