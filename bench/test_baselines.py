"""The same merges in stock torch."""

from __future__ import annotations

from collections.abc import Callable

OPS_HERE = ("baseline",)


def test_baselines(time_it: Callable[[], None]) -> None:
    time_it()
