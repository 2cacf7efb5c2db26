"""Pages that show figures: one file each, which loads nothing and opens without a network."""

from __future__ import annotations

import html
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from tvfast.errors import OutputError

_TITLES = {"inspect": "Task vectors", "merge": "Report of a merge"}


def write_page(path: str | os.PathLike[str], kind: str, data: dict[str, Any]) -> None:
    """Write the page of a kind, "inspect" or "merge", that shows `data`.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        Path(path).write_text(page(kind, data), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{os.fspath(path)}: cannot be written ({error.strerror}). Name another file."
        ) from error


def page(kind: str, data: dict[str, Any]) -> str:
    """The whole page; the data is in it as JSON, and scripts make text of every name, never markup."""
    parts = {
        "TITLE": html.escape(_TITLES[kind]),
        "STYLE": _part("page.css"),
        "DATA": as_script(data),
        "SCRIPT": _part("charts.js") + _part(f"{kind}.js"),
    }
    text = _part("page.html")
    before, *rest = text.split("{{")
    found = [before]
    for piece in rest:  # once from left to right: what is put in is not looked at again
        name, _, after = piece.partition("}}")
        found += [parts[name], after]
    return "".join(found)


def as_script(data: Any) -> str:
    """JSON that may stand in a script element: no character of it can begin or end markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def check_place(path: str) -> None:
    """Raise unless a file can be made at `path`, or replaced; changes nothing.

    Raises:
        OutputError: it is a directory, or its own directory is missing or closed to us.
    """
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise OutputError(f"{path} is a directory; expected the name of a file.")
    if not os.path.isdir(folder):
        raise OutputError(f"{path}: there is no directory {folder}. Make it first, or name another file.")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise OutputError(f"{path}: cannot be written (permission denied). Name another file.")


def _part(name: str) -> str:
    return (files("tvfast.inspection") / "page" / name).read_text(encoding="utf-8")
