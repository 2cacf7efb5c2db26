"""The merge pass alone."""

from __future__ import annotations

from collections.abc import Callable

OPS_HERE = ("combine",)


def test_combine(time_it: Callable[[], None]) -> None:
    time_it()
