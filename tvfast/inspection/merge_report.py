"""The report of a merge: what it did to every tensor, as JSON and as a page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvfast.checkpoint.stored import Stored
from tvfast.engine.observing import RUN, SHARE, Observation, Observer, summary
from tvfast.engine.tasks import Task
from tvfast.inspection.names import layer_of, module_of
from tvfast.inspection.page import write_page

OUTCOME, TENSORS, PAGE = "report.json", "tensors.json", "report.html"


@dataclass(frozen=True, slots=True)
class Merged:
    """What there is to report beside the observations."""

    recipe: str
    tasks: Sequence[Task]
    outcome: dict[str, Any]


def write_report(folder: str, merged: Merged, observer: Observer | None) -> None:
    """Write `report.json` into a folder, and `report.html` and `tensors.json` of what was observed.

    Args:
        observer: None where nothing was merged.

    Raises:
        OSError, OutputError: a file cannot be written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    (place / OUTCOME).write_text(json.dumps(merged.outcome, indent=2) + "\n")
    if observer is None:
        return
    data = as_json(merged, observer)
    (place / TENSORS).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_page(place / PAGE, "merge", data)


def as_json(merged: Merged, observer: Observer) -> dict[str, Any]:
    """Plain data. Lists over models are over all of `models`: None for one that a tensor is not made of."""
    models = list(dict.fromkeys(name for task in merged.tasks for name in _names(task)))
    seen = {
        task.name: _aligned(task, observer.tensors[task.name], models)
        for task in merged.tasks
        if task.name in observer.tensors
    }
    groups: dict[str, dict[str, list[Observation]]] = {"layers": {}, "modules": {}}
    for name, one in seen.items():
        groups["layers"].setdefault(layer_of(name), []).append(one)
        groups["modules"].setdefault(module_of(name), []).append(one)
    n = len(models)
    return {
        "recipe": merged.recipe,
        "outcome": merged.outcome,
        "models": models,
        "sample": {"run": RUN, "share": SHARE},
        "n_tensors": len(merged.tasks),
        "tensors": {
            task.name: _described(task) | summary([seen[task.name]], n)
            for task in merged.tasks
            if task.name in seen
        },
        **{
            kind: {name: summary(some, n) for name, some in of_kind.items()}
            for kind, of_kind in groups.items()
        },
        "total": summary(list(seen.values()), n) if seen else None,
    }


def _described(task: Task) -> dict[str, Any]:
    method = task.method or (task.tensor.method if task.tensor else None)
    return {
        "layer": layer_of(task.name),
        "module": module_of(task.name),
        "shape": list(task.shape),
        "dtype": task.dtype,
        "n_elements": task.n_elements,
        "method": method.info.name if method else "copy",
    }


def _names(task: Task) -> list[str]:
    """The model of each input: a directory or file, with its adapter; told apart where one comes twice."""
    found: list[str] = []
    for stored in task.models:
        name = _source(stored)
        n = sum(other.partition(" #")[0] == name for other in found)
        found.append(f"{name} #{n + 1}" if n else name)
    return found


def _source(stored: Stored) -> str:
    place = os.path.dirname(stored.path) or stored.path
    if stored.update is None:
        return place
    return f"{place} + {os.path.dirname(stored.update.a.path) or stored.update.a.path}"


def _aligned(task: Task, one: Observation, models: Sequence[str]) -> Observation:
    """An observation with a place for every model of the merge."""
    own = _names(task)
    places = [own.index(name) if name in own else None for name in models]

    def spread(values: Sequence[Any], nothing: Any) -> list[Any]:
        return [nothing if k is None else values[k] for k in places]

    found = Observation(
        len(models),
        one.n_elements,
        n_seen=one.n_seen,
        base=one.base,
        drift=one.drift,
        seconds=one.seconds,
    )
    found.models, found.dots = spread(one.models, []), spread(one.dots, [])
    found.n_moved, found.n_reversed = spread(one.n_moved, 0), spread(one.n_reversed, 0)
    found.n_asked, found.n_kept = spread(one.n_asked, 0), spread(one.n_kept, 0)
    return found
