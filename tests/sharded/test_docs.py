"""The example of docs/sharded.md: two FSDP2 models of transformers are merged in place and trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.sharded.cluster import Cluster

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharded.md"


def example(rank: int, source: str) -> list[float]:
    import warnings

    warnings.simplefilter("ignore")  # of transformers
    names: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    losses: list[float] = names["losses"]
    return losses


@pytest.mark.slow
def test_the_example_runs(cluster: Cluster) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    first, second = cluster.run(2, example, source)
    assert first == second
    assert first[-1] < first[0]
