"""Names with dollar signs in every picture that shows names of its user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tvfast import analysis
from tvfast._pictures import verbatim
from tvfast.inspection.picture import draw as draw_inspection
from tvfast.search import Interval
from tvfast.sweeping.configuration import Sweep, SweepAxis
from tvfast.sweeping.picture import draw as draw_sweep
from tvfast.sweeping.table import Row

NAME = r"$\frac$ of \$1 to $2$"

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the texts of written pictures are after matplotlib has looked for mathematics."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: list[str] = []
    save = Figure.savefig

    def saved(figure: Any, *args: Any, **keys: Any) -> None:
        save(figure, *args, **keys)
        for text in figure.findobj(Text):
            said, mathematics = text._preprocess_math(text.get_text())
            if not mathematics:
                found.append(said)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


def test_texts_are_shown_as_they_are(shown: list[str], tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    texts = [NAME, "$", "$$", r"\$", r"\\$a$", "plain", ""]
    figure = Figure()
    for text in texts:
        figure.text(0.5, 0.5, verbatim(text))
    figure.savefig(tmp_path / "texts.png")
    assert shown == texts


def test_names_of_checkpoints(shown: list[str], tmp_path: Path) -> None:
    row = {
        "norms": [1.0, 2.0],
        "base_norm": 4.0,
        "cosines": [[1.0, 0.5], [0.5, 1.0]],
        "sign_conflict": 0.2,
        "sign_conflict_by_chance": 0.3,
        "sparsity": [0.1, 0.2],
    }
    found = {
        "checkpoints": [{"path": f"/models/{kind} {NAME}"} for kind in ("base", "one", "two")],
        "task_vectors": {
            "layers": {"layers.0": row, "layers.1": row},
            "histograms": {"first_exponent": -10, "total": [[1, 2], [3, 4]]},
        },
    }
    draw_inspection(found, str(tmp_path / "picture.png"))
    assert f"Task vectors of one {NAME}, two {NAME} against base {NAME}" in shown
    assert shown.count(f"one {NAME}") == 2
    assert f"one {NAME}, two {NAME}" in shown


@pytest.mark.parametrize(
    ("axes", "search"),
    [
        ((SweepAxis("lambda", "lambda", None, (0.5, 1.0)),), "grid"),
        ((SweepAxis("lambda", "lambda", None, (0.5, 1.0)), SweepAxis("t", "t", None, (0.1, 0.2))), "grid"),
        ((SweepAxis("lambda", "lambda", None, Interval(0.0, 1.0)),) * 2, "random"),
    ],
)
def test_names_of_metrics(shown: list[str], tmp_path: Path, axes: tuple[SweepAxis, ...], search: str) -> None:
    sweep = Sweep("here", {}, "recipe", axes, "file.py:function", search)
    points: list[dict[str, float]] = [{"lambda": 0.5, "t": 0.1}, {"lambda": 1.0, "t": 0.2}]
    rows = [Row(k, point, {NAME: float(k)}, "new", 0.0, 0.0, None) for k, point in enumerate(points)]
    draw_sweep(sweep, rows, rows[0], tmp_path / "picture.png")
    assert NAME in shown


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: analysis.draw_disentanglement({f"title {NAME}": MAP}, path, names=(f"α₁, {NAME}", "b")),
        lambda path: analysis.draw_fairness(ROWS, path, title=f"title {NAME}", label=NAME),
    ],
)
def test_names_in_analyses(shown: list[str], tmp_path: Path, draw: Callable[[Path], None]) -> None:
    draw(tmp_path / "picture.png")
    assert f"title {NAME}" in shown
    assert any(text.endswith(NAME) and not text.startswith("title") for text in shown)


MAP = analysis.DisentanglementMap((0.0, 1.0), (0.0, 1.0), torch.zeros(2, 2, 2), 0, 0)
ROWS = [analysis.FairnessRow(0.0, analysis.Fairness(1.0, 0.0, 0.0, {NAME: 1.0}, {NAME: 1.0}, {NAME: 1}))]
