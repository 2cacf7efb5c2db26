"""Whole merges and comparisons, from Python call to result."""

from __future__ import annotations

from collections.abc import Callable

OPS_HERE = (
    "ties",
    "della",
    "methods",
    "compare",
)


def test_methods(time_it: Callable[[], None]) -> None:
    time_it()
