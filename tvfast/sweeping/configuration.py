"""What `tvfast sweep` is asked for: a YAML file, checked before a model is opened."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvfast.errors import RecipeError
from tvfast.recipe import Recipe, documents_of
from tvfast.recipe.document import Value, from_mapping, nearest, plain_data
from tvfast.recipe.keys import method_keys
from tvfast.search import CMA, Grid, Interval, Random, Strategy
from tvfast.sweeping.points import at_point, checked_recipe

SEARCHES = ("grid", "random", "cma")
RECEIVES = ("model", "state_dict", "folder")
ON_ERROR = ("stop", "record")
COEFFICIENTS = ("weight", "lambda")
"""Axes that leave thresholds and other statistics as they are."""

MOST_POINTS = 100_000

_NAME = re.compile(r"([a-z_]+)(?:\[(\d{1,4})\])?")
_RANGE = ("from", "to", "step", "number", "log")


@dataclass(frozen=True, slots=True)
class SweepAxis:
    """One number of the recipe that varies.

    Attributes:
        name: as the table calls it: `density`, or `weight[1]` of models[1].
        parameter: in the recipe.
        model: position in the recipe's `models`; None: the parameter of the whole recipe.
        values: those to try, or the interval to draw from.
    """

    name: str
    parameter: str
    model: int | None
    values: tuple[float, ...] | Interval


@dataclass(frozen=True, slots=True)
class Objective:
    """The number that tells which merge is best."""

    metric: str
    maximise: bool

    def loss(self, value: float) -> float:
        """Lower is better."""
        return -value if self.maximise else value


@dataclass(frozen=True, slots=True)
class Sweep:
    """A checked configuration; `docs/sweep.md` has the meaning of its keys.

    Attributes:
        recipe: as a mapping, without the axes' numbers.
        recipe_where: what stands for it in messages.
    """

    where: str
    recipe: Mapping[str, Any]
    recipe_where: str
    axes: tuple[SweepAxis, ...]
    evaluate: str
    search: str = "grid"
    points: int | None = None
    seed: int = 0
    receives: str | None = None
    objective: Objective | None = None
    on_error: str = "stop"
    out: str | None = None

    @property
    def n_points(self) -> int:
        """How many merges it takes."""
        if self.points is not None:
            return self.points
        return math.prod(len(axis.values) for axis in self.axes if not isinstance(axis.values, Interval))

    def order(self) -> list[int]:
        """Positions of the axes as a grid nests them: those that change what is measured are outermost."""
        return sorted(range(len(self.axes)), key=lambda k: self.axes[k].parameter in COEFFICIENTS)

    def strategy(self) -> Strategy:
        """What proposes points, in the order of `order`."""
        values: Any = [self.axes[k].values for k in self.order()]
        if self.search == "grid":
            return Grid(values)
        kind: type[Random] | type[CMA] = Random if self.search == "random" else CMA
        return kind(values, self.n_points, self.seed)

    def recipe_at(self, point: Mapping[str, float]) -> Recipe:
        """The recipe with the numbers of a point, by the axes' names.

        Raises:
            RecipeError: the method does not take them.
        """
        return checked_recipe(at_point(self.recipe, self.axes, point), self.recipe_where)

    def described(self) -> dict[str, Any]:
        """What makes two sweeps the same, as plain data."""
        return {
            "recipe": self.recipe,
            "axes": {axis.name: _described(axis.values) for axis in self.axes},
            "search": self.search,
            "points": self.points,
            "seed": self.seed,
            "evaluate": self.evaluate,
            "receives": self.receives,
            "objective": None
            if self.objective is None
            else {"metric": self.objective.metric, "maximise": self.objective.maximise},
        }


def read_sweep(source: str | os.PathLike[str] | Mapping[str, Any]) -> Sweep:
    """A configuration from a YAML file, or from the mapping that it would hold.

    Raises:
        RecipeError: no such file, no YAML, or no configuration; with file, line and key. The recipe is read,
            and must be one at the first point.
        UnknownNameError: its method or dialect does not exist.
    """
    if isinstance(source, Mapping):
        return _sweep(from_mapping(source, "sweep"))
    return _sweep(_only(documents_of(os.fspath(source)), os.fspath(source)))


def _sweep(document: Value) -> Sweep:
    readers: dict[str, Callable[[Value], Any]] = {
        "recipe": _recipe,
        "axes": lambda v: v.mapping(what="a mapping from parameters to values"),
        "evaluate": _function,
        "search": lambda v: _word(v, SEARCHES),
        "points": lambda v: _whole(v, 1),
        "seed": lambda v: _whole(v, 0),
        "receives": lambda v: _word(v, RECEIVES),
        "maximise": lambda v: Objective(v.text("the name of a metric"), True),
        "minimise": lambda v: Objective(v.text("the name of a metric"), False),
        "on_error": lambda v: _word(v, ON_ERROR),
        "out": lambda v: os.path.expanduser(v.text("a path")),
    }
    entries = document.mapping(tuple(readers), "a mapping with recipe, axes and evaluate")
    given = {key: value for key, value in entries.items() if value.plain is not None}
    for key in ("recipe", "axes", "evaluate"):
        if key not in given:
            raise document.error(f"has no {key}; expected recipe, axes and evaluate.")
    found = {key: readers[key](value) for key, value in given.items()}
    if "maximise" in found and "minimise" in found:
        raise given["minimise"].error("is given beside maximise; expected one of them.")
    objective = found.pop("maximise", None) or found.pop("minimise", None)
    recipe, recipe_where = found.pop("recipe")
    search = found.get("search", "grid")
    axes = tuple(_axis(name, value, search) for name, value in found.pop("axes").items())
    if not axes:
        raise given["axes"].error("is empty; expected at least one parameter.")
    sweep = Sweep(
        where=document.where,
        recipe=recipe,
        recipe_where=recipe_where,
        axes=axes,
        objective=objective,
        **found,
    )
    _check_search(sweep, document, given)
    _check_axes(sweep, given["axes"])
    return sweep


def _check_search(sweep: Sweep, document: Value, given: Mapping[str, Value]) -> None:
    if sweep.search == "grid" and sweep.points is not None:
        raise given["points"].error("belongs to search: random and cma; a grid has its own number.")
    if sweep.search != "grid" and sweep.points is None:
        raise document.error(f"has no points; expected how many merges search: {sweep.search} may try.")
    if sweep.search == "cma" and sweep.objective is None:
        raise document.error(
            "search: cma needs maximise or minimise, the metric that it follows; found none."
        )
    if sweep.n_points > MOST_POINTS:
        raise given["axes"].error(f"makes {sweep.n_points} points; expected at most {MOST_POINTS}.")


def _check_axes(sweep: Sweep, value: Value) -> None:
    """Raise unless every axis is a number of the method, and the recipe is one at a first point."""
    entries = value.mapping()
    n_models = len(found) if isinstance(found := sweep.recipe.get("models"), list) else 0
    for axis in sweep.axes:
        if axis.model is not None and not axis.model < n_models:
            raise entries[axis.name].error(f"the recipe has {n_models} models; expected one of them, from 0.")
    first = {
        axis.name: axis.values.at(0.5) if isinstance(axis.values, Interval) else axis.values[0]
        for axis in sweep.axes
    }
    recipe = sweep.recipe_at(first)
    keys = {name: key for name, key in method_keys(recipe.method, recipe.dialect).items() if not key.flag}
    for axis in sweep.axes:
        if axis.parameter == "seed":
            if axis.model is not None:
                raise entries[axis.name].error("seed is one for all models; expected seed.")
            continue
        key = keys.get(axis.parameter)
        if key is None:
            raise entries[axis.name].error(
                f"{recipe.method!r} has no number of this name in a recipe."
                f"{nearest(axis.parameter, [*keys])} It has {', '.join([*keys, 'seed'])}."
            )
        if axis.model is not None and not key.per_model:
            raise entries[axis.name].error(f"{key.name} is one for all models; expected {key.name}.")


def _axis(name: str, value: Value, search: str) -> SweepAxis:
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise value.error("is no parameter; expected for example density, lambda, or weight[0] of models[0].")
    model = None if parts[2] is None else int(parts[2])
    return SweepAxis(name, parts[1], model, _values(value, search))


def _values(value: Value, search: str) -> tuple[float, ...] | Interval:
    """A list, a range, or for `random` and `cma` an interval."""
    if isinstance(value.plain, dict):
        return _range(value, search)
    what = "a list of numbers, or {from, to, step}, {from, to, number} or for random and cma {from, to}"
    if search == "cma":
        raise value.expected("{from, to}: cma looks everywhere between two numbers")
    values = tuple(_number(item) for item in value.sequence(what))
    if not values or len(set(values)) != len(values):
        raise value.expected("at least one number, each once")
    return values


def _range(value: Value, search: str) -> tuple[float, ...] | Interval:
    found = {key: item for key, item in value.mapping(_RANGE).items() if item.plain is not None}
    if "from" not in found or "to" not in found:
        raise value.expected("a range with from and to")
    low, high = _number(found["from"]), _number(found["to"])
    log = "log" in found and _flag(found["log"])
    if not low < high or (log and low <= 0.0):
        raise value.error(f"from {low:g} to {high:g}; expected from below to{', both above 0' * log}.")
    interval = Interval(low, high, log)
    if search == "cma" or (search == "random" and not {"step", "number"} & set(found)):
        if {"step", "number"} & set(found):
            raise value.error("has a step or number; cma looks everywhere between from and to.")
        return interval
    if ("step" in found) == ("number" in found):
        raise value.error("expected from and to, and either step or number.")
    if "number" in found:
        number = _whole(found["number"], 2)
        return tuple(_short(interval.at(k / (number - 1))) for k in range(number))
    step = _number(found["step"])
    if not step > 0.0 or log:
        raise found["step"].error("expected a step above 0, and number where the range is log.")
    n_steps = (high - low) / step
    if n_steps > MOST_POINTS:
        raise found["step"].error(f"makes {n_steps:.3g} values; expected at most {MOST_POINTS}.")
    return tuple(_short(low + k * step) for k in range(math.floor(n_steps + 1e-9) + 1))


def _short(value: float) -> float:
    """0.3 and not 0.30000000000000004."""
    return float(f"{value:.12g}")


def _described(values: tuple[float, ...] | Interval) -> Any:
    if isinstance(values, Interval):
        return {"from": values.low, "to": values.high, "log": values.log}
    return list(values)


def _recipe(value: Value) -> tuple[dict[str, Any], str]:
    """A recipe, or the path of one, as a mapping and what stands for it."""
    if isinstance(value.plain, dict):
        found: dict[str, Any] = plain_data(value)
        return found, f"{value.where}: recipe"
    path = os.path.expanduser(value.text("a recipe, or the path of one"))
    document = _only(documents_of(path), path)
    document.mapping(what="a mapping with merge_method and models")
    return plain_data(document), path


def _only(documents: list[Value], where: str) -> Value:
    if len(documents) != 1:
        raise RecipeError(
            f"{where}: has {len(documents)} documents; expected one. A sweep varies one recipe."
        )
    return documents[0]


def _function(value: Value) -> str:
    text = value.text("a function, module:function or file.py:function")
    place, colon, name = text.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise value.expected("a function, module:function or file.py:function")
    return text


def _word(value: Value, known: tuple[str, ...]) -> str:
    if value.plain not in known:
        raise value.expected(f"one of {', '.join(known)}")
    return str(value.plain)


def _whole(value: Value, least: int) -> int:
    plain = value.plain
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < least:
        raise value.expected(f"an integer of at least {least}")
    return plain


def _number(value: Value) -> float:
    """A finite number; texts such as `1e-3`, which YAML 1.1 does not read as numbers, are."""
    plain = value.plain
    try:
        found = math.nan if isinstance(plain, bool) else float(plain)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise value.expected("a finite number")
    return found


def _flag(value: Value) -> bool:
    if not isinstance(value.plain, bool):
        raise value.expected("true or false")
    return value.plain
