"""What the demonstration shows: a table, a picture and a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tvfast.demo.digits import TASKS
from tvfast.demo.experiment import Results, Row

PICTURE, NUMBERS = "demo.png", "demo.json"

_DARK = 89.0  # from here on the colour of a cell is too dark for black figures


def as_json(results: Results) -> dict[str, Any]:
    """Every number of the results as plain data; accuracies in percent of the test images."""
    return {
        "seed": results.seed,
        "tasks": list(TASKS),
        "models": [
            {
                "name": row.name,
                "kind": row.kind,
                "settings": row.settings,
                "accuracy": dict(zip(TASKS, row.tasks, strict=True)),
                "average": row.average,
            }
            for row in results.rows
        ],
        "validation": {
            "scales": list(results.scales),
            "averages": {name: list(averages) for name, averages in results.validation.items()},
            "chosen": results.chosen,
        },
        "n_searched": results.n_searched,
        "search_seconds": results.search_seconds,
        "n_merges": results.n_merges,
        "merge_seconds": results.merge_seconds,
        "total_seconds": results.total_seconds,
    }


def table(results: Results) -> str:
    """Accuracies of every model on every task, as text."""
    width = max(len(row.name) for row in results.rows)
    wide = max(len(row.settings) for row in results.rows)
    header = f"{'accuracy, %':{width}}  " + "  ".join(f"{task:>14}" for task in TASKS) + f"  {'average':>7}"
    lines = [header + "  settings", "-" * (len(header) + 2 + wide)]
    kind = results.rows[0].kind
    for row in results.rows:
        if row.kind != kind:
            lines.append("")
            kind = row.kind
        numbers = "  ".join(f"{accuracy:14.1f}" for accuracy in row.tasks)
        lines.append(f"{row.name:{width}}  {numbers}  {row.average:7.1f}  {row.settings}")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """What the best merge reached, and what merging cost."""
    best = max(results.of_kind("merge"), key=_average)
    expert = max(results.of_kind("expert"), key=_average)
    base = results.of_kind("base")[0]
    per_merge = 1e3 * results.merge_seconds / results.n_merges
    per_search = 1e3 * results.search_seconds / max(1, results.n_searched)
    return (
        f"Best merge: {best.name}, {best.average:.1f} % on average over the tasks; "
        f"the best expert has {expert.average:.1f} %, the base {base.average:.1f} %.\n"
        f"{results.n_merges} merges of sharded safetensors took {results.merge_seconds:.2f} s, "
        f"{per_merge:.1f} ms each; {results.n_searched} in memory, to choose λ, "
        f"{results.search_seconds:.2f} s, {per_search:.1f} ms each; everything {results.total_seconds:.1f} s."
    )


def write(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write the picture and the numbers into a folder, which is made if need be; returns their paths.

    Raises:
        OSError: the folder cannot be written.
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture, numbers = folder / PICTURE, folder / NUMBERS
    draw(results, picture)
    numbers.write_text(json.dumps(as_json(results), indent=2) + "\n", encoding="utf-8")
    return picture, numbers


def draw(results: Results, path: Path) -> None:
    """Left: the table, coloured by accuracy. Right: validation accuracy of every merge against λ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1.0])
    _draw_table(left, results)
    _draw_scales(right, results)
    figure.suptitle("Reading digits from three faulty scanners: one base, three experts, merges by tvfast")
    figure.savefig(path, dpi=130)


def _draw_table(axes: Any, results: Results) -> None:
    cells = [[*row.tasks, row.average] for row in results.rows]
    axes.imshow(cells, cmap="YlGn", vmin=40, vmax=110, aspect="auto")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            weight = "bold" if x == len(TASKS) else "normal"
            color = "white" if value > _DARK else "black"
            axes.text(
                x, y, f"{value:.1f}", ha="center", va="center", fontsize=11, fontweight=weight, color=color
            )
    axes.set_xticks(range(len(TASKS) + 1), [*TASKS, "average"], fontsize=10)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(cells)), [_label(row) for row in results.rows], fontsize=9)
    axes.tick_params(length=0)
    for y in range(1, len(cells)):
        if results.rows[y].kind != results.rows[y - 1].kind:
            axes.axhline(y - 0.5, color="white", linewidth=4)
    axes.axvline(len(TASKS) - 0.5, color="white", linewidth=4)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("accuracy on the test images, %")


def _draw_scales(axes: Any, results: Results) -> None:
    for index, (name, averages) in enumerate(results.validation.items()):
        chosen = results.chosen[name]
        (line,) = axes.plot(results.scales, averages, linewidth=1.8, label=name, zorder=3 + index)
        best = averages[results.scales.index(chosen)]
        axes.plot([chosen], [best], marker="o", color=line.get_color(), zorder=10)
    axes.set_xlabel("λ, the scale of the merged task vector")
    axes.set_ylabel("average accuracy on the validation images, %")
    axes.set_title("λ is chosen on validation images (dots)", fontsize=11)
    axes.grid(alpha=0.3)
    if results.validation:
        axes.legend(fontsize=10)


def _label(row: Row) -> str:
    return f"{row.name}\n{row.settings}" if row.kind == "merge" else row.name


def _average(row: Row) -> float:
    return row.average
