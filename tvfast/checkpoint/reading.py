"""Whole checkpoints: every tensor of every file, found and checked before any is read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from tvfast.checkpoint.files import damaged, read_json, shown
from tvfast.checkpoint.header import Header, read_header
from tvfast.checkpoint.locating import PYTORCH, Location, is_dcp, locate, written_otherwise
from tvfast.checkpoint.stored import Stored
from tvfast.errors import CheckpointError

_CONFIG_BYTES = 2**23
_SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint and where their bytes lie. No tensor has been read.

    Attributes:
        path: as given.
        directory: where the companion files lie: the given directory or a cached snapshot; None for one file.
        tensors: by name, in the order of the files: shards by name, ascending offsets.
        files: paths of the weight files, in that order.
        aliases: name -> first name with the same bytes, dtype and shape; both are in `tensors`.
        config: `config.json`, parsed; None if the directory has none, or for one file.
        headers: what each file declares, in the order of `files`.
        calibration: factors of activations beside 8-bit weights, by name; they are not among `tensors`.
        adapter: directory of the adapter that is added; None: there is none.
        stored_as: types of the model's own tensors where an adapter's, of other types, take their places.
        notes: what tells of changes beside the headers: (file, what it says that matters).
    """

    path: str
    directory: str | None
    tensors: dict[str, Stored]
    files: tuple[str, ...]
    aliases: dict[str, str]
    config: dict[str, Any] | None
    headers: tuple[Header, ...]
    calibration: dict[str, Stored] = field(default_factory=dict)
    adapter: str | None = None
    notes: tuple[tuple[str, str], ...] = ()
    stored_as: dict[str, str] = field(default_factory=dict)

    def identity(self) -> list[dict[str, Any]]:
        """What tells that a file has changed: its name, size, last write and checksum of the header.

        As found when the checkpoint was opened. Paths are left out, so a moved checkpoint stays the same.
        """
        found: list[dict[str, Any]] = [
            {
                "name": self._local_name(header.path),
                "size": header.n_bytes,
                "mtime_ns": header.mtime_ns,
                "crc32": header.crc32,
            }
            for header in self.headers
        ]
        return [*found, *({"name": name, "settings": said} for name, said in self.notes)]

    def _local_name(self, path: str) -> str:
        """Of one of the files, without the place of the checkpoint or of its adapter."""
        if self.adapter is not None and path == self.files[-1]:
            return os.path.basename(path)
        return os.path.relpath(path, self.directory or os.path.dirname(path) or ".")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `path`, with every header validated.

    Args:
        path: a directory, one file (`.safetensors`, `.bin`, `.pt`, `.pth`, or an index), or the id of a hub
            model that is in the local Hugging Face cache: `org/name`, `org/name@revision`.

    Raises:
        CheckpointError: anything that is not a complete, consistent checkpoint.

    Notes:
        Of a directory the first of these is taken, in the order of transformers: `model.safetensors`, its
        index with its shards, `pytorch_model.bin`, its index, any other `*.safetensors` together. One with
        `.metadata` and none of them is a distributed checkpoint of torch.
        About 5 ms for 723 tensors in 30 files.
    """
    given = os.fspath(path)
    local = given if os.path.lexists(given) else written_otherwise(given) or given
    if is_dcp(local):
        from tvfast.checkpoint.dcp import read_dcp

        headers, tensors = read_dcp(local)
        paths = tuple(header.path for header in headers)
        return Checkpoint(given, local, tensors, paths, {}, _config(local), headers)
    location = locate(given)
    headers = tuple(_read(location.path_of(name)) for name in location.files)
    tensors = _joined(headers)
    if location.weight_map is not None:
        _check_index(location, headers)
    if not tensors:
        raise CheckpointError(f"{given}: holds no tensor; expected one at least. Check the path.")
    return Checkpoint(
        given,
        location.directory,
        tensors,
        tuple(header.path for header in headers),
        aliases_of(tensors),
        _config(location.directory),
        headers,
    )


def _read(path: str) -> Header:
    if path.endswith(PYTORCH):
        from tvfast.checkpoint.pytorch import read_pytorch

        return read_pytorch(path)
    return read_header(path)


def _joined(headers: tuple[Header, ...]) -> dict[str, Stored]:
    """The tensors of all files.

    Raises:
        CheckpointError: one name in two files.
    """
    joined: dict[str, Stored] = {}
    for header in headers:
        for tensor in header.tensors:
            other = joined.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{tensor.path}: tensor {shown(tensor.name)} is in {other.path}, too; expected it once. "
                    "The files belong to different checkpoints, or to one saved twice; remove one of them."
                )
    return joined


def _check_index(location: Location, headers: tuple[Header, ...]) -> None:
    """Raise unless the index and the shards name the same tensors in the same places."""
    assert location.index is not None
    assert location.weight_map is not None
    placed: dict[str, set[str]] = {name: set() for name in location.files}
    for tensor, file in location.weight_map.items():
        placed[file].add(tensor)
    for file, header in zip(location.files, headers, strict=True):
        found = {tensor.name for tensor in header.tensors}
        if missing := sorted(placed[file] - found):
            raise damaged(
                location.index,
                f"places {_some(missing)} in {shown(file)}, where nothing of that name is; "
                "expected an index that fits its shards",
            )
        if unnamed := sorted(found - placed[file]):
            raise damaged(
                location.index,
                f"does not place {_some(unnamed)} in {shown(file)}, where it is; "
                "expected an index of all tensors in its shards",
            )


def _some(names: list[str]) -> str:
    listed = ", ".join(map(shown, names[:_SHOWN]))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"tensor{'s' if len(names) > 1 else ''} {listed}{more}"


def aliases_of(tensors: dict[str, Stored]) -> dict[str, str]:
    """Name -> first name of the same numbers in the same bytes."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for tensor in tensors.values():
        if tensor.n_bytes:
            key = (tensor.path, tensor.offset, tensor.n_bytes, tensor.dtype, tensor.shape, tensor.update)
            name = first.setdefault(key, tensor.name)
            if name != tensor.name:
                aliases[tensor.name] = name
    return aliases


def _config(directory: str | None) -> dict[str, Any] | None:
    if directory is None:
        return None
    path = os.path.join(directory, "config.json")
    if not os.path.lexists(path):
        return None
    config = read_json(path, _CONFIG_BYTES)
    if not isinstance(config, dict):
        raise damaged(path, f"is {shown(config)}; expected a JSON object")
    return config
