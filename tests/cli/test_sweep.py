"""`tvfast sweep` as a command: what it prints, its exit status, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.families import Family
from tvfast.cli.main import main

FUNCTION = """
def size(tensors):
    return {"size": sum(float(t.float().square().sum()) for t in tensors.values())}

def fails(tensors):
    raise ValueError("of mine")
"""


@pytest.fixture
def config(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text(FUNCTION)
    found = {
        "recipe": {
            "merge_method": "ties",
            "base_model": str(family.path("base")),
            "models": [{"model": str(family.path("ft1"))}, {"model": str(family.path("ft2"))}],
            "parameters": {"weight": 1.0, "density": 0.5},
        },
        "axes": {"lambda": {"from": 0.5, "to": 1.5, "step": 0.5}, "density": [0.2, 0.5]},
        "evaluate": "judge.py:size",
        "receives": "state_dict",
        "maximise": "size",
    }
    path = tmp_path / "sweep.yml"
    path.write_text(yaml.safe_dump(found, sort_keys=False))
    return path


def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(config), "--dry-run", "--device", "cpu"]) == 0
    seen = capsys.readouterr().out
    assert (
        "nothing written; 6 points would be, merged into live weights; thresholds are measured 2 times."
        in seen
    )
    assert "The function is given a state_dict." in seen
    assert not (tmp_path / "sweep-sweep").exists()
    assert main(["sweep", str(config), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sweep-sweep: 6 points\n")
    assert "2 live with thresholds measured anew, 4 live with those of an earlier point" in text
    assert "best      lambda 1.5, density" in text
    assert {path.name for path in (tmp_path / "sweep-sweep").iterdir()} == {
        *("rows.jsonl", "table.csv", "table.json", "table.png", "best.yml")
    }
    assert main(["merge", "sweep-sweep/best.yml", str(tmp_path / "best"), "--device", "cpu"]) == 0


def test_json_resume_and_status(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(config), "--out", "mine", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"] == 6
    assert found["best"]["parameters"]["lambda"] == 1.5
    assert main(["sweep", str(config), "--out", "mine"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["sweep", str(config), "--out", "mine", "--resume", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["points_before"] == 6
    assert main(["sweep", str(config), "--out", "mine", "--dry-run", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["n_measured"] == 2


def test_errors_are_one_line(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text()
    config.write_text(text.replace("judge.py:size", "judge.py:fails"))
    assert main(["sweep", str(config), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "judge.py:fails raised ValueError in judge.py, line 6: of mine" in line
    config.write_text(text.replace("judge.py:size", "judge.py:sise"))
    assert main(["sweep", str(config), "--device", "cpu"]) == 2
    assert "has no function 'sise'; it has fails, size" in capsys.readouterr().err
    config.write_text(text.replace("density:", "densty:", 1))
    assert main(["sweep", str(config), "--device", "cpu"]) == 2
    assert "Did you mean 'density'" in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "none.yml")]) == 2
