"""What a merge is made of: recorded while it runs, and beside the finished weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from tvfast.checkpoint.layout import Layout
from tvfast.engine.checksums import file_checksum
from tvfast.engine.durable import output_error, replace_file
from tvfast.errors import OutputError

FORMAT = 1
RUNNING_NAME = "manifest.json"
FINISHED_NAME = "tvfast_manifest.json"

_OF_THIS_MACHINE = frozenset({"mtime_ns"})
_MOST_DIFFERENCES = 6
_SHOWN_CHARACTERS = 80

Identity = dict[str, Any]
"""What the bytes of an output depend on, as JSON values.

`version` of tvfast, `recipe`, `seed`, `inputs`: path -> what `Checkpoint.identity` returns; any other key.
`layout` is added here.
"""


class State(str, Enum):
    """How far a run is. When it is `COMMITTING`, all bytes are on the disk and only names change."""

    MERGING = "merging"
    COMMITTING = "committing"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of a run that has not ended.

    Attributes:
        identity: what the output depends on.
        overwrite: an older model in the output directory is to be replaced.
        state: see `State`.
        moves: names of staged files in the order in which they are renamed into the output directory.
        retired: names of old weight files, in the order in which they are moved out of it before.
    """

    identity: Identity
    overwrite: bool
    state: State = State.MERGING
    moves: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()

    def write(self, folder: str) -> None:
        """Replaces the manifest in `folder`, durably.

        Raises:
            OutputError: it cannot be written.
        """
        content = {
            "format": FORMAT,
            "state": self.state.value,
            "overwrite": self.overwrite,
            "moves": self.moves,
            "retired": self.retired,
            "identity": self.identity,
        }
        path = os.path.join(folder, RUNNING_NAME)
        try:
            replace_file(path, _as_json(content))
        except OSError as error:
            raise output_error(error, "write the manifest", path) from error

    @classmethod
    def read(cls, folder: str) -> Manifest | None:
        """The manifest in `folder`, or None if there is none.

        Raises:
            OutputError: it cannot be read or understood.
        """
        path = os.path.join(folder, RUNNING_NAME)
        content = _read_json(path)
        if content is None:
            return None
        _check_format(content, path)
        try:
            return cls(
                dict(content["identity"]),
                bool(content["overwrite"]),
                State(content["state"]),
                tuple(map(str, content["moves"])),
                tuple(map(str, content["retired"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _not_understood(path) from error


def full_identity(identity: Mapping[str, Any], layout: Layout) -> Identity:
    """The caller's identity as JSON gives it back, with the layout's digest."""
    return {**json.loads(json.dumps(identity)), "layout": layout_digest(layout)}


def layout_digest(layout: Layout) -> str:
    """One number for names, headers and sizes of all shards, from which the index follows."""
    digest = hashlib.sha256()
    for shard in layout.shards:
        digest.update(f"{shard.name}\0{shard.n_bytes}\0{len(shard.header)}\0".encode())
        digest.update(shard.header)
        for offset, data in shard.fills:
            digest.update(f"{offset}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def finished_manifest(identity: Identity, layout: Layout, crcs: Sequence[int]) -> bytes:
    """What stays beside the weights: neither times nor places, so equal inputs give equal bytes."""
    shards = [
        {"name": shard.name, "n_bytes": shard.n_bytes, "crc32c": f"{crc:08x}"}
        for shard, crc in zip(layout.shards, crcs, strict=True)
    ]
    return _as_json({"format": FORMAT, "identity": _portable(identity), "shards": shards})


def verify_finished(out: str, identity: Identity, layout: Layout) -> list[str]:
    """Checks that `out` holds the whole, undamaged output of `identity`; returns warnings.

    Raises:
        OutputError: it is of something else, or damaged.
    """
    made_by, crcs = check_finished(out, identity, layout)
    _verify_files(out, layout, crcs)
    if made_by == identity.get("version"):
        return []
    return [f"{out} was made by tvfast {made_by}; this is {identity.get('version')}. It is left as it is."]


def check_finished(out: str, identity: Identity, layout: Layout) -> tuple[object, dict[str, tuple[int, int]]]:
    """The release that made a finished output, and size and checksum of its shards, which are not read.

    Raises:
        OutputError: it is of something else than `identity`, or its manifest is damaged.
    """
    path = os.path.join(out, FINISHED_NAME)
    content = _read_json(path) or {}
    _check_format(content, path)
    try:
        found = dict(content["identity"])
        crcs = {str(s["name"]): (int(s["n_bytes"]), int(s["crc32c"], 16)) for s in content["shards"]}
    except (KeyError, TypeError, ValueError) as error:
        raise _not_understood(path) from error
    made_by = found.pop("version", None)
    now = {key: value for key, value in identity.items() if key != "version"}
    changes = list(differences(found, now, ignore=_OF_THIS_MACHINE))
    if changes:
        raise changed(out, "a finished merge of something else", changes)
    if set(crcs) != {shard.name for shard in layout.shards}:
        raise _not_understood(path)
    return made_by, crcs


def _verify_files(out: str, layout: Layout, crcs: Mapping[str, tuple[int, int]]) -> None:
    again = "The finished merge is damaged; run again with --overwrite to make it anew."
    for shard in layout.shards:
        path = os.path.join(out, shard.name)
        n_bytes, expected = crcs[shard.name]
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}. {again}") from error
        if size != n_bytes:
            raise OutputError(f"{path}: has {size} bytes, the manifest beside it says {n_bytes}. {again}")
        crc = file_checksum(path, n_bytes)
        if crc != expected:
            read = "cannot be read" if crc is None else f"has crc32c {crc:08x}"
            raise OutputError(f"{path}: {read}, the manifest beside it says {expected:08x}. {again}")
    if layout.index is not None:
        path = os.path.join(out, layout.index_name)
        try:
            with open(path, "rb") as file:
                index = file.read(len(layout.index) + 1)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}. {again}") from error
        if index != layout.index:
            raise OutputError(f"{path}: does not list the tensors of the shards beside it. {again}")


def changed(out: str, what: str, changes: Sequence[str]) -> OutputError:
    """The error for an output that belongs to another identity."""
    shown = [f"\n  {change}" for change in changes[:_MOST_DIFFERENCES]]
    if len(changes) > _MOST_DIFFERENCES:
        shown.append(f"\n  and {len(changes) - _MOST_DIFFERENCES} more differences")
    return OutputError(
        f"{out} holds {what}:{''.join(shown)}\n"
        "Restore what changed and run again with --resume, or replace it with --overwrite, or name another "
        "directory."
    )


def differences(before: Identity, now: Identity, ignore: frozenset[str] = frozenset()) -> Iterator[str]:
    """Sentences about everything that is not the same in two identities.

    Args:
        ignore: keys of input files that do not count.
    """
    for key in sorted({*before, *now}, key=lambda k: (k in ("inputs", "layout"), k)):
        old, new = before.get(key), now.get(key)
        if key == "inputs":
            yield from _input_differences(old or {}, new or {}, ignore)
        elif old == new:
            continue
        elif key == "recipe":
            yield "the recipe is another one"
        elif key == "layout":
            yield "the output is laid out otherwise: names, dtypes, shapes or order of tensors, or shard size"
        elif key == "version":
            yield f"it was begun by tvfast {old}; this is {new}"
        else:
            yield f"{key} was {_short(old)}, is {_short(new)}"


def _input_differences(
    before: Mapping[str, Any] | Sequence[Any], now: Mapping[str, Any], ignore: frozenset[str]
) -> Iterator[str]:
    """A finished manifest has a list in place of the mapping: it names no paths."""
    if not isinstance(before, Mapping):
        if len(before) != len(now):
            yield f"there were {len(before)} inputs, there are {len(now)}"
            return
        before = dict(zip(now, before, strict=True))
    yield from (f"{path}: is no input any more" for path in before if path not in now)
    for label, files in now.items():
        if label not in before:
            yield f"{label}: was no input"
            continue
        old_files = {str(file["name"]): file for file in before[label]}
        new_files = {str(file["name"]): file for file in files}
        for name in sorted({*old_files, *new_files}):
            path = os.path.join(label, name)
            if name not in new_files:
                yield f"{path}: is not part of the input any more"
            elif name not in old_files:
                yield f"{path}: was not part of the input"
            else:
                yield from _file_differences(path, old_files[name], new_files[name], ignore)


def _file_differences(path: str, old: Identity, new: Identity, ignore: frozenset[str]) -> Iterator[str]:
    for key in sorted({*old, *new} - ignore):
        if old.get(key) == new.get(key):
            continue
        if key == "mtime_ns":
            yield f"{path}: was last changed {_date(old.get(key))}, now {_date(new.get(key))}"
        elif key == "crc32":
            yield f"{path}: has another header, so other tensors, names or shapes"
        else:
            yield f"{path}: {key} was {_short(old.get(key))}, is {_short(new.get(key))}"


def _portable(identity: Identity) -> Identity:
    inputs = [
        [{key: value for key, value in file.items() if key not in _OF_THIS_MACHINE} for file in files]
        for files in identity.get("inputs", {}).values()
    ]
    return {**identity, "inputs": inputs}


def _date(ns: object) -> str:
    if not isinstance(ns, int):
        return "at an unknown time"
    whole = datetime.fromtimestamp(ns // 10**9, timezone.utc)
    return f"{whole:%Y-%m-%d %H:%M:%S}.{ns % 10**9:09d} UTC"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _as_json(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise output_error(error, "read the manifest", path) from error
    except (ValueError, RecursionError) as error:
        raise _not_understood(path) from error
    if not isinstance(content, dict):
        raise _not_understood(path)
    return content


def _check_format(content: Mapping[str, Any], path: str) -> None:
    if content.get("format") != FORMAT:
        raise OutputError(
            f"{path}: has format {content.get('format')!r}, this tvfast reads {FORMAT}. Go on with the "
            "tvfast that wrote it, or run again with --overwrite."
        )


def _not_understood(path: str) -> OutputError:
    return OutputError(f"{path}: is not a manifest of tvfast, or damaged. Run again with --overwrite.")
