"""The picture of a sweep: a curve, a heat map, or one panel for each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvfast._pictures import verbatim
from tvfast.search import Interval
from tvfast.sweeping.configuration import Sweep
from tvfast.sweeping.table import Row

_MOST_PANELS = 6
_MAPS_ACROSS = 2
_MOST_LABELLED = 12  # rows or columns of a heat map whose cells have figures
_LUMINANCE = (0.299, 0.587, 0.114)
_BRIGHT = 0.5


def draw(sweep: Sweep, rows: Sequence[Row], best: Row | None, path: Path) -> None:
    """Write a PNG of at most six panels; metrics that are not finite are left out.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if sweep.objective is not None and sweep.objective.metric in names:
        names = [sweep.objective.metric, *(n for n in names if n != sweep.objective.metric)]
    names = names[:_MOST_PANELS]
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    if len(sweep.axes) == 1:
        _curves(figure, sweep, rows, best, names)
    elif len(sweep.axes) == 2 and sweep.search == "grid":
        _maps(figure, sweep, rows, best, names)
    else:
        _panels(figure, sweep, rows, best, names[0])
    figure.savefig(path, dpi=130)


def _curves(figure: Any, sweep: Sweep, rows: Sequence[Row], best: Row | None, names: Sequence[str]) -> None:
    figure.set_size_inches(6.4, 0.8 + 2.6 * len(names))
    axis = sweep.axes[0]
    for axes, name in zip(
        figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0], names, strict=True
    ):
        points = sorted((row.parameters[axis.name], row.metrics[name]) for row in _with(rows, name))
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.6)
        _mark(axes, axis.name, name, best)
        axes.set_ylabel(verbatim(name))
        axes.grid(alpha=0.3)
        _scale(axes.set_xscale, axis.values)
    axes.set_xlabel(verbatim(axis.name))


def _maps(figure: Any, sweep: Sweep, rows: Sequence[Row], best: Row | None, names: Sequence[str]) -> None:
    """Equal cells in the order of the values."""
    down, across = sweep.axes
    ys, xs = (sorted(axis.values) if not isinstance(axis.values, Interval) else [] for axis in (down, across))
    width, height = (max(3.6, 1.4 + 0.55 * n) for n in (len(xs), len(ys)))
    n_across = min(_MAPS_ACROSS, len(names))
    n_down = -(-len(names) // n_across)
    figure.set_size_inches(min(width * n_across, 16), min((height + 0.4) * n_down, 20))
    panels = figure.subplots(n_down, n_across, squeeze=False).ravel()
    for spare in panels[len(names) :]:
        spare.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        cells = [[math.nan] * len(xs) for _ in ys]
        for row in _with(rows, name):
            cells[ys.index(row.parameters[down.name])][xs.index(row.parameters[across.name])] = row.metrics[
                name
            ]
        image = axes.imshow(cells, origin="lower", aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axes)
        axes.set_xticks(
            range(len(xs)), [f"{x:g}" for x in xs], rotation=90 if len(xs) > _MOST_LABELLED else 0
        )
        axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axes.set(xlabel=verbatim(across.name), ylabel=verbatim(down.name), title=verbatim(name))
        if max(len(xs), len(ys)) <= _MOST_LABELLED:
            _figures(axes, image, cells)
        if best is not None:
            x, y = xs.index(best.parameters[across.name]), ys.index(best.parameters[down.name])
            corners = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5))
            axes.plot(*zip(*((x + dx, y + dy) for dx, dy in corners), strict=True), color="tab:red")


def _figures(axes: Any, image: Any, cells: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if math.isfinite(value):
                shade = image.cmap(image.norm(value))[:3]
                bright = sum(a * b for a, b in zip(_LUMINANCE, shade, strict=True)) > _BRIGHT
                axes.text(
                    x,
                    y,
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if bright else "white",
                )


def _panels(figure: Any, sweep: Sweep, rows: Sequence[Row], best: Row | None, name: str) -> None:
    """The metric against each axis; with an objective, the best so far beside them."""
    shown = sweep.axes[: _MOST_PANELS - 1]
    n_panels = len(shown) + (sweep.objective is not None)
    figure.set_size_inches(3.6 * n_panels, 3.6)
    panels = figure.subplots(1, n_panels, squeeze=False, sharey=True)[0]
    found = _with(rows, name)
    for axes, axis in zip(panels, shown, strict=False):
        points = [row.parameters[axis.name] for row in found]
        axes.scatter(
            points, [row.metrics[name] for row in found], c=[row.point for row in found], s=14, cmap="viridis"
        )
        _mark(axes, axis.name, name, best)
        axes.set_xlabel(verbatim(axis.name))
        axes.grid(alpha=0.3)
        _scale(axes.set_xscale, axis.values)
    panels[0].set_ylabel(verbatim(name))
    panels[0].set_title("early points are dark, late ones bright", fontsize=8)
    if sweep.objective is not None:
        better = max if sweep.objective.maximise else min
        so_far = [better(row.metrics[name] for row in found[: k + 1]) for k in range(len(found))]
        panels[-1].step([row.point for row in found], so_far, where="post")
        panels[-1].set(xlabel="point", title="best so far")
        panels[-1].grid(alpha=0.3)


def _with(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if math.isfinite(row.metrics.get(name, math.nan))]


def _mark(axes: Any, axis: str, name: str, best: Row | None) -> None:
    if best is not None and math.isfinite(best.metrics[name]):
        point = [best.parameters[axis]], [best.metrics[name]]
        axes.plot(
            *point, marker="o", markersize=9, markerfacecolor="none", markeredgewidth=2, color="tab:red"
        )


def _scale(set_scale: Any, values: Any) -> None:
    if isinstance(values, Interval) and values.log:
        set_scale("log")
