"""Importance and curvature of one layer."""

from __future__ import annotations

from collections.abc import Callable

OPS_HERE = ("score", "kron", "curvature")


def test_layers(time_it: Callable[[], None]) -> None:
    time_it()
