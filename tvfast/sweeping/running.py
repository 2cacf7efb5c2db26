"""A sweep from its configuration to its table and picture."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tvfast
from tvfast.errors import EvaluationError, OutputError
from tvfast.recipe import Recipe
from tvfast.sweeping.configuration import Sweep
from tvfast.sweeping.functions import Function, load_function, measured
from tvfast.sweeping.loading import has_transformers_model
from tvfast.sweeping.merges import FileMerges, LiveMerges, Merges, why_files
from tvfast.sweeping.table import (
    BEST,
    CSV,
    JSON,
    PICTURE,
    Row,
    Table,
    column_clashes,
    metrics_as_json,
    write_tables,
    write_text,
)

_CHECKED = 2000
"""Recipes of a grid that are read before anything is merged; of a larger one, those along each axis."""

_MERGED = ".tvfast-merged"
"""Of nobody else, because it is removed: OUT may be any folder."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a sweep will do.

    Attributes:
        n_points: merges.
        receives: what the function is given.
        why_files: why merges go through files; None: they go into live weights.
        n_measured: settings whose thresholds are measured, each once; None: not known before the search.
        plan: of one merge as files.
    """

    n_points: int
    receives: str
    why_files: str | None
    n_measured: int | None
    plan: Any

    def as_json(self) -> dict[str, Any]:
        return {
            "n_points": self.n_points,
            "receives": self.receives,
            "live": self.why_files is None,
            "why_files": self.why_files,
            "n_measured": self.n_measured,
            "plan": self.plan.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep found.

    Attributes:
        folder: of the table and the picture.
        rows: all of them.
        n_before: those that an earlier run had finished.
        best: by the objective; None: there is none, or no number.
        picture: None: there was nothing to draw.
        warnings: what could not be done.
    """

    folder: Path
    rows: tuple[Row, ...]
    n_before: int
    best: Row | None
    picture: Path | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        count = {kind: sum(row.measured == kind for row in self.rows) for kind in ("new", "reused", "files")}
        best = self.best
        return {
            "out": str(self.folder),
            "points": len(self.rows),
            "points_before": self.n_before,
            "failed": sum(row.error is not None for row in self.rows),
            "merges": count,
            "merge_s": math.fsum(row.merge_s for row in self.rows),
            "evaluate_s": math.fsum(row.evaluate_s for row in self.rows),
            "best": None
            if best is None
            else {
                "point": best.point,
                "parameters": dict(best.parameters),
                "metrics": metrics_as_json(best.metrics),
            },
            "tables": [str(self.folder / CSV), str(self.folder / JSON)],
            "picture": None if self.picture is None else str(self.picture),
            "warnings": list(self.warnings),
        }


def preview(sweep: Sweep, *, device: str = "auto", threads: int = 0) -> Preview:
    """Everything that can be checked before anything is merged: recipes, models' headers, the function.

    Raises:
        RecipeError, UnknownNameError: a point that is no recipe, or a function that is not there.
        CheckpointError, ArgumentError, StatisticsError: models that are not there or do not fit each other.
    """
    load_function(sweep.evaluate, sweep.where)
    first, n_measured = _checked(sweep)
    plan = tvfast.plan(first, device=device, threads=threads)
    receives = _receives(sweep, first)
    why = _why_files(first, receives)
    return Preview(sweep.n_points, receives, why, n_measured if why is None else None, plan)


def run(
    sweep: Sweep,
    out: str | Path,
    *,
    device: str = "auto",
    threads: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Row, int], None] = lambda row, n_points: None,
) -> Outcome:
    """Merge at every point, call the function, write each row as it is finished, then tables and picture.

    Args:
        out: folder of the tables.
        device: "cpu", "cuda" or for example "cuda:1": where models and merges live; "auto": a GPU where torch
            sees one.
        threads: of the merges; 0: all cores.
        resume: go on with what is in `out`, or with nothing.
        overwrite: replace what is in `out`.
        progress: is told of each row, and of how many there will be.

    Raises:
        EvaluationError: the function failed, unless the sweep says that failures are recorded. Rows that are
            finished stay for `resume`.
        OutputError: `out` holds another sweep, or cannot be written.
        RecipeError, CheckpointError, ArgumentError, StatisticsError: as `preview`.
        ImportError: transformers, cma or matplotlib is needed and not installed.
    """
    folder = Path(out)
    place = _device(device)
    function = load_function(sweep.evaluate, sweep.where)
    first, _ = _checked(sweep)
    receives = _receives(sweep, first)
    described = {**sweep.described(), "receives": receives}
    with Table(folder, described, resume=resume, overwrite=overwrite) as table:
        n_before = len(table.rows)
        merges: Merges | None = None
        try:
            for point in _points(sweep, table):
                if merges is None:  # a finished table needs no models
                    tvfast.plan(first)
                    merges = _merges(first, folder, receives, place, threads)
                table.append(_finished(sweep, len(table.rows), point, merges, function, table.metrics))
                progress(table.rows[-1], sweep.n_points)
        finally:
            if merges is not None:
                merges.close()
            best = _best(sweep, table.rows)
            write_tables(folder, described, table.rows, best)
        picture, warnings = _shown(sweep, folder, table.rows, best)
        return Outcome(folder, tuple(table.rows), n_before, best, picture, warnings)


