"""Pictures of analyses, as PNG; matplotlib is imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tvfast._pictures import verbatim
from tvfast.analysis.disentanglement import DisentanglementMap
from tvfast.analysis.fairness import FairnessRow


def draw_disentanglement(
    maps: DisentanglementMap | dict[str, DisentanglementMap],
    path: str | os.PathLike[str],
    *,
    names: tuple[str, str] = ("task 1", "task 2"),
    most: float | None = None,
) -> None:
    """Heat maps of ξ(α₁, α₂) side by side, on one scale; the square holds [0, 1]², where merges usually are.

    Args:
        maps: one, or several by title.
        names: of the tasks.
        most: ξ of the brightest colour; None: the largest there is.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    found = maps if isinstance(maps, dict) else {"": maps}
    figure = _figure((4.6 * len(found) + 0.6, 4.4))
    top = max(float(one.error.max()) for one in found.values()) if most is None else most
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, one) in zip(panels, found.items(), strict=True):
        shown = axes.pcolormesh(
            one.first,
            one.second,
            one.error.T.numpy(),
            cmap="viridis",
            vmin=0.0,
            vmax=top or 1.0,
            shading="nearest",
        )
        axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="white", linewidth=1.4)
        first, second = map(verbatim, names)
        axes.set(xlabel=f"α₁, {first}", ylabel=f"α₂, {second}", title=verbatim(title), aspect="equal")
    figure.colorbar(shown, ax=list(panels), label="ξ(α₁, α₂)")
    figure.savefig(path, dpi=130)


def draw_fairness(
    rows: Sequence[FairnessRow], path: str | os.PathLike[str], *, title: str = "", label: str = "λ"
) -> None:
    """Left: accuracy, overall and by group, over λ. Right: both differences.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = _figure((10.0, 4.0))
    left, right = figure.subplots(1, 2)
    scales = [row.scale for row in rows]
    left.plot(scales, [row.fairness.accuracy for row in rows], color="black", linewidth=2.2, label="all")
    for group in rows[0].fairness.accuracies:
        left.plot(scales, [row.fairness.accuracies[group] for row in rows], marker=".", label=verbatim(group))
    for name, metric in (
        ("demographic parity", "demographic_parity_difference"),
        ("equalised odds", "equalised_odds_difference"),
    ):
        right.plot(scales, [getattr(row.fairness, metric) for row in rows], marker="o", label=name)
    left.set_ylabel("accuracy")
    right.set_ylabel("difference between groups")
    right.set_ylim(bottom=0.0)
    for axes in (left, right):
        axes.set_xlabel(verbatim(label))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.suptitle(verbatim(title))
    figure.savefig(path, dpi=130)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
