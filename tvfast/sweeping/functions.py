"""The caller's function: found by name, called on a merge, its result checked."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from tvfast.errors import EvaluationError, RecipeError

VALUE = "value"
"""The metric of a function that returns a single number."""

Function = Callable[[Any], Any]


def load_function(reference: str, where: str) -> Function:
    """The function that `module:function` or `file.py:function` names.

    Modules are looked for in the working directory first, then where Python looks.

    Raises:
        RecipeError: there is no such file, module or function, or importing it fails.
    """
    place, _, name = reference.rpartition(":")
    try:
        module = _of_file(place) if place.endswith(".py") else _of_module(place)
    except (Exception, SystemExit) as error:  # whatever the caller's code raises as it is imported
        raise RecipeError(
            f"{where}: evaluate: {place} cannot be imported ({type(error).__name__}: {_one_line(error)}); "
            "expected a file or module that imports."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = sorted(
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        )
        raise RecipeError(
            f"{where}: evaluate: {place} has no function {name!r}; it has {', '.join(known[:20]) or 'none'}."
        )
    function: Function = found
    return function


def measured(function: Function, reference: str, merged: Any) -> dict[str, float]:
    """What the function says of one merge, by metric.

    Raises:
        EvaluationError: it raised, or returned neither a number nor a mapping from names to numbers.
    """
    try:
        found = function(merged)
    except (Exception, SystemExit) as error:
        line = _line_of(error, reference)
        raise EvaluationError(
            f"{reference} raised {type(error).__name__}{line}: {_one_line(error)}; expected a number, or a "
            "mapping from names to numbers."
        ) from error
    if not isinstance(found, Mapping):
        return {VALUE: _number(found, reference, "a number, or a mapping from names to numbers")}
    if not found or not all(isinstance(name, str) and name.strip() for name in found):
        raise EvaluationError(
            f"{reference} returned a mapping with the keys {list(found)[:5]}; expected names of metrics, at "
            "least one."
        )
    return {name: _number(value, f"{reference}, {name!r},", "a number") for name, value in found.items()}


def _number(value: object, what: str, expected: str) -> float:
    item = getattr(value, "item", None)  # of a tensor, or of a number of numpy's
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(item() if callable(item) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise EvaluationError(f"{what} returned a {type(value).__name__}; expected {expected}.") from None


def _of_file(path: str) -> Any:
    file = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no file {path}")
    name = f"_tvfast_sweep_{os.path.splitext(os.path.basename(file))[0]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as pickle and dataclasses want it
    spec.loader.exec_module(module)
    return module


def _of_module(name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # the installed command does not look where it is called
    return importlib.import_module(name)


def _line_of(error: BaseException, reference: str) -> str:
    """The last line of the caller's own file on the way to the error."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    place = os.path.abspath(reference.rpartition(":")[0])
    own = [frame for frame in frames if os.path.abspath(frame.filename) == place] or frames
    return f" in {os.path.basename(own[-1].filename)}, line {own[-1].lineno}" if own else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
