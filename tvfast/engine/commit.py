"""The end of a merge: staged files get their names in the output directory, in steps that can be repeated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from tvfast.engine.durable import output_error, sync_folder
from tvfast.engine.locking import LOCK_NAME, NOT_EMPTY
from tvfast.engine.manifest import RUNNING_NAME, Manifest
from tvfast.errors import OutputError

FILES_NAME = "files"
"""Staged files, under their names."""

OLD_NAME = "old"
"""Old weights, on their way out."""


def check_free(out: str, manifest: Manifest) -> None:
    """Refuses to put a file where a directory is, or, unless it overwrites, where anything is.

    Raises:
        OutputError: with the names that are in the way.
    """
    for name in manifest.moves:
        path = os.path.join(out, name)
        for parent in _parents(out, name):
            if os.path.lexists(parent) and (os.path.islink(parent) or not os.path.isdir(parent)):
                raise OutputError(
                    f"{parent}: is where a directory of the merge goes, and is none. Move it away, then run "
                    "again with --resume."
                )
        if os.path.isdir(path) and not os.path.islink(path):
            raise OutputError(
                f"{path}: a directory is where a file of the merge goes. Move it away, then run again with "
                "--resume."
            )
        if os.path.lexists(path) and not manifest.overwrite:
            raise OutputError(
                f"{path}: appeared while the merge ran, which would replace it. Move it away, then run again "
                "with --resume."
            )


def publish(out: str, staging: str, manifest: Manifest) -> None:
    """Moves old weights out of `out` and staged files in, the last of `manifest.moves` last.

    Safe to repeat from the start after it was stopped anywhere. Before the last file is in place, `out` holds
    no file that makes it a model to a loader.

    Raises:
        OutputError: a step failed, or a staged file is gone.
    """
    files, old = os.path.join(staging, FILES_NAME), os.path.join(staging, OLD_NAME)
    step = out
    try:
        os.makedirs(old, exist_ok=True)
        for name in manifest.retired:
            step = os.path.join(out, name)
            is_new = name in manifest.moves and not os.path.lexists(os.path.join(files, name))
            if not is_new and os.path.lexists(step):
                os.rename(step, os.path.join(old, name))
        sync_folder(out)
        folders = {out}
        for position, name in enumerate(manifest.moves):
            step = os.path.join(out, name)
            for parent in _parents(out, name):
                os.makedirs(parent, exist_ok=True)
                folders.add(parent)
            if position == len(manifest.moves) - 1:
                _sync_all(folders)
            _move(os.path.join(files, name), step)
        sync_folder(out)
    except OSError as error:
        raise output_error(error, "put the file in its place", step) from error


def _move(staged: str, final: str) -> None:
    if os.path.lexists(staged):
        os.replace(staged, final)
    elif not os.path.lexists(final):
        raise OutputError(
            f"{staged}: is gone, so the merge cannot be completed. Run again with --overwrite to make it "
            "anew."
        )


def _parents(out: str, name: str) -> list[str]:
    """The directories below `out` of a name such as `templates/chat.jinja`, outermost first."""
    found = []
    while name := os.path.dirname(name):
        found.append(os.path.join(out, name))
    return found[::-1]


def _sync_all(folders: set[str]) -> None:
    for folder in sorted(folders, reverse=True):
        sync_folder(folder)


def sync_tree(folder: str) -> None:
    """Brings the names of a directory and all below it to the disk."""
    for path, _, _ in os.walk(folder, topdown=False):
        sync_folder(path)


def clear(staging: str) -> None:
    """Deletes what is staged, the manifest after everything that it speaks of; the lock stays.

    Raises:
        OutputError: something cannot be deleted.
    """
    try:
        names = [name for name in os.listdir(staging) if name not in (RUNNING_NAME, LOCK_NAME)]
        for name in [*sorted(names), RUNNING_NAME]:
            path = os.path.join(staging, name)
            if _is_kept_open(name):
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                _remove_tree(path)
            elif os.path.lexists(path):
                os.unlink(path)
    except OSError as error:
        raise output_error(error, "delete the staging directory's content", staging) from error


def _remove_tree(folder: str) -> None:
    """Deletes a directory with all in it, except what NFS keeps for processes that still have it open."""
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(entry.path)
            elif not _is_kept_open(entry.name):
                os.unlink(entry.path)
    try:
        os.rmdir(folder)
    except OSError as error:
        left = [name for _, _, names in os.walk(folder) for name in names]
        if error.errno not in NOT_EMPTY or not all(map(_is_kept_open, left)):
            raise


def _is_kept_open(name: str) -> bool:
    """Whether this is how NFS calls a deleted file until the last process closes it; then it is gone."""
    return name.startswith(".nfs")


def remove_empty(folders: Sequence[str]) -> None:
    """Deletes those of the directories that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)
