"""Merge methods by name. Importing this package, or any of them, imports no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tvfast.errors import ArgumentError, UnknownNameError
from tvfast.methods.base import Method, ProgramMethod, TensorMethod, check_name, nearest, register_method
from tvfast.methods.registry import METHODS, MethodInfo, Parameter
from tvfast.methods.statistics import TableStatistics
from tvfast.methods.whole.custom import custom_method

__all__ = [
    "METHODS",
    "Method",
    "MethodInfo",
    "Parameter",
    "ProgramMethod",
    "TableStatistics",
    "TensorMethod",
    "custom_method",
    "make_method",
    "method_info",
    "register_method",
    "staged_methods",
]

SHARED = frozenset(f.name for f in fields(Method))
"""Parameters that callers pass to every method, as None where they were not given."""


def staged_methods() -> tuple[str, ...]:
    """Methods of the stage algebra; the others are functions of whole tensors and their statistics."""
    return tuple(sorted(name for name, info in METHODS.items() if issubclass(info.cls, ProgramMethod)))


def method_info(name: str) -> MethodInfo:
    """What the registry knows of a method.

    Raises:
        UnknownNameError: no method has that name; the nearest one is named.
    """
    check_name("method", name, sorted(METHODS), "merge")
    return METHODS[name]


def make_method(name: str, **parameters: Any) -> Method:
    """A method with its parameters checked; parameters that are None keep their defaults.

    Raises:
        UnknownNameError: the method, a parameter, `tie` or `dialect` does not exist.
        ArgumentError: a value is out of range, or another method's parameter was given.
    """
    info = method_info(name)
    own = [p.name for p in info.parameters]
    renamed = {"lambda": "scale", "lambda_": "scale", "lam": "scale", "weight": "weights"}
    for found, value in parameters.items():
        if found in own or (value is None and found in SHARED):
            continue
        takers = [other.name for other in METHODS.values() if any(p.name == found for p in other.parameters)]
        if takers:
            raise ArgumentError(
                f"method {name!r} does not take {found!r}; it takes {', '.join(own)}. "
                f"Methods that take {found!r}: {', '.join(sorted(takers))}."
            )
        hint = f" did you mean {renamed[found]!r}?" if renamed.get(found) in own else nearest(found, own)
        raise UnknownNameError(
            f"method {name!r}: parameter {found!r} does not exist;{hint} it takes {', '.join(own)}."
        )
    return info.cls(**{key: value for key, value in parameters.items() if value is not None}).specialised()
