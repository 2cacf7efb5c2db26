"""The examples of docs/loops.md, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loops.networks import task
from tests.loops.test_trainer import classifier, needs_accelerate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loops.md"


def examples(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    names: dict[str, Any] = {}
    found = examples("python")
    assert len(found) == 4
    for example in found:
        exec(compile(example, str(PAGE), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "1.0"], ["2", "1.0"], ["3", "1.0"]]


@pytest.mark.slow
@needs_accelerate
@pytest.mark.filterwarnings("ignore")
def test_the_example_with_a_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = examples("python no-run")
    names: dict[str, Any] = {"model": classifier()}
    for name, seed in (("math_data", 1), ("code_data", 2)):
        names[name] = [{"inputs": x, "labels": y} for x, y in zip(*task(seed), strict=True)]
    exec(compile(example, str(PAGE), "exec"), names)
    assert [path.name for path in (tmp_path / "atm-state").iterdir()] == ["round-0010.safetensors"]
