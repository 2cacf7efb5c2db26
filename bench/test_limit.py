"""What the memory of this machine gives: nothing can be faster."""

from __future__ import annotations

from collections.abc import Callable

OPS_HERE = ("limit",)


def test_limit(time_it: Callable[[], None]) -> None:
    time_it()
