"""New coefficients for live weights."""

from __future__ import annotations

from collections.abc import Callable

OPS_HERE = ("live",)


def test_live(time_it: Callable[[], None]) -> None:
    time_it()
