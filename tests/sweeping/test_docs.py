"""The examples of docs/sweep.md, on networks that were never trained."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tvfast.sweeping import read_sweep, run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweep.md"


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the demo's images are scikit-learn's")
    from tvfast.demo import files, network

    monkeypatch.chdir(tmp_path)
    sys.modules.pop("_tvfast_sweep_judge", None)
    for seed, name in enumerate(("base", "expert-1", "expert-2", "expert-3")):
        files.save(network.network(seed).state_dict(), Path("build/demo") / name)
    configurations = examples("yaml")
    assert len(configurations) == 2
    (function,) = examples("python")
    Path("judge.py").write_text(function)
    few = (
        configurations[0].replace("step: 0.2", "step: 0.8").replace("[0.1, 0.2, 0.5, 0.8, 1.0]", "[0.1, 1.0]")
    )
    Path("sweep.yml").write_text(few)
    outcome = run(read_sweep("sweep.yml"), "sweep-sweep", device="cpu")
    assert [row.measured for row in outcome.rows] == ["new", "reused", "reused"] * 2
    assert list(outcome.rows[0].metrics) == ["average", "line at top", "line at bottom", "line at left"]
    Path("search.yml").write_text(configurations[1])
    sweep = read_sweep("search.yml")
    assert (sweep.search, sweep.n_points, len(sweep.axes)) == ("cma", 60, 3)