def _points(sweep: Sweep, table: Table) -> Iterator[dict[str, float]]:
    """Points without a row yet; whoever takes one appends its row before the next is asked for."""
    strategy, order = sweep.strategy(), sweep.order()
    names = [sweep.axes[k].name for k in order]
    n_asked = 0
    while asked := strategy.ask():
        for numbers in asked:
            found = dict(zip(names, numbers, strict=True))
            point = {axis.name: found[axis.name] for axis in sweep.axes}
            if n_asked < len(table.rows):
                before = dict(table.rows[n_asked].parameters)
                if before != point:
                    raise OutputError(
                        f"row {n_asked} of the table is at {before}, and the search proposes {point}; "
                        "expected the same. Another version of cma or numpy draws otherwise: pass "
                        "--overwrite."
                    )
            else:
                yield point
            n_asked += 1
        rows = table.rows[n_asked - len(asked) : n_asked]
        strategy.tell([_loss(sweep, row) for row in rows])


def _finished(
    sweep: Sweep, number: int, point: dict[str, float], merges: Merges, function: Function, known: list[str]
) -> Row:
    start = time.perf_counter()
    merged, how = merges.at(sweep.recipe_at(point))
    between = time.perf_counter()
    metrics: dict[str, float] = {}
    error = None
    try:
        with torch.no_grad():
            metrics = measured(function, sweep.evaluate, merged)
        _check_metrics(sweep, metrics, known)
    except EvaluationError as failure:
        if sweep.on_error == "stop":
            shown = ", ".join(f"{name} {value:g}" for name, value in point.items())
            raise EvaluationError(
                f"point {number} ({shown}): {failure} Finished rows are kept: --resume."
            ) from failure
        metrics, error = {}, str(failure)
    return Row(number, point, metrics, how, between - start, time.perf_counter() - between, error)


def _check_metrics(sweep: Sweep, metrics: dict[str, float], known: list[str]) -> None:
    if known and list(metrics) != known and set(metrics) != set(known):
        raise EvaluationError(
            f"{sweep.evaluate} returned {', '.join(metrics)}, and {', '.join(known)} before; expected the "
            "same metrics for every merge."
        )
    clashes = column_clashes([axis.name for axis in sweep.axes], metrics)
    if clashes:
        raise EvaluationError(
            f"the metric {clashes[0]!r} has the name of another column; expected a new one."
        )
    if sweep.objective is not None and sweep.objective.metric not in metrics:
        raise EvaluationError(
            f"{sweep.evaluate} returned {', '.join(metrics)}; expected {sweep.objective.metric!r}, the "
            "objective, too."
        )


def _checked(sweep: Sweep) -> tuple[Recipe, int | None]:
    """The recipe of a first point, and how many settings differ in more than coefficients."""
    order = sweep.order()
    names = [sweep.axes[k].name for k in order]
    if sweep.search != "grid":
        first = sweep.strategy().ask()[0]
        return sweep.recipe_at(dict(zip(names, first, strict=True))), None
    points = sweep.strategy().ask()
    if len(points) > _CHECKED:
        lengths = [len({point[k] for point in points}) for k in range(len(names))]
        strides = [math.prod(lengths[k + 1 :]) for k in range(len(names))]
        points = [
            points[0],
            *(points[i * s] for n, s in zip(lengths, strides, strict=True) for i in range(1, n)),
        ]
    recipes = [sweep.recipe_at(dict(zip(names, point, strict=True))) for point in points]
    from tvfast.sweeping.configuration import COEFFICIENTS

    others = [k for k, position in enumerate(order) if sweep.axes[position].parameter not in COEFFICIENTS]
    return recipes[0], len({tuple(point[k] for k in others) for point in sweep.strategy().ask()})


def _receives(sweep: Sweep, recipe: Recipe) -> str:
    if sweep.receives is not None:
        return sweep.receives
    donor = recipe.parts_of(recipe.donor)[0]
    return "model" if not recipe.stages and has_transformers_model(donor) else "state_dict"


def _why_files(recipe: Recipe, receives: str) -> str | None:
    return "the function takes a folder" if receives == "folder" else why_files(recipe)


def _merges(recipe: Recipe, folder: Path, receives: str, device: str, threads: int) -> Merges:
    if _why_files(recipe, receives) is None:
        return LiveMerges(recipe, as_module=receives == "model", device=device, threads=threads)
    return FileMerges(folder / _MERGED, receives=receives, device=device, threads=threads)


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _loss(sweep: Sweep, row: Row) -> float:
    if sweep.objective is None:
        return math.nan
    return sweep.objective.loss(row.metrics.get(sweep.objective.metric, math.nan))


def _best(sweep: Sweep, rows: list[Row]) -> Row | None:
    """The first of the best ones."""
    judged = [row for row in rows if not math.isnan(_loss(sweep, row))]
    return min(judged, key=lambda row: _loss(sweep, row), default=None)


def _shown(
    sweep: Sweep, folder: Path, rows: list[Row], best: Row | None
) -> tuple[Path | None, tuple[str, ...]]:
    """The picture and the best recipe, where there is something to show."""
    warnings = []
    if best is not None:
        write_text(folder / BEST, sweep.recipe_at(best.parameters).text)
    picture: Path | None = None
    if any(row.metrics for row in rows):
        try:
            from tvfast.sweeping.picture import draw

            picture = folder / PICTURE
            draw(sweep, rows, best, picture)
        except ImportError:
            picture = None
            warnings.append("no picture: matplotlib is not installed; run pip install 'tvfast[sweep]'.")
    return picture, tuple(warnings)
