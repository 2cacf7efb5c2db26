"""`tvfast merge` on mergekit's recipes against mergekit 0.1.5, from a golden file (generate_recipes.py)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.comparison import GOLDEN
from tests.parity.generate_recipes import deterministic, samples
from tests.parity.page import page
from tests.parity.recipe_comparison import MAX_UNITS_ELSEWHERE
from tests.parity.recipe_runs import DISTINCT, ROOT, Run, planned, run_tvfast
from tests.parity.recipe_sources import FOLDER, SOURCES, Source
from tests.parity.shards import read, steps, to_bfloat16_bits, to_float32

with np.load(GOLDEN / "recipes.npz", allow_pickle=False) as _file:
    ARRAYS = {name: _file[name] for name in _file.files}
RECORD: dict[str, Any] = json.loads(zlib.decompress(ARRAYS.pop("record").tobytes()))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def test_the_golden_file_says_what_it_is() -> None:
    assert (RECORD["peer"], RECORD["version"]) == ("mergekit", "0.1.5")
    assert RECORD["recipes"].keys() == ARRAYS.keys() == {source.name for source in deterministic()}


def test_every_recipe_names_its_source() -> None:
    assert {source.file for source in SOURCES} == set(FOLDER.iterdir())
    for source in deterministic():
        assert zlib.crc32(source.file.read_bytes()) == RECORD["recipes"][source.name]["recipe"]


@pytest.mark.parametrize("source", deterministic(), ids=lambda source: source.name)
def test_recipe_gives_what_mergekit_gives(source: Source, families: Path, tmp_path: Path) -> None:
    (run,) = planned([source], DISTINCT, families, tmp_path)
    run_tvfast(run)
    wanted = RECORD["recipes"][source.name]
    tensors = read(run.ours)
    assert {name: list(saved.shape) for name, saved in tensors.items()} == wanted["tensors"]
    assert {saved.dtype for saved in tensors.values()} == {wanted["dtype"]}
    check_samples(run, wanted["dtype"])
    config = json.loads((run.ours / "config.json").read_text())
    assert config["num_hidden_layers"] == wanted["n_layers"]
    assert config["max_position_embeddings"] == wanted["n_positions"], "config.json of another model"


def check_samples(run: Run, dtype: str) -> None:
    """At most one step of bfloat16 apart, and of the output's type where that is 16 bits wide."""
    mine, peers = samples(read(run.ours)), ARRAYS[run.source.name]
    rounded = [to_bfloat16_bits(to_float32(dtype, bits)) for bits in (mine, peers)]
    apart = {"BF16": steps("BF16", *rounded)}
    if dtype != "F32":
        apart[dtype] = steps(dtype, mine, peers)
    for kind, found in apart.items():
        assert found.max() <= 1, (
            f"{(found > 1).sum()} of {found.size} entries differ by more than a step of {kind}"
        )


def test_the_page_is_that_of_the_result() -> None:
    result = json.loads((ROOT / "bench" / "results" / "parity.json").read_text())
    assert (ROOT / "docs" / "parity.md").read_text() == page(result), "run python -m tests.parity.report"
    assert not any(record["differences"] for record in result["comparisons"])
    for record in result["comparisons"]:
        # More than a step only where base and change cancel, and then by the last bits of float32.
        assert record["n_over_bfloat16"] == 0 or record["max_units"] <= MAX_UNITS_ELSEWHERE
        assert record["n_over_bfloat16"] == 0 or not record["family"].endswith("-distinct")
