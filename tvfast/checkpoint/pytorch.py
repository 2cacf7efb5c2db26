"""State dicts that `torch.save` wrote, read without torch: the zip format of PyTorch 1.6 and later.

`data.pkl` tells names, shapes and storages; every storage is an uncompressed member, so that a tensor's bytes
lie in the file as they are.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

from tvfast.checkpoint.archive import Archive, place, read_archive
from tvfast.checkpoint.files import OpenFile, damaged, foreign, open_regular, shown
from tvfast.checkpoint.header import Header, sorted_by_offset
from tvfast.checkpoint.stored import Stored
from tvfast.checkpoint.unpickling import MOST_BYTES, Storage, View, described, load_pickle
from tvfast.dtypes import ITEM_BITS
from tvfast.errors import CheckpointError

_WRAPPERS = ("state_dict", "model")
_UNTYPED = "UntypedStorage"
KINDS = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
}
TORCH_NAMES = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.int16": "I16",
    "torch.uint32": "U32",
    "torch.int32": "I32",
    "torch.uint64": "U64",
    "torch.int64": "I64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of torch's magic number
_CONVERT = (
    "Convert it with torch: torch.save(torch.load(path, weights_only=True), new_path), "
    "or safetensors.torch.save_file."
)


def read_pytorch(path: str) -> Header:
    """The tensors of a PyTorch file: a flat state dict, or one under a single key `state_dict` or `model`.

    Raises:
        CheckpointError: no regular file, not the zip format, a damaged archive, a pickle that holds more than
            tensors or asks to run code, a tensor that is not contiguous, or a type without safetensors name.

    Notes:
        Nothing of the pickle is executed. `Header.crc32` covers the pickle and the archive's directory.
        Checksums of members are not verified: torch can leave them out, and does not verify them either.
        About 25 us a tensor.
    """
    with open_regular(path) as file:
        start = file.read(min(512, file.n_bytes), 0)
        if not start.startswith(b"PK\x03\x04"):
            raise _no_zip(file, start)
        archive = read_archive(file)
        root = _root(archive, path)
        order = (
            _contents(file, archive, f"{root}/byteorder", 16)
            if f"{root}/byteorder" in archive.members
            else b""
        )
        if order not in (b"", b"little"):
            raise CheckpointError(
                f"{path}: its byte order is {shown(order.decode('latin-1'))}; expected 'little'. {_CONVERT}"
            )
        pickle = _contents(file, archive, f"{root}/data.pkl", MOST_BYTES)
        storages = _Storages(file, archive, root)
        tensors = [
            storages.stored(name, view)
            for name, view in _state_dict(load_pickle(pickle, f"{path}: data.pkl"), path)
        ]
        return Header(
            path,
            tuple(sorted_by_offset(tensors)),
            {},
            0,
            file.n_bytes,
            file.mtime_ns,
            zlib.crc32(archive.directory, zlib.crc32(pickle)),
        )


def read_tensor(file: OpenFile, name: str) -> Stored:
    """The tensor that `torch.save` wrote alone; its offset counts from the start of `file`.

    Raises:
        CheckpointError: as `read_pytorch`.
    """
    start = file.read(min(512, file.n_bytes), 0)
    if not start.startswith(b"PK\x03\x04"):
        raise _no_zip(file, start)
    archive = read_archive(file)
    root = _root(archive, file.path)
    pickle = _contents(file, archive, f"{root}/data.pkl", MOST_BYTES)
    view = load_pickle(pickle, f"{file.path}: data.pkl of {shown(name)}")
    if not isinstance(view, View):
        raise damaged(f"{file.path}: {shown(name)}", f"holds {described(view)}; expected a tensor")
    return _Storages(file, archive, root).stored(name, view)


@dataclass(slots=True)
class _Storages:
    """The members that hold tensors' bytes."""

    file: OpenFile
    archive: Archive
    root: str
    starts: dict[str, int] = field(default_factory=dict)

    def stored(self, name: str, view: View) -> Stored:
        """Where a tensor's bytes lie."""
        where = f"{self.file.path}: tensor {shown(name)}"
        if not name or "\0" in name:
            raise damaged(where, "its name is empty or has a NUL; expected a name")
        dtype = _dtype(view, where)
        if view.flags:
            raise CheckpointError(
                f"{where}: is stored without its {shown(', '.join(view.flags))}; expected plain values. "
                "Save it after .resolve_conj().resolve_neg()."
            )
        if not _contiguous(view):
            raise CheckpointError(
                f"{where}: has shape {shown(list(view.shape))} and strides {shown(list(view.stride))}; "
                "expected a contiguous tensor. Save it after .contiguous()."
            )
        item = ITEM_BITS[dtype] // 8
        start, n_bytes = self._member(view.storage, item, where)
        first, length = view.first * item, math.prod(view.shape) * item
        if length and first + length > n_bytes:
            raise damaged(where, f"takes bytes {first} to {first + length} of a storage that has {n_bytes}")
        return Stored(name, self.file.path, start + (first if length else 0), length, dtype, view.shape)

    def _member(self, storage: Storage, item: int, where: str) -> tuple[int, int]:
        """Offset and length of a storage."""
        name = f"{self.root}/data/{storage.key}"
        member = self.archive.members.get(name)
        if member is None:
            raise damaged(where, f"its storage {shown(name)} is not in the archive")
        expected = storage.n_items * (1 if storage.kind == _UNTYPED else item)
        if member.n_bytes != expected:
            raise damaged(where, f"its storage {shown(name)} has {member.n_bytes} bytes; expected {expected}")
        start = self.starts.get(name)
        if start is None:
            start = self.starts[name] = place(self.file, self.archive, name)
        return start, member.n_bytes


