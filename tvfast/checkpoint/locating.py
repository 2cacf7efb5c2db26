"""Which files make up the checkpoint that a path names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from tvfast.checkpoint import hub
from tvfast.checkpoint.files import damaged, read_json, shown, unreadable
from tvfast.errors import CheckpointError

SAFETENSORS = ".safetensors"
PYTORCH = (".bin", ".pt", ".pth")

METADATA_NAME = ".metadata"
"""The index of a distributed checkpoint of torch."""

_INDEX = ".index.json"
_INDEX_BYTES = 2**25
_NAMED = ("model.safetensors", "pytorch_model.bin")  # the order in which transformers looks for them
_ADAPTER = "adapter_model.safetensors"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_WEIGHTS = (".safetensors", ".safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_EXPECTED = (
    "expected model.safetensors, model.safetensors.index.json with its shards, other *.safetensors, "
    "pytorch_model.bin or pytorch_model.bin.index.json"
)


@dataclass(frozen=True, slots=True)
class Location:
    """The files of a checkpoint.

    Attributes:
        directory: where `config.json` and the tokenizer lie; None for a single file.
        files: names of the weight files, ascending; relative to the directory, or the one file's path.
        index: path of the index, if there is one.
        weight_map: tensor -> file name, as the index says.
    """

    directory: str | None
    files: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None

    def path_of(self, name: str) -> str:
        """The path of one of `files`."""
        return name if self.directory is None else os.path.join(self.directory, name)


def is_dcp(path: str) -> bool:
    """Whether a directory holds a distributed checkpoint, and no weights that transformers would load."""
    if not os.path.isfile(os.path.join(path, METADATA_NAME)):
        return False
    return not any(name.endswith(_WEIGHTS) for name in os.listdir(path))


def locate(path: str) -> Location:
    """The files of the checkpoint at `path`: a directory, one file, or the id of a model of the hub.

    Of `name@revision` where `name` is a local path, the revision is not looked at. What the local cache has
    is taken as it is; what it lacks is downloaded into it.

    Raises:
        CheckpointError: nothing there, no weights there, an incomplete set of shards, or a broken index.
    """
    if not path or "\0" in path:
        raise CheckpointError(f"{shown(path)} is no path; expected a checkpoint's directory or file.")
    try:
        if os.path.isdir(path):
            return _locate_in(path)
        if os.path.lexists(path):
            return _one_file(path)
        if (local := written_otherwise(path)) is not None:
            return locate(local)
        if (cached := hub.cached_snapshot(path)) is not None:
            return _in_snapshot(path, cached)
    except OSError as error:
        raise unreadable(path, error) from None
    if not hub.may_be_downloaded(path):
        raise _nothing_at(path)
    return _locate_in(hub.downloaded(path, hub.WHOLE_MODEL))


def _in_snapshot(path: str, snapshot: str) -> Location:
    """What the local cache of the hub has of a model, after the rest is downloaded if need be.

    Raises:
        CheckpointError: it is not complete, and cannot be completed.
    """
    try:
        return _locate_in(snapshot)
    except CheckpointError:
        if hub.is_offline() is not None or not hub.may_be_downloaded(path):
            raise
    return _locate_in(hub.downloaded(path, hub.WHOLE_MODEL))


def locate_adapter(path: str) -> str:
    """The directory of the PEFT adapter at `path`: that very directory, or that of the id of one on the hub.

    Raises:
        CheckpointError: nothing there, or a file.
    """
    if not path or "\0" in path:
        raise CheckpointError(f"{shown(path)} is no path; expected an adapter's directory.")
    try:
        if os.path.isdir(path):
            return path
        if os.path.lexists(path):
            raise CheckpointError(
                f"{path}: is a file; expected an adapter's directory, with adapter_config.json and weights."
            )
        local = written_otherwise(path)
        if local is None:
            local = hub.cached_snapshot(path)
            if local is not None and not _has_adapter(local) and hub.is_offline() is None:
                local = None if hub.may_be_downloaded(path) else local
    except OSError as error:
        raise unreadable(path, error) from None
    if local is not None:
        return local
    if not hub.may_be_downloaded(path):
        raise _nothing_at(path)
    return hub.downloaded(path, hub.ADAPTER)


def _has_adapter(directory: str) -> bool:
    """Whether configuration and weights are there; peft may have fetched one of them alone."""
    names = os.listdir(directory)
    return "adapter_config.json" in names and (_ADAPTER in names or "adapter_model.bin" in names)


def written_otherwise(path: str) -> str | None:
    """What is there for `~/name`, which no shell has expanded, or for `path@revision`, which has none."""
    expanded = os.path.expanduser(path) if path.startswith("~") else path
    candidates = (expanded, expanded.rpartition("@")[0])
    return next((found for found in candidates if found != path and os.path.lexists(found)), None)


def _one_file(path: str) -> Location:
    if path.endswith(_INDEX):
        return _indexed(os.path.dirname(path) or ".", os.path.basename(path))
    if not path.endswith((SAFETENSORS, *PYTORCH)):
        raise CheckpointError(
            f"{path}: has no known suffix; expected a directory or a file named *{SAFETENSORS}, "
            f"{', '.join('*' + suffix for suffix in PYTORCH)}."
        )
    return Location(None, (path,))


def _locate_in(directory: str) -> Location:
    """What transformers would load: a single file before an index, safetensors before PyTorch's format.

    A directory with neither may hold `*.safetensors` of other names, taken together.
    """
    names = sorted(os.listdir(directory))
    for name in _NAMED:
        if name in names:
            return Location(directory, (name,))
        if name + _INDEX in names:
            return _indexed(directory, name + _INDEX)
    files = [name for name in names if name.endswith(SAFETENSORS) and not name.startswith(".")]
    if not files and any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{directory}: holds *.distcp without .metadata, which is written last; expected both. The "
            "distributed checkpoint was not saved or copied to the end: do it again."
        )
    if files == [_ADAPTER] or (not files and "adapter_model.bin" in names):
        raise CheckpointError(
            f"{directory}: holds a PEFT adapter, no whole model; {_EXPECTED}. "
            "To apply it, name its base before it: BASE+ADAPTER."
        )
    files = [name for name in files if name != _ADAPTER]
    if not files:
        found = ", ".join(map(shown, names[:8])) + (", ..." if len(names) > 8 else "")
        raise CheckpointError(
            f"{directory}: holds {'no weights but ' + found if names else 'nothing'}; {_EXPECTED}. "
            "Check the path, or download the weights too."
        )
    _check_complete(directory, files)
    return Location(directory, tuple(files))


def _check_complete(directory: str, files: list[str]) -> None:
    """Raise if names such as `model-00002-of-00003.safetensors` tell that shards are missing."""
    shards = [match for match in map(_SHARD.fullmatch, files) if match]
    present: dict[tuple[str, str], set[int]] = {}
    for match in shards:
        present.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, total), numbers in present.items():
        n_missing = int(total) - len(numbers)
        if n_missing > 0:
            first = next(k for k in range(1, int(total) + 1) if k not in numbers)
            raise CheckpointError(
                f"{directory}: {n_missing} of {int(total)} shards are missing, the first is "
                f"{shown(f'{stem}-{first:0{len(total)}d}-of-{total}{SAFETENSORS}')}; expected all of them. "
                "Download the rest."
            )


def _indexed(directory: str, name: str) -> Location:
    """The shards that an index names."""
    path = os.path.join(directory, name)
    index = read_json(path, _INDEX_BYTES)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        found = f"its keys are {shown(list(index))}" if isinstance(index, dict) else f"is {shown(index)}"
        raise damaged(path, f"{found}; expected a JSON object with an object 'weight_map'")
    if not weight_map:
        raise damaged(path, "its weight_map names no tensor; expected one at least")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise damaged(path, f"tensor {shown(tensor)} is in {shown(file)}; expected the name of a file")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not file or "\0" in file or os.path.isabs(file) or ".." in re.split(r"[/\\]", file):
            raise damaged(
                path, f"names the file {shown(file)}; expected a shard in the index's own directory"
            )
        if not os.path.lexists(os.path.join(directory, file)):
            missing = [name for name in files if not os.path.lexists(os.path.join(directory, name))]
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(files)} shards are missing, the first is {shown(file)}; "
                "expected all of them beside the index. Download the rest."
            )
    return Location(directory, tuple(files), path, weight_map)


def _nothing_at(path: str) -> CheckpointError:
    from difflib import get_close_matches

    parent, name = os.path.split(path.rstrip("/"))
    try:
        near = get_close_matches(name, os.listdir(parent or "."), n=3)
    except OSError:
        near = []
    hints = []
    if near:
        hints.append(f"Did you mean {' or '.join(shown(os.path.join(parent, found)) for found in near)}?")
    name = path.partition("@")[0]
    if hub.ID.fullmatch(name):
        hints.append(
            f"If it is a model of the Hugging Face hub: it is not in the local cache ({hub.cache_folder()}); "
            f"download it first, for example `hf download {name}`."
        )
    return CheckpointError(
        f"{path}: no such file or directory; expected a checkpoint's directory or file. "
        f"{' '.join(hints) or 'Check the path.'}"
    )
