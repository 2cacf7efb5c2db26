"""Distributed checkpoints of torch (DCP): tensors in pieces, each a file of `torch.save` within a file.

`.metadata` tells of every tensor its type, shape and pieces, and where each piece lies in the `*.distcp`
files that ranks have written.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from tvfast.checkpoint.dcp_pickle import Record, load_metadata
from tvfast.checkpoint.files import OpenFile, damaged, open_regular, shown
from tvfast.checkpoint.header import Header
from tvfast.checkpoint.locating import METADATA_NAME
from tvfast.checkpoint.pytorch import TORCH_NAMES, read_tensor
from tvfast.checkpoint.stored import Piece, Stored
from tvfast.checkpoint.unpickling import Global, described, is_size
from tvfast.errors import CheckpointError

SUFFIX = ".distcp"

MAX_OPEN = 256
_MOST_BYTES = 2**28
_WRAPPERS = ("model", "state_dict")
_STATEFUL = "app"  # the object that torch's examples save


def read_dcp(directory: str) -> tuple[tuple[Header, ...], dict[str, Stored]]:
    """What each file is, and the tensors of the model.

    Of a checkpoint with a `model` or `state_dict` beside others, as trainers write them, only the former's
    tensors are taken, by their names in there; also where a single object holds those (`{"app": AppState}`).
    What is no tensor is left out.

    Raises:
        CheckpointError: a file or piece is missing, damaged, not what `.metadata` says, or of a type that
            safetensors do not know; pieces overlap or leave holes; there is no tensor.

    Notes:
        Nothing of the pickles is executed. About 0.1 ms a piece, for each is an archive of its own. While
        `.metadata` is read, `plan.METADATA_PEAK` times its bytes.
    """
    path = os.path.join(directory, METADATA_NAME)
    with open_regular(path) as file:
        if file.n_bytes > _MOST_BYTES:
            raise damaged(path, f"has {file.n_bytes} bytes; expected {_MOST_BYTES} at most")
        raw = file.read(file.n_bytes, 0)
        headers = [Header(path, (), {}, 0, file.n_bytes, file.mtime_ns, zlib.crc32(raw))]
    metadata = load_metadata(raw, path)
    if not isinstance(metadata, Record) or metadata.kind != "Metadata":
        raise damaged(path, "holds no Metadata of torch.distributed.checkpoint")
    wanted = _named_tensors(metadata, path)
    places = _places(metadata, path)
    with ExitStack() as stack:
        files = _Files(directory, stack)
        tensors = {
            name: _stored(name, key, found, places, files, number, path)
            for number, (name, (key, found)) in enumerate(wanted.items())
        }
        headers += [header for _, header in sorted(files.headers.items())]
    return tuple(headers), tensors


class _Files:
    """Files of pieces, `MAX_OPEN` of them open at a time: there are as many as processes that have saved."""

    def __init__(self, directory: str, stack: ExitStack) -> None:
        self.headers: dict[str, Header] = {}
        self._opened: dict[str, OpenFile] = {}
        self._directory = directory
        self._stack = stack

    def open(self, name: str, what: str) -> OpenFile:
        if name not in self._opened:
            if not name.isprintable() or os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
                raise damaged(what, f"is in the file {shown(name)}; expected one beside {METADATA_NAME}")
            path = os.path.join(self._directory, name)
            if not os.path.lexists(path):
                raise CheckpointError(
                    f"{path}: is missing; {what} has a piece there. A distributed checkpoint needs the files "
                    "of all ranks: copy the rest, or save it again."
                )
            if len(self._opened) == MAX_OPEN:
                self._stack.close()
                self._opened.clear()
            found = self._opened[name] = self._stack.enter_context(open_regular(path))
            self.headers.setdefault(name, Header(path, (), {}, 0, found.n_bytes, found.mtime_ns))
        return self._opened[name]


def _named_tensors(metadata: Record, path: str) -> dict[str, tuple[str, Record]]:
    """Name in the model -> key in the checkpoint, and what is known of it."""
    found = metadata.get("state_dict_metadata")
    if not isinstance(found, dict):
        raise damaged(path, "has no state_dict_metadata")
    tensors = {
        key: value
        for key, value in found.items()
        if isinstance(key, str) and isinstance(value, Record) and value.kind == "TensorStorageMetadata"
    }
    planner = metadata.get("planner_data")
    paths = planner if isinstance(planner, dict) else {}
    routes = {key: _route(paths.get(key) or (key,), path) for key in tensors}
    wrapper = _wrapper(routes.values())
    within = len(wrapper)
    routes = {k: route[within:] for k, route in routes.items() if route[:within] == wrapper != route}
    named: dict[str, tuple[str, Record]] = {}
    for key, route in routes.items():
        name = ".".join(route)
        if not name or "\0" in name:
            raise damaged(path, f"the tensor {shown(key)} has no name, or one with a NUL")
        first, _ = named.setdefault(name, (key, tensors[key]))
        if first != key:
            raise damaged(path, f"has two tensors {shown(name)}: {shown(first)} and {shown(key)}")
    if not named:
        raise CheckpointError(
            f"{path}: holds no tensor, but {shown(list(found))}; expected those of a model. Check the path."
        )
    return named


def _route(found: object, path: str) -> tuple[str, ...]:
    """The keys that lead to a tensor in the state dict that was saved."""
    if not isinstance(found, tuple) or any(type(step) not in (str, int) for step in found):
        raise damaged(path, f"planner_data leads to a tensor by {described(found)}; expected a tuple of keys")
    return tuple(map(str, found))


def _wrapper(routes: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """The keys under which the model is; none: everything is the model.

    A state dict of a module has no dictionaries in it, so one that leads to others was put around it.
    """
    heads = {route[0] for route in routes if len(route) > 1}
    if found := [wrapper for wrapper in _WRAPPERS if wrapper in heads]:
        return (found[0],)
    holders = {route[0] for route in routes if len(route) > 2 and route[1] in _WRAPPERS}
    holder = holders.pop() if len(holders) == 1 else _STATEFUL
    if holder not in heads:
        return ()
    held = {route[1] for route in routes if len(route) > 2 and route[0] == holder}
    found_in = (holder, *[wrapper for wrapper in _WRAPPERS if wrapper in held][:1])
    if holder != _STATEFUL:
        names = {route[2:] for route in routes if route[:2] == found_in}
        if any(route[0] != holder and route[1:] in names for route in routes):
            return ()  # two models, of which one is an average of the other, for example
    return found_in


def _places(metadata: Record, path: str) -> dict[tuple[str, tuple[int, ...]], Record]:
    """Key and first indices of a piece -> where it lies."""
    found = metadata.get("storage_data")
    if not isinstance(found, dict):
        raise damaged(path, "has no storage_data: it was not written by the FileSystemWriter of torch")
    places = {}
    for index, info in found.items():
        if isinstance(index, Record) and isinstance(info, Record):
            key, first = index.get("fqn"), index.get("offset") or ()
            if isinstance(key, str) and is_size(first):
                places[key, first] = info
    return places


def _stored(
    name: str,
    key: str,
    found: Record,
    places: dict[tuple[str, tuple[int, ...]], Record],
    files: _Files,
    number: int,
    path: str,
) -> Stored:
    """One tensor, whole or in pieces."""
    what = f"{path}: tensor {shown(key)}"
    shape, chunks = _sizes(found.get("size"), what), found.get("chunks")
    if not isinstance(chunks, list) or not all(isinstance(chunk, Record) for chunk in chunks):
        raise damaged(what, "has no list of pieces")
    pieces: list[Piece] = []
    declared = _declared(found)
    dtypes = set()
    for chunk in chunks:
        starts, sizes = _sizes(chunk.get("offsets"), what), _sizes(chunk.get("sizes"), what)
        if len(starts) != len(shape) or len(sizes) != len(shape):
            raise damaged(what, f"has a piece of {len(sizes)} dimensions; expected {len(shape)}")
        if not math.prod(sizes):
            continue
        own = _piece(key, starts, sizes, places, files, what)
        pieces.append(Piece(own.path, own.offset, starts, sizes))
        dtypes.add(own.dtype)
    _check_whole(pieces, shape, what)
    if len(dtypes) > 1:
        raise damaged(what, f"has pieces of the types {', '.join(sorted(dtypes))}; expected one")
    dtype = dtypes.pop() if dtypes else declared or "F32"
    if declared not in (None, dtype):
        raise damaged(what, f"is said to be of type {declared}; its pieces are {dtype}")
    if len(pieces) == 1:
        return Stored(name, pieces[0].path, pieces[0].offset, own.n_bytes, dtype, shape)
    n_bytes = sum(math.prod(piece.sizes) for piece in pieces) * _item_bytes(own) if pieces else 0
    return Stored(name, path, number, n_bytes, dtype, shape, pieces=tuple(pieces))


def _declared(found: Record) -> str | None:
    """The type that `.metadata` tells; None where it tells none that safetensors know."""
    properties = found.get("properties")
    state = properties.state if isinstance(properties, Record) else None
    first = state[0] if isinstance(state, tuple) and state else None
    return TORCH_NAMES.get(first.name) if isinstance(first, Global) else None


def _item_bytes(own: Stored) -> int:
    return own.n_bytes // own.n_elements


def _piece(
    key: str,
    starts: tuple[int, ...],
    sizes: tuple[int, ...],
    places: dict[tuple[str, tuple[int, ...]], Record],
    files: _Files,
    what: str,
) -> Stored:
    """A piece, as its own archive tells of it, at its place in the file."""
    info = places.get((key, starts))
    where = f"{what}, piece at {list(starts)}"
    if info is None:
        raise damaged(where, "has no place in storage_data")
    if info.get("transform_descriptors"):
        raise CheckpointError(
            f"{where}: is stored through extensions, as transform_descriptors tell; expected plain bytes. "
            "Load it with torch.distributed.checkpoint and save it without extensions."
        )
    relative, offset, length = (info.get(name) for name in ("relative_path", "offset", "length"))
    if not isinstance(relative, str) or type(offset) is not int or type(length) is not int:
        raise damaged(where, "has no file, offset and length")
    file = files.open(relative, what)
    if not 0 <= offset <= offset + length <= file.n_bytes:
        raise damaged(
            file.path, f"has {file.n_bytes} bytes; {where} takes {offset} to {offset + length} of it"
        )
    own = read_tensor(file.section(offset, length), key)
    if own.shape != sizes:
        raise damaged(file.path, f"{where} has shape {list(own.shape)} there; expected {list(sizes)}")
    return Stored(key, file.path, offset + own.offset, own.n_bytes, own.dtype, own.shape)


def _sizes(found: Any, what: str) -> tuple[int, ...]:
    if not is_size(found):
        raise damaged(what, "has a shape or place that is none")
    return found


def _check_whole(pieces: Sequence[Piece], shape: tuple[int, ...], what: str) -> None:
    """Raise unless pieces are inside the tensor, disjoint, and all of it."""
    for piece in pieces:
        ends = [start + size for start, size in zip(piece.starts, piece.sizes, strict=True)]
        if any(end > extent for end, extent in zip(ends, shape, strict=True)):
            raise damaged(what, f"has a piece that ends at {ends}, beyond its shape {list(shape)}")
    found, expected = sum(math.prod(piece.sizes) for piece in pieces), math.prod(shape)
    if found != expected:
        raise damaged(what, f"has pieces of {found} elements in all; expected {expected}. Some are missing")
    if any(_overlap(first, second) for first, second in _near(pieces)):
        raise damaged(what, "has pieces that overlap")


def _near(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """Pairs that share indices of the dimension in which there are most pieces side by side."""
    if len(pieces) < 2:
        return
    n_starts = [len({piece.starts[k] for piece in pieces}) for k in range(len(pieces[0].starts))]
    k = n_starts.index(max(n_starts)) if n_starts else 0
    ordered = sorted(pieces, key=lambda piece: piece.starts[k : k + 1])
    for number, first in enumerate(ordered):
        for second in ordered[number + 1 :]:
            if n_starts and second.starts[k] >= first.starts[k] + first.sizes[k]:
                break
            yield first, second


def _overlap(first: Piece, second: Piece) -> bool:
    return all(
        max(a, b) < min(a + n, b + m)
        for a, n, b, m in zip(first.starts, first.sizes, second.starts, second.sizes, strict=True)
    )
