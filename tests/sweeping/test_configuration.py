"""Configurations: values of axes, numbers of points, errors by key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tvfast.errors import RecipeError, UnknownNameError
from tvfast.search import Interval
from tvfast.sweeping import read_sweep

Configured = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("written", "search", "values"),
    [
        ([1, 0.5], "grid", (1.0, 0.5)),
        ({"from": 0, "to": 1, "step": 0.1}, "grid", tuple(round(0.1 * k, 1) for k in range(11))),
        ({"from": 0, "to": 1, "step": 0.3}, "grid", (0.0, 0.3, 0.6, 0.9)),
        ({"from": 0.1, "to": 1, "number": 4}, "random", (0.1, 0.4, 0.7, 1.0)),
        ({"from": "1e-3", "to": 1, "number": 4, "log": True}, "grid", (0.001, 0.01, 0.1, 1.0)),
        ({"from": 0, "to": 1}, "random", Interval(0.0, 1.0)),
        ({"from": 0.1, "to": 1, "log": True}, "cma", Interval(0.1, 1.0, log=True)),
    ],
)
def test_values_of_an_axis(configured: Configured, written: Any, search: str, values: Any) -> None:
    more = {} if search == "grid" else {"search": search, "points": 7, "maximise": "norm"}
    sweep = read_sweep(configured({"lambda": written}, **more))
    (axis,) = sweep.axes
    assert axis.values == values
    assert sweep.n_points == (len(values) if search == "grid" else 7)


def test_numbers_are_put_where_the_axis_says(configured: Configured) -> None:
    axes = {"density": [0.3], "weight[1]": [0.7], "weight": [0.2], "seed": [5]}
    sweep = read_sweep(configured(axes, recipe={"merge_method": "dare_ties"}))
    recipe = sweep.recipe_at({name: values[0] for name, values in axes.items()})
    from tvfast.sweeping.merges import _method

    method = _method(recipe, recipe.seed)
    assert method.weights == (0.2, 0.7, 0.2)
    assert method.density == (0.3, 0.3, 0.3)
    assert method.seed == 5
    assert sweep.recipe["models"][1]["parameters"] == {"weight": 1.0}  # the original is as it was
    axes = {"density": [0.3], "weight[1]": [0.7], "seed": [5]}
    recipe = read_sweep(configured(axes)).recipe_at({name: values[0] for name, values in axes.items()})
    assert _method(recipe, recipe.seed).weights == (1.0, 0.7, 1.0)


def test_settings_are_outermost_so_that_thresholds_are_reused(configured: Configured) -> None:
    sweep = read_sweep(configured({"lambda": [1, 2], "density": [0.1, 0.2], "weight[0]": [3, 4]}))
    names = [sweep.axes[k].name for k in sweep.order()]
    assert names == ["density", "lambda", "weight[0]"]
    assert [point[0] for point in sweep.strategy().ask()] == [0.1] * 4 + [0.2] * 4


def test_a_recipe_in_a_file_of_its_own(configured: Configured, tmp_path: Path) -> None:
    import yaml

    found = configured({"lambda": [1, 2]})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(found["recipe"]))
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump({**found, "recipe": str(tmp_path / "recipe.yml")}))
    sweep = read_sweep(tmp_path / "sweep.yml")
    assert sweep.recipe == found["recipe"]
    assert sweep.recipe_where == str(tmp_path / "recipe.yml")
    (tmp_path / "recipe.yml").write_text("a: 1\n---\nb: 2\n")
    with pytest.raises(RecipeError, match=r"recipe.yml: has 2 documents; expected one"):
        read_sweep(tmp_path / "sweep.yml")
    with pytest.raises(RecipeError, match=r"none.yml: no such file"):
        read_sweep(tmp_path / "none.yml")


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "axes: is empty"),
    ({"lambda": []}, {}, "axes.lambda: is an empty list; expected at least one number"),
    ({"lambda": [1, 1]}, {}, "each once"),
    ({"lambda": ["x"]}, {}, r"axes.lambda\[0\]: is 'x'; expected a finite number"),
    ({"lambda": [True]}, {}, "expected a finite number"),
    ({"lambda": {"from": 1, "to": 0, "step": 1}}, {}, "from 1 to 0; expected from below to"),
    ({"lambda": {"from": 0, "to": 1, "step": 1, "log": True}}, {}, "both above 0"),
    ({"lambda": {"from": 0, "to": 1}}, {}, "either step or number"),
    ({"lambda": {"from": 0, "to": 1, "step": 1, "number": 2}}, {}, "either step or number"),
    ({"lambda": {"from": 0, "to": 1, "step": 0}}, {}, "expected a step above 0"),
    ({"lambda": {"from": 0, "to": 1, "step": "1e-9"}}, {}, "values; expected at most 100000"),
    ({"lambda": {"to": 1}}, {}, "expected a range with from and to"),
    ({"lambda": {"start": 1}}, {}, "no such key"),
    ({"densty": [1]}, {}, "no such parameter. Did you mean 'density'"),
    ({"t": [1]}, {}, "axes.t: 'ties' has no number of this name"),
    ({"normalize": [1]}, {}, "has no number of this name"),
    ({"lambda[0]": [1]}, {}, "lambda is one for all models"),
    ({"seed[0]": [1]}, {}, "seed is one for all models"),
    ({"weight[3]": [1]}, {}, "the recipe has 3 models"),
    ({"weight 1": [1]}, {}, "is no parameter; expected for example density"),
    ({"density": [2]}, {}, "density"),
    ({"lambda": [1]}, {"search": "tpe"}, "search: is 'tpe'; expected one of grid, random, cma"),
    ({"lambda": [1]}, {"search": "random"}, "has no points"),
    ({"lambda": [1]}, {"points": 3}, "points: belongs to search: random and cma"),
    ({"lambda": [1]}, {"search": "cma", "points": 3, "minimise": "x"}, "cma looks everywhere"),
    ({"lambda": {"from": 0, "to": 1}}, {"search": "cma", "points": 3}, "needs maximise or minimise"),
    ({"lambda": [1]}, {"maximise": "x", "minimise": "y"}, "expected one of them"),
    ({"lambda": [1]}, {"evaluate": "functions.py"}, "expected a function, module:function"),
    ({"lambda": [1]}, {"evaluate": None}, "has no evaluate"),
    ({"lambda": [1]}, {"receives": "tensor"}, "expected one of model, state_dict, folder"),
    ({"lambda": [1]}, {"reciept": 1}, "no such key"),
    ({"lambda": list(range(1000)), "weight": list(range(1, 1000))}, {}, "999000 points"),
]


@pytest.mark.parametrize(("axes", "keys", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_configurations(
    configured: Configured, axes: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        read_sweep(configured(axes, **keys))


def test_a_method_that_does_not_exist(configured: Configured) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ties'"):
        read_sweep(configured({"lambda": [1]}, recipe={"merge_method": "tise"}))
