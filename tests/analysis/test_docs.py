"""The examples of docs/analysis.md, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "analysis.md"


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the demo's images are scikit-learn's")
    pytest.importorskip("fairlearn", reason="fairness is computed by fairlearn")
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 5
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    assert names["found"].n_forward == 50
    assert names["found"].error[1, 1] == 0.0
    assert len(names["rows"]) == 3
    for task in names["targets"]:
        assert names["accuracy"][task, "merged backbone"] > names["accuracy"][task, "pixels"]
    assert "has a hole, merged backbone: " in capsys.readouterr().out
