"""Joined vocabularies against mergekit 0.1.5, from a golden file (generate_tokenizers.py).

The same tokens, and rows at most one step of bfloat16 apart. mergekit numbers new tokens at random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvfast
from tests.parity.comparison import GOLDEN
from tests.parity.generate_tokenizers import KINDS
from tests.parity.shards import steps, to_bfloat16_bits
from tests.parity.tokenizer_cases import CASES, tokens_and_rows, write_members

with np.load(GOLDEN / "tokenizers.npz", allow_pickle=False) as _file:
    ARRAYS = {name: _file[name] for name in _file.files}
RECORD: dict[str, Any] = json.loads(ARRAYS.pop("record").tobytes())


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    write_members(folder)
    return folder


def test_the_golden_file_says_what_it_is() -> None:
    assert RECORD["version"] == "0.1.5"
    assert {*RECORD["tokens"], *RECORD["crashes"]} == {*CASES}
    assert len(RECORD["tokens"]) > len(CASES) // 2


@pytest.mark.parametrize("case", RECORD["crashes"])
def test_where_mergekit_crashes_there_is_a_result(
    case: str, members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(members)
    tvfast.merge_checkpoints(CASES[case], tmp_path / "out", device="cpu", threads=1)
    tokens, rows = tokens_and_rows(tmp_path / "out")
    assert all(len(matrix) >= len(tokens) for matrix in rows.values())


@pytest.mark.parametrize("case", RECORD["tokens"])
def test_rows_by_token(case: str, members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(members)
    tvfast.merge_checkpoints(CASES[case], tmp_path / "out", device="cpu", threads=1)
    tokens, rows = tokens_and_rows(tmp_path / "out")
    assert tokens == RECORD["tokens"][case]
    for kind, name in KINDS.items():
        mine, peers = rows[name], ARRAYS[f"{case}-{kind}"]
        assert mine.shape == peers.shape
        apart = steps("BF16", to_bfloat16_bits(mine), to_bfloat16_bits(peers))
        assert apart.max() <= 1
        assert np.abs(mine - peers).max() <= 2e-6, "float32 sums of a few numbers near 1"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(rows[KINDS["head"]])
