"""What makes a tensor's bytes a file of `torch.save`, known before them: a zip archive of one tensor.

The archive's checksum of the data is left 0, as torch itself can; torch's reader does not look at it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from tvfast.checkpoint.archive import CENTRAL, END, END_64, LOCAL, LOCATOR
from tvfast.checkpoint.pytorch import KINDS, TORCH_NAMES
from tvfast.dtypes import n_bytes

ALIGNMENT = 64
"""Data begins at its multiples, in the file and in the archive."""

_ROOT = "archive"
_ZIP64 = 2**32 - 1  # stands for a size that is in a field of 64 bits
_ZIP64_FROM = _ZIP64
_VERSION, _VERSION_64 = 20, 45
_DATE = 0x21  # the first that zip knows, for every file the same
_STORAGES = {dtype: kind for kind, dtype in KINDS.items()}
_DTYPES = {dtype: name for name, dtype in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """What comes before and after the data."""

    before: bytes
    after: bytes


def make_entry(dtype: str, shape: tuple[int, ...], size: int, start: int) -> Entry:
    """The archive of one contiguous tensor.

    Args:
        dtype: safetensors name.
        size: of the data.
        start: where the archive begins in its file.
    """
    found, directory = b"", b""
    small = {"data.pkl": _pickled(dtype, shape), "byteorder": b"little", "version": b"3\n"}
    for name, data in small.items():
        local, central = _headers(name, len(data), zlib.crc32(data), len(found), 0)
        found, directory = found + local + data, directory + central
    unpadded, _ = _headers("data/0", size, 0, len(found), 0)
    padding = -(start + len(found) + len(unpadded)) % ALIGNMENT
    local, central = _headers("data/0", size, 0, len(found), padding)
    found, directory = found + local, directory + central
    return Entry(found, directory + _end(len(small) + 1, len(directory), len(found) + size))


def _headers(name: str, size: int, crc: int, offset: int, padding: int) -> tuple[bytes, bytes]:
    """The local header of a member, and its place in the directory."""
    path = f"{_ROOT}/{name}".encode()
    large = name == "data/0" and size >= _ZIP64_FROM
    shown, version = (_ZIP64, _VERSION_64) if large else (size, _VERSION)
    wide = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
    extra = wide + (struct.pack("<HH", 0x4246, padding) + b"Z" * padding if name == "data/0" else b"")
    local = LOCAL.pack(b"PK\x03\x04", version, 0, 0, 0, _DATE, crc, shown, shown, len(path), len(extra))
    place = (len(path), len(wide), 0, 0, 0, 0, offset)
    central = CENTRAL.pack(b"PK\x01\x02", version, version, 0, 0, 0, _DATE, crc, shown, shown, *place)
    return local + path + extra, central + path + wide


def _end(n_members: int, size: int, offset: int) -> bytes:
    """The records that tell where the directory is."""
    end = END.pack(
        b"PK\x05\x06", 0, 0, n_members, n_members, size, _ZIP64 if offset >= _ZIP64_FROM else offset, 0
    )
    if offset < _ZIP64_FROM:
        return end
    both = (n_members, n_members, size, offset)
    record = END_64.pack(b"PK\x06\x06", END_64.size - 12, _VERSION_64, _VERSION_64, 0, 0, *both)
    return record + LOCATOR.pack(b"PK\x06\x07", 0, offset + size, 1) + end


def _pickled(dtype: str, shape: tuple[int, ...]) -> bytes:
    """`data.pkl`: a call that makes the tensor of storage 0."""
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    n, kind = math.prod(shape), _STORAGES.get(dtype)
    storage = name("torch", kind) if kind else name("torch.storage", "UntypedStorage")
    n_items = n if kind else n_bytes(dtype, n)
    identity = b"(" + text("storage") + storage + text("0") + text("cpu") + integer(n_items) + b"tQ"
    arguments = identity + integer(0) + tuple_of(map(integer, shape)) + tuple_of(map(integer, strides))
    arguments += b"\x89" + name("collections", "OrderedDict") + b")R"
    version = "_rebuild_tensor_v2" if kind else "_rebuild_tensor_v3"
    last = b"" if kind else torch_dtype(dtype)
    return b"\x80\x02" + name("torch._utils", version) + b"(" + arguments + last + b"tR."


def torch_dtype(dtype: str) -> bytes:
    """A pickled `torch.dtype`."""
    return name(*_DTYPES[dtype].split(".", 1))


def name(module: str, attribute: str) -> bytes:
    """A pickled class or function, by its name."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def integer(value: int) -> bytes:
    """A pickled integer that is not negative."""
    if value < 2**8:
        return b"K" + value.to_bytes(1, "little")
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x09" + value.to_bytes(9, "little")


def tuple_of(items: Iterable[bytes]) -> bytes:
    """A pickled tuple of pickled items."""
    return b"(" + b"".join(items) + b"t"
