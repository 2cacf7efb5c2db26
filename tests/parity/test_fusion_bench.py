"""TIES over a whole model against FusionBench 0.2.33, from a golden file of generate_fusion_bench.py."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.checkpoints.family import PRESETS, Family
from tests.parity.comparison import GOLDEN, load, ulps
from tests.parity.fusion_bench import check_trim, merged

FUSION_BENCH = load(GOLDEN / "fusion_bench.npz")
RECORD: dict[str, Any] = FUSION_BENCH.record


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family that the golden file was made from."""
    folder = tmp_path_factory.mktemp("family")
    made = Family(PRESETS["8-layers"], shard_bytes=200_000)
    made.write(folder)
    what = ("seed", "dtype", "hidden", "layers", "vocabulary", "parameters")
    assert {key: made.record()[key] for key in what} == {key: RECORD["family"][key] for key in what}
    return folder


def test_the_golden_file_says_what_it_is() -> None:
    assert (RECORD["peer"], RECORD["version"]) == ("fusion_bench", "0.2.33")
    n = RECORD["family"]["parameters"]
    # With bfloat16 checkpoints many entries tie at the threshold; the peer keeps them all.
    assert all(kept > n * RECORD["percent"] // 100 + 1 for kept in RECORD["kept"])


def test_trim_keeps_what_fusion_bench_keeps(family: Path, tmp_path: Path) -> None:
    check_trim(family, tmp_path, RECORD)


@pytest.mark.parametrize("function", ["sum", "mean", "max"])
def test_merge_equals_fusion_bench(family: Path, tmp_path: Path, function: str) -> None:
    out = merged(family, tmp_path, RECORD["members"], RECORD, function, RECORD["scale"])
    places = FUSION_BENCH.arrays["places"]
    apart = ulps(out[places], FUSION_BENCH.arrays[function])
    assert not apart.any(), f"{np.count_nonzero(apart)} of {apart.size} sampled entries differ"
    assert zlib.crc32(memoryview(out).cast("B")) == RECORD["checksums"][function]
