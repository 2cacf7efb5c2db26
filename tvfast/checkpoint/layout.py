"""Where the tensors of an output checkpoint go: files, headers and the index, known before any data is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tvfast import dtypes
from tvfast.errors import ArgumentError, CheckpointError

PAGE = 4096
"""Data of a shard starts at a multiple of this, as direct writes and mapped reads want it."""

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads, padding included."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_RESERVED = "__metadata__"

Described = tuple[str, str, tuple[int, ...]]
"""Name, storage type by its safetensors name, shape."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output.

    Attributes:
        name: of the file.
        header: its first bytes, up to where data starts: a multiple of `PAGE`.
        n_bytes: of the whole file.
        fills: what is known of it besides: (offset, bytes), ascending.
    """

    name: str
    header: bytes
    n_bytes: int
    fills: tuple[tuple[int, bytes], ...] = ()

    @property
    def data_bytes(self) -> int:
        """Of tensors."""
        return self.n_bytes - len(self.header) - sum(len(data) for _, data in self.fills)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor goes: bytes [offset, offset + n_bytes) of the file of shard number `shard`."""

    shard: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of an output checkpoint.

    Attributes:
        shards: in the order of their tensors.
        places: of every tensor, in file order; between them are the shards' fills, and no holes.
        index: bytes of the file that names all shards; None where there is none.
        n_bytes: of all shards, headers included.
        index_name: of that file.
    """

    shards: tuple[Shard, ...]
    places: dict[str, Place]
    index: bytes | None
    n_bytes: int
    index_name: str = INDEX_NAME


def make_layout(tensors: Sequence[Described], shard_bytes: int, metadata: Mapping[str, str]) -> Layout:
    """Distributes tensors over safetensors files, in the given order.

    A new shard begins where the next tensor would take the data of the present one above `shard_bytes`; a
    tensor that is larger by itself has a shard alone. Equal arguments give equal bytes.

    Args:
        tensors: name, dtype and shape of each.
        shard_bytes: limit of a shard's data, at least 1.
        metadata: strings for the `__metadata__` of every shard, beside `format: pt`.

    Raises:
        ArgumentError: a name twice, a shape, dtype or metadata that the format cannot hold.
        CheckpointError: a header above the 100 MB that readers accept.
    """
    if shard_bytes < 1:
        raise ArgumentError(f"shard_bytes is {shard_bytes}; expected at least 1.")
    notes = _checked_metadata(metadata)
    sizes = checked_sizes(tensors)
    members_of = cut(sizes, shard_bytes)
    names = _shard_names(len(members_of))
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    for number, (name, members) in enumerate(zip(names, members_of, strict=True)):
        header, offsets = _header(name, [tensors[i] for i in members], [sizes[i] for i in members], notes)
        for i, offset in zip(members, offsets, strict=True):
            places[tensors[i][0]] = Place(number, len(header) + offset, sizes[i])
        shards.append(Shard(name, header, len(header) + sum(sizes[i] for i in members)))
    index = _index(shards, places, sum(sizes)) if len(shards) > 1 else None
    return Layout(tuple(shards), places, index, sum(shard.n_bytes for shard in shards))


def file_header(
    where: str, tensors: Sequence[Described], metadata: Mapping[str, str], *, at_least: int = 0
) -> bytes:
    """The bytes before the data of one safetensors file whose tensors follow each other without holes.

    Args:
        where: what stands for the file in messages.
        tensors: name, dtype and shape of each, in file order.
        metadata: strings for `__metadata__`, beside `format: pt`.
        at_least: pads the header up to so many bytes; a multiple of `PAGE`.

    Raises:
        ArgumentError: a name twice, a shape, dtype or metadata that the format cannot hold.
        CheckpointError: a header above the 100 MB that readers accept.
    """
    header, _ = _header(where, tensors, checked_sizes(tensors), _checked_metadata(metadata), at_least)
    return header


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    notes = {"format": "pt", **metadata}
    for key, value in notes.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ArgumentError(
                f"metadata {key!r}: {value!r} has a key or value of another type than str; "
                "the safetensors format stores strings only."
            )
    return dict(sorted(notes.items()))


def checked_sizes(tensors: Iterable[Described]) -> list[int]:
    """Bytes of each tensor.

    Raises:
        ArgumentError: as `make_layout`.
    """
    sizes: list[int] = []
    seen: set[str] = set()
    for name, dtype, shape in tensors:
        if name in seen:
            raise ArgumentError(f"tensor {name!r} occurs twice; the names of a checkpoint must differ.")
        if name == _RESERVED:
            raise ArgumentError(
                f"tensor {name!r} has the name that the safetensors format reserves; rename it."
            )
        seen.add(name)
        if dtype not in dtypes.ITEM_BITS:
            known = ", ".join(dtypes.ITEM_BITS)
            raise ArgumentError(f"tensor {name!r} has storage type {dtype!r}; safetensors knows {known}.")
        if any(extent < 0 for extent in shape):
            raise ArgumentError(f"tensor {name!r} has shape {list(shape)}; expected extents of at least 0.")
        n_elements = math.prod(shape)
        if n_elements * dtypes.ITEM_BITS[dtype] % 8:
            raise ArgumentError(
                f"tensor {name!r}, {dtype} of shape {list(shape)}, does not fill whole bytes; "
                "the safetensors format cannot hold it. Pad it, or store it in a wider type."
            )
        sizes.append(dtypes.n_bytes(dtype, n_elements))
    return sizes


def cut(sizes: Sequence[int], shard_bytes: int) -> list[list[int]]:
    """Positions of the tensors of each shard; one empty shard for no tensors."""
    shards: list[list[int]] = [[]]
    filled = 0
    for i, size in enumerate(sizes):
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(i)
        filled += size
    return shards


def _shard_names(n_shards: int) -> list[str]:
    if n_shards == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{n_shards:05d}.safetensors" for i in range(1, n_shards + 1)]


def _header(
    shard: str,
    tensors: Sequence[Described],
    sizes: Sequence[int],
    notes: Mapping[str, str],
    at_least: int = 0,
) -> tuple[bytes, list[int]]:
    """The bytes before the data, and each tensor's offset in the data."""
    entries: dict[str, object] = {_RESERVED: notes}
    offsets = []
    end = 0
    for (name, dtype, shape), size in zip(tensors, sizes, strict=True):
        offsets.append(end)
        end += size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[-1], end]}
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start : error.end]
        raise ArgumentError(
            f"{shard}: a tensor name or metadata holds {found!r}, which UTF-8 cannot encode; rename it."
        ) from error
    n_padded = max(-(-(len(text) + 8) // PAGE) * PAGE, at_least) - 8
    if n_padded > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shard}: the header of its {len(sizes)} tensors takes {n_padded} bytes; readers of safetensors "
            f"accept {MAX_HEADER_BYTES}. Make the shards smaller, or the metadata shorter."
        )
    return n_padded.to_bytes(8, "little") + text.ljust(n_padded), offsets


def _index(shards: Sequence[Shard], places: Mapping[str, Place], total_size: int) -> bytes:
    weight_map = {name: shards[places[name].shard].name for name in sorted(places)}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()
