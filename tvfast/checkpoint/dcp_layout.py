"""The files of a distributed checkpoint of torch, known before any tensor's data: whole tensors in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tvfast.checkpoint.dcp import SUFFIX
from tvfast.checkpoint.dcp_entry import ALIGNMENT, integer, make_entry, name, text, torch_dtype, tuple_of
from tvfast.checkpoint.layout import Described, Layout, Place, Shard, checked_sizes, cut
from tvfast.checkpoint.locating import METADATA_NAME
from tvfast.checkpoint.pytorch import TORCH_NAMES
from tvfast.errors import ArgumentError

_MODULE = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"


def make_dcp_layout(tensors: Sequence[Described], shard_bytes: int) -> Layout:
    """Distributes tensors over `__0_0.distcp`, `__0_1.distcp` and so on, as `make_layout` does.

    torch.distributed.checkpoint loads them into any sharding. Equal arguments give equal bytes.

    Raises:
        ArgumentError: a name twice, a shape that the format cannot hold, or a dtype that torch does not know.
    """
    known = set(TORCH_NAMES.values())
    for tensor, dtype, _ in tensors:
        if dtype not in known:
            raise ArgumentError(
                f"tensor {tensor!r} has storage type {dtype!r}, which torch does not know; write safetensors."
            )
    sizes = checked_sizes(tensors)
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    stored: dict[str, tuple[str, int, int]] = {}
    for number, members in enumerate(cut(sizes, shard_bytes)):
        file = f"__0_{number}{SUFFIX}"
        fills: list[tuple[int, bytes]] = []
        end = 0
        for i in members:
            tensor, dtype, shape = tensors[i]
            start = -(-end // ALIGNMENT) * ALIGNMENT
            entry = make_entry(dtype, shape, sizes[i], start)
            at = start + len(entry.before)
            fills.append((end, bytes(start - end) + entry.before))
            fills.append((at + sizes[i], entry.after))
            places[tensor] = Place(number, at, sizes[i])
            end = at + sizes[i] + len(entry.after)
            stored[tensor] = (file, start, end - start)
        joined = list(_joined(fills))
        header = joined.pop(0)[1] if joined else b""
        shards.append(Shard(file, header, end, tuple(joined)))
    index = _metadata(tensors, stored)
    return Layout(tuple(shards), places, index, sum(shard.n_bytes for shard in shards), METADATA_NAME)


def _joined(fills: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Neighbours as one."""
    at, data = 0, b""
    for offset, more in fills:
        if data and offset == at + len(data):
            data += more
            continue
        if data:
            yield at, data
        at, data = offset, more
    if data:
        yield at, data


def _metadata(tensors: Sequence[Described], stored: dict[str, tuple[str, int, int]]) -> bytes:
    """`.metadata`, a pickle of torch's classes by their names."""
    known, planned, placed = [], [], []
    for tensor, dtype, shape in tensors:
        file, offset, n_bytes = stored[tensor]
        state = tuple_of((torch_dtype(dtype), _LAYOUT, b"\x89", _CONTIGUOUS, b"\x89"))
        chunk = _object("ChunkStorageMetadata", offsets=_size((0,) * len(shape)), sizes=_size(shape))
        properties = _instance(_MODULE, "TensorProperties", state)
        found = _object(
            "TensorStorageMetadata", properties=properties, size=_size(shape), chunks=b"](" + chunk + b"e"
        )
        first = _size((0,) * len(shape))
        place = _object("MetadataIndex", fqn=text(tensor), offset=first, index=integer(0))
        fields = {"relative_path": text(file), "offset": integer(offset), "length": integer(n_bytes)}
        info = _instance("torch.distributed.checkpoint.filesystem", "_StorageInfo", _dict(fields))
        known.append(text(tensor) + found)
        planned.append(text(tensor) + tuple_of((text(tensor),)))
        placed.append(place + info)
    return (
        b"\x80\x02"
        + _object(
            "Metadata",
            state_dict_metadata=_mapping(known),
            planner_data=_mapping(planned),
            storage_data=_mapping(placed),
            storage_meta=_object("StorageMeta", checkpoint_id=b"N", save_id=b"N", load_id=b"N", modules=b"]"),
            version=text(_VERSION),
        )
        + b"."
    )


_LAYOUT = name("torch.serialization", "_get_layout") + tuple_of((text("torch.strided"),)) + b"R"
_CONTIGUOUS = name(_MODULE, "_MEM_FORMAT_ENCODING") + tuple_of((integer(0),)) + b"R"


def _instance(module: str, kind: str, state: bytes) -> bytes:
    return name(module, kind) + b")\x81" + state + b"b"


def _object(kind: str, **attributes: bytes) -> bytes:
    return _instance(_MODULE, kind, _dict(attributes))


def _dict(items: dict[str, bytes]) -> bytes:
    return _mapping([text(key) + value for key, value in items.items()])


def _mapping(items: Sequence[bytes]) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def _size(shape: tuple[int, ...]) -> bytes:
    return name("torch", "Size") + tuple_of((tuple_of(map(integer, shape)),)) + b"R"