def _dtype(view: View, where: str) -> str:
    if view.storage.kind == _UNTYPED:
        found, dtype = view.dtype or "untyped", TORCH_NAMES.get(view.dtype or "")
    else:
        found, dtype = f"torch.{view.storage.kind}", KINDS.get(view.storage.kind)
    if dtype is None:
        raise CheckpointError(
            f"{where}: its type is {shown(found)}, which safetensors files do not know; expected one of "
            f"{', '.join(ITEM_BITS)}. Convert the tensor with torch and save it again."
        )
    return dtype


def _contiguous(view: View) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return 0 in view.shape
        expected *= size
    return True


def _root(archive: Archive, path: str) -> str:
    """The folder that all members are in."""
    roots = [
        name.partition("/")[0]
        for name in archive.members
        if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise CheckpointError(
            f"{path}: is a zip file with {len(roots) or 'no'} */data.pkl; expected one, from torch.save. "
            f"Its members are {shown(list(archive.members))}. Check the path."
        )
    if f"{roots[0]}/constants.pkl" in archive.members:
        raise CheckpointError(
            f"{path}: is a TorchScript program; expected a state dict. "
            "Convert it with torch: torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    return roots[0]


def _contents(file: OpenFile, archive: Archive, name: str, most_bytes: int) -> bytes:
    """The bytes of a small member."""
    member = archive.members[name]
    start = place(file, archive, name)
    if member.n_bytes > most_bytes:
        raise damaged(
            f"{file.path}: member {shown(name)}",
            f"has {member.n_bytes} bytes; expected {most_bytes} at most",
        )
    return file.read(member.n_bytes, start)


def _state_dict(found: Any, path: str) -> list[tuple[str, View]]:
    """Names and tensors of a state dict."""
    if isinstance(found, dict) and len(found) == 1:
        key, inner = next(iter(found.items()))
        if key in _WRAPPERS and isinstance(inner, dict):
            found = inner
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {described(found)}; expected a state dict. {_CONVERT}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, View):
            raise CheckpointError(
                f"{path}: its key {shown(key)} holds {described(value)}; expected a state dict of tensors "
                f"only, or one under a single key {' or '.join(map(repr, _WRAPPERS))}. Found the keys "
                f"{shown(list(found))}. Load it with torch and save the tensors alone."
            )
    return list(found.items())


def _no_zip(file: OpenFile, start: bytes) -> CheckpointError:
    path = file.path
    if not file.n_bytes:
        return CheckpointError(f"{path}: is empty; expected a file that torch.save wrote. Download it again.")
    if start.startswith(_LEGACY) or start[257:262] == b"ustar":
        kind = "tar" if start[257:262] == b"ustar" else "pickle"
        return CheckpointError(
            f"{path}: is in PyTorch's legacy {kind} format, before 1.6; expected the zip format. {_CONVERT}"
        )
    if other := foreign(start):
        return CheckpointError(f"{path}: {other} Expected a file that torch.save wrote.")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.n_bytes:
        return CheckpointError(
            f"{path}: is a safetensors file; expected one from torch.save. Give it the suffix .safetensors."
        )
    if start[:1] == b"\x80":
        return CheckpointError(f"{path}: is a bare pickle; expected a zip file from torch.save. {_CONVERT}")
    return CheckpointError(
        f"{path}: begins with {shown(start[:8].decode('latin-1'))}; expected a zip file from torch.save. "
        "Check the path, or download the file again."
    )
