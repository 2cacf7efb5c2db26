"""The output directory before a merge: whether it may be written to, and what it holds already."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence

from tvfast.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from tvfast.checkpoint.locating import METADATA_NAME
from tvfast.engine.durable import output_error
from tvfast.engine.manifest import FINISHED_NAME
from tvfast.errors import OutputError

STAGING_NAME = ".tvfast"

_ENTRIES = (INDEX_NAME, SINGLE_NAME, METADATA_NAME, "pytorch_model.bin.index.json", "pytorch_model.bin")
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors|pytorch_model.*\.bin|__\d+_\d+\.distcp")
_WEIGHTS = (".safetensors", ".bin")
_MOST_LISTED = 5


def checked_output(out: str, inputs: Sequence[str]) -> str:
    """The real path of `out`, which need not exist.

    Raises:
        OutputError: `out` is no directory, or a link, or it is, or lies in, or serves as one of the inputs.
    """
    if not out:
        raise OutputError("the output directory's name is empty; name a directory.")
    path = out.rstrip("/") or "/"
    if os.path.islink(path):
        raise OutputError(
            f"{out} is a symbolic link to {os.readlink(path)}; name the directory itself, so that it is "
            "clear what is written to."
        )
    path = os.path.realpath(path)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise OutputError(f"{out} is a file; a merge is written to a directory. Name another one.")
    for source in inputs:
        _check_apart(out, path, source)
    return path


def check_report_folder(folder: str, inputs: Sequence[str]) -> None:
    """Raise unless a folder for a report is there or can be made, apart from the inputs; changes nothing.

    Raises:
        OutputError: it is no directory, cannot be written to, or it is, or lies in, one of the inputs.
    """
    path = os.path.realpath(folder)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise OutputError(f"{folder} is a file; a report is written to a directory. Name another one.")
    for source in inputs:
        _check_apart(folder, path, source)
    check_writable(path)


def check_writable(path: str) -> None:
    """Raise unless the directory `path` can be written to, or be made; changes nothing.

    Raises:
        OutputError: the first directory above it that exists is none, or not writable.
    """
    present = next(above for above in _above(path) if os.path.lexists(above))
    code = 0
    if not os.path.isdir(present):
        code = errno.ENOTDIR
    elif not os.access(present, os.W_OK | os.X_OK):
        code = errno.EACCES
    if code:
        raise output_error(OSError(code, os.strerror(code)), "make or write a directory in it", present)


def _key(path: str) -> tuple[int, int] | None:
    """Device and inode: equal also where one directory has two paths."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _above(path: str) -> Iterator[str]:
    """`path` and everything that it lies in."""
    yield path
    while (parent := os.path.dirname(path)) != path:
        path = parent
        yield path


def _check_apart(out: str, path: str, source: str) -> None:
    advice = "Inputs are never written to; name a directory outside of them."
    key = _key(source)
    if key is None:
        return  # reading it will say so
    if os.path.isdir(source):
        if key == _key(path):
            raise OutputError(f"{out} is the input {source}. {advice}")
        if any(key == _key(folder) for folder in _above(path)):
            raise OutputError(f"{out} lies inside the input {source}. {advice}")
        files = _links(source)
    else:
        files = [source]
    for real in map(os.path.realpath, files):
        if (folder := _key(os.path.dirname(real))) is not None and folder == _key(path):
            raise OutputError(
                f"{out} holds {os.path.basename(real)}, which the input {source} reads. {advice}"
            )


def _links(folder: str) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(folder) if entry.is_symlink()]
    except OSError:
        return []  # reading it will say so


def entries(out: str) -> list[str]:
    """What `out` holds beside the staging directory; nothing where it does not exist."""
    try:
        return sorted(name for name in os.listdir(out) if name != STAGING_NAME)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise output_error(error, "list the output directory", out) from error


def listed(names: Sequence[str]) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(names[:_MOST_LISTED])
    return shown if len(names) <= _MOST_LISTED else f"{shown} and {len(names) - _MOST_LISTED} more"


def old_weights(out: str) -> tuple[str, ...]:
    """Files that make `out` a model today, what a loader looks for first coming first."""
    here = [name for name in entries(out) if _is_file(os.path.join(out, name))]
    listed_names = {
        name for index in _ENTRIES if index.endswith(".json") for name in _index_files(out, index)
    }
    weights = [name for name in here if name in listed_names or _SHARD.fullmatch(name)]
    first = [name for name in (*_ENTRIES, FINISHED_NAME) if name in here]
    return (*first, *(name for name in weights if name not in first))


def _index_files(out: str, name: str) -> set[str]:
    """Weight files that an index names; it may say anything, so endings are checked."""
    try:
        with open(os.path.join(out, name), "rb") as file:
            files = json.loads(file.read())["weight_map"].values()
        return {file for file in files if isinstance(file, str) and file.endswith(_WEIGHTS)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _is_file(path: str) -> bool:
    return os.path.islink(path) or os.path.isfile(path)
