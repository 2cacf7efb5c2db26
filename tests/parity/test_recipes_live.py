"""Every recipe, whole outputs, against a mergekit that runs now in its own environment (make_env.sh)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.parity.recipe_comparison import compare
from tests.parity.recipe_runs import DISTINCT, VARIABLE, Run, planned, run_mergekit, run_tvfast
from tests.parity.recipe_sources import SOURCES, Source

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The peer's outputs."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"set {VARIABLE} to a Python that has mergekit; tests/parity/make_env.sh makes one")
    work: Path = tmp_path_factory.mktemp("recipes")
    made = planned(SOURCES, DISTINCT, work / "families", work / "out")
    peer = run_mergekit(python, made, work)
    assert not [done for done in peer["runs"] if "error" in done]
    return {run.source.name: run for run in made}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_recipe_gives_what_mergekit_gives(source: Source, runs: dict[str, Run]) -> None:
    run = runs[source.name]
    run_tvfast(run)
    found = compare(source.name, source.file, run.family, run.ours, run.theirs)
    assert not found.differences
    assert found.n_over_bfloat16 == 0
    assert found.n_tied == 0, "the family is made without ties"
