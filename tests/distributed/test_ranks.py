"""`tvfast merge` by several ranks: the same bytes, however many there are and whatever happens to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.families import Family, digest, make_family, recipe
from tests.distributed.ranks import merged
from tvfast.cli.main import main

WEIGHTS = {"ft1": {"weight": 1.0}, "ft2": {"weight": 0.5}, "ft3": {"weight": -0.25}}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("method", "parameters", "n_ranks"), [("ties", {"density": 0.3}, 2), ("dare_linear", {"density": 0.6}, 3)]
)
def test_the_bytes_do_not_depend_on_the_number_of_ranks(
    method: str, parameters: dict[str, float], n_ranks: int, family: Family, tmp_path: Path
) -> None:
    config = write(
        tmp_path, recipe(family, method, models=WEIGHTS, parameters=parameters, out_shard_size="3KB")
    )
    assert main(["merge", str(config), str(tmp_path / "alone")]) == 0
    job = merged(tmp_path / "logs", ["merge", config, tmp_path / "out", "--json"], n_ranks)
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")
    report = json.loads(job.ranks[0].output)
    assert len(report["ranks"]) == n_ranks
    assert report["read_bytes"] == sum(one["read_bytes"] for one in report["ranks"])
    assert [rank.output for rank in job.ranks[1:]] == [""] * (n_ranks - 1)
