"""Exact thresholds, and the pass that proves one."""

from __future__ import annotations

from collections.abc import Callable

OPS_HERE = ("thresholds",)


def test_thresholds(time_it: Callable[[], None]) -> None:
    time_it()
