"""Arguments of merges, checked before anything is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from tvfast.errors import ArgumentError


def check_device(device: str, device_memory: int | None, also: Iterable[str] = ()) -> None:
    """Raise unless these name a device, or one of `also`, and a size."""
    known = isinstance(device, str) and (re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) or device in also)
    if not known:
        names = "".join(f", {name!r}" for name in also)
        raise ArgumentError(
            f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or for example 'cuda:1'{names}."
        )
    if device_memory is not None:
        check_integer("device_memory", device_memory, 1, "a positive number of bytes")


def check_choices(nonfinite: str | None, resume: bool, overwrite: bool) -> None:
    """Raise unless these are words that a merge knows, and go together."""
    if nonfinite not in (None, "error", "propagate"):
        raise ArgumentError(f"nonfinite is {nonfinite!r}; expected 'error' or 'propagate'.")
    if resume and overwrite:
        raise ArgumentError("resume and overwrite exclude each other: continue what is there, or replace it.")


def check_integer(name: str, value: object, least: int, expected: str, end: int | None = None) -> None:
    """Raise unless `value` is an integer in [least, end)."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (end is not None and isinstance(value, int) and value >= end):
        raise ArgumentError(f"{name} is {value!r}; expected {expected}.")


def check_progress(progress: object) -> None:
    """Raise unless it has the methods of `Progress`, or is None."""
    lacking = [name for name in ("start", "read", "wrote", "finish") if not hasattr(progress, name)]
    if progress is not None and lacking:
        raise ArgumentError(
            f"progress is a {type(progress).__name__} without {', '.join(lacking)}; expected an object with "
            "the methods of tvfast.checkpoints.Progress."
        )


def path_of(value: object, name: str) -> str:
    """A directory's name as text."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or "\0" in path:
        raise ArgumentError(f"{name} is {value!r}; expected the path of a directory.")
    return path
