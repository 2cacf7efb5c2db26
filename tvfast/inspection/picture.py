"""The main picture of `tvfast inspect`, drawn by matplotlib."""

from __future__ import annotations

import os
import re
from typing import Any

from tvfast._pictures import verbatim
from tvfast.errors import OutputError

_COLORS = ("#2668dd", "#c2570c", "#0c8567", "#8b3fd9", "#c2185f", "#66740a", "#087b9f", "#79593f")
_MOST_PAIRS = 6  # of which each has a line


def check_library() -> None:
    """
    Raises:
        ImportError: matplotlib is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "--png needs matplotlib, which is not installed; run pip install 'tvfast[pictures]'."
        )


def draw(found: dict[str, Any], path: str) -> None:
    """Size, direction, sign conflict and magnitudes by layer, of what `tvfast inspect --json` prints.

    Raises:
        OutputError: the file cannot be written, or its ending names no format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, *names = (verbatim(os.path.basename(os.path.normpath(one["path"]))) for one in found["checkpoints"])
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (size, direction), (signs, magnitudes) = figure.subplots(2, 2)
    rows = _numbered(found["task_vectors"]["layers"])
    _draw_size(size, rows, names)
    _draw_direction(direction, rows, names)
    _draw_signs(signs, rows)
    _draw_magnitudes(magnitudes, found["task_vectors"]["histograms"], names)
    for axes in (size, direction, signs, magnitudes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9, frameon=False)
    figure.suptitle(f"Task vectors of {', '.join(names)} against {base}")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: the picture cannot be written ({error}). Name another file.") from error


def _numbered(layers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers that have a number, in order."""
    found = [(name, re.fullmatch(r"(.*)\.(\d+)", name)) for name in layers]
    order = sorted((match[1], int(match[2]), name) for name, match in found if match)
    return [layers[name] for _, _, name in order]


def _draw_size(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    for k, name in enumerate(names):
        shares = [_percent(row["norms"][k], row["base_norm"]) for row in rows]
        axes.plot(shares, color=_COLORS[k % len(_COLORS)], label=name)
    axes.set(title="Size", xlabel="layer", ylabel="‖τ‖ / ‖θ₀‖, %")
    axes.set_ylim(bottom=0)


def _draw_direction(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    pairs = [(j, k) for k in range(len(names)) for j in range(k)]
    cosines = [[_or_nan(row["cosines"][j][k]) for row in rows] for j, k in pairs]
    if len(pairs) <= _MOST_PAIRS:
        for at, ((j, k), line) in enumerate(zip(pairs, cosines, strict=True)):
            axes.plot(line, color=_COLORS[at % len(_COLORS)], label=f"{names[j]}, {names[k]}")
    else:
        of_layers = list(zip(*cosines, strict=True))
        axes.fill_between(
            range(len(rows)),
            [min(line) for line in of_layers],
            [max(line) for line in of_layers],
            color=_COLORS[0],
            alpha=0.2,
            label="all pairs",
        )
        axes.plot([sum(line) / len(line) for line in of_layers], color=_COLORS[0], label="mean")
    axes.set(title="Direction", xlabel="layer", ylabel="cosine between task vectors")
    axes.axhline(0.0, color="#888888", linewidth=0.8)


def _draw_signs(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.plot([100 * row["sign_conflict"] for row in rows], color=_COLORS[0], label="sign conflict")
    chance = [100 * row["sign_conflict_by_chance"] for row in rows]
    axes.plot(chance, color="#666666", linestyle=":", label="sign conflict by chance")
    density = [100 * (1 - sum(row["sparsity"]) / len(row["sparsity"])) for row in rows]
    axes.plot(density, color=_COLORS[2], linestyle="--", label="mean density")
    axes.set(title="Signs", xlabel="layer", ylabel="share of entries, %", ylim=(0, 100))


def _draw_magnitudes(axes: Any, histograms: dict[str, Any], names: list[str]) -> None:
    first, total = histograms["first_exponent"], histograms["total"]
    edges = [2.0 ** (first + i) for i in range(len(total[0]) + 1)]
    for k, name in enumerate(names):
        shares = [_percent(n, sum(total[k])) for n in total[k]]
        axes.stairs(shares, edges, color=_COLORS[k % len(_COLORS)], label=name, linewidth=1.5)
    axes.set_xscale("log")
    axes.set(title="Magnitudes", xlabel="|τ|, by octave", ylabel="share of changed entries, %")


def _percent(part: float | None, whole: float | None) -> float:
    return 100 * part / whole if part is not None and whole else float("nan")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
