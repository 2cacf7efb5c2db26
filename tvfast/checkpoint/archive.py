"""Zip archives as `torch.save` writes them: where their members' bytes lie in the file.

Members are stored, not compressed, so that a storage's bytes can be read straight from the archive. Only the
central directory and the members' local headers are read, in bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from tvfast.checkpoint.files import OpenFile, damaged, shown
from tvfast.errors import CheckpointError

_MOST_DIRECTORY_BYTES = 2**26
_MOST_COMMENT_BYTES = 2**16 - 1

LOCAL = Struct("<4s5H3I2H")
CENTRAL = Struct("<4s6H3I5H2I")
END = Struct("<4s4H2IH")
LOCATOR = Struct("<4sIQI")
END_64 = Struct("<4sQ2H2I4Q")

_END_MAGIC = b"PK\x05\x06"
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive.

    Attributes:
        local: offset of its local header.
        n_bytes: its length.
        flags: general purpose bits.
        compression: 0 for stored.
    """

    local: int
    n_bytes: int
    flags: int
    compression: int


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file's central directory.

    Attributes:
        members: by name, in the directory's order.
        directory: its raw bytes.
        start: offset of the directory; the members lie before it.
    """

    members: dict[str, Member]
    directory: bytes
    start: int


def read_archive(file: OpenFile) -> Archive:
    """The central directory of a zip file.

    Raises:
        CheckpointError: no zip file, a cut one, one of several parts, or a directory that contradicts itself.
    """
    n_members, n_bytes, start = _end_record(file)
    if start + n_bytes > file.n_bytes:
        raise damaged(file.path, f"its zip directory, {n_bytes} bytes at {start}, ends after the file")
    if n_bytes > _MOST_DIRECTORY_BYTES:
        raise damaged(
            file.path, f"its zip directory has {n_bytes} bytes; expected {_MOST_DIRECTORY_BYTES} at most"
        )
    raw = file.read(n_bytes, start)
    members = _members(raw, file.path)
    if len(members) != n_members:
        raise damaged(file.path, f"its zip directory has {len(members)} members; expected {n_members}")
    return Archive(members, raw, start)


def place(file: OpenFile, archive: Archive, name: str) -> int:
    """Offset of the first byte of a member.

    Raises:
        CheckpointError: encrypted, compressed, or not where the directory says.
    """
    member = archive.members[name]
    where = f"{file.path}: member {shown(name)}"
    if member.flags & _ENCRYPTED:
        raise CheckpointError(f"{where}: is encrypted; expected plain bytes. Save it unencrypted.")
    if member.compression:
        raise CheckpointError(
            f"{where}: is compressed (method {member.compression}); expected stored bytes. "
            "Load it with torch.load(path, weights_only=True) and save it again."
        )
    if member.local + LOCAL.size > archive.start:
        raise damaged(where, f"its header at byte {member.local} lies beyond the members' end")
    fields = LOCAL.unpack(file.read(LOCAL.size, member.local))
    if fields[0] != b"PK\x03\x04":
        raise damaged(where, f"no zip header at byte {member.local}")
    start: int = member.local + LOCAL.size + fields[-2] + fields[-1]
    if start + member.n_bytes > archive.start:
        raise damaged(where, f"its {member.n_bytes} bytes at {start} go beyond the members' end")
    return start


def _end_record(file: OpenFile) -> tuple[int, int, int]:
    """Number of members, length and offset of the central directory."""
    n_tail = min(file.n_bytes, END.size + _MOST_COMMENT_BYTES)
    tail = file.read(n_tail, file.n_bytes - n_tail)
    found = tail.rfind(_END_MAGIC)
    if found < 0 or found + END.size > n_tail:
        raise CheckpointError(
            f"{file.path}: is a zip file without its end: its directory, which is written last, is not in "
            f"the {file.n_bytes} bytes. The file was cut; download or save it again."
        )
    _, disk, first_disk, _, n_members, n_bytes, start, _ = END.unpack_from(tail, found)
    locator = file.n_bytes - n_tail + found - LOCATOR.size
    if locator >= 0 and (n_members == 2**16 - 1 or 2**32 - 1 in (n_bytes, start)):
        magic, _, record, _ = LOCATOR.unpack(file.read(LOCATOR.size, locator))
        if magic == b"PK\x06\x07":
            if record + END_64.size > locator:
                raise damaged(file.path, f"its zip64 end record at byte {record} lies beyond the file's end")
            fields = END_64.unpack(file.read(END_64.size, record))
            if fields[0] != b"PK\x06\x06":
                raise damaged(file.path, f"no zip64 end record at byte {record}")
            disk, first_disk, _, n_members, n_bytes, start = fields[4:]
    if disk or first_disk:
        raise CheckpointError(f"{file.path}: is a part of a zip file; expected a whole one. Join the parts.")
    return n_members, n_bytes, start


def _members(raw: bytes, path: str) -> dict[str, Member]:
    members: dict[str, Member] = {}
    position = 0
    while position < len(raw):
        if position + CENTRAL.size > len(raw) or raw[position : position + 4] != b"PK\x01\x02":
            raise damaged(path, f"no member at byte {position} of its zip directory")
        fields = CENTRAL.unpack_from(raw, position)
        flags, compression, n_packed, n_bytes = fields[3], fields[4], *fields[8:10]
        n_name, n_extra, n_comment, disk, _, _, local = fields[10:]
        name_end = position + CENTRAL.size + n_name
        position = name_end + n_extra + n_comment
        if position > len(raw):
            raise damaged(path, "its zip directory ends within a member")
        try:
            name = raw[name_end - n_name : name_end].decode()
        except UnicodeDecodeError:
            raise damaged(path, "its zip directory has a name that is not UTF-8") from None
        if name in members:
            raise damaged(path, f"its zip directory has the member {shown(name)} twice")
        if disk:
            raise damaged(path, f"its member {shown(name)} is in another part of the zip file")
        if 2**32 - 1 in (n_bytes, n_packed, local):
            extra = raw[name_end : name_end + n_extra]
            where = f"{path}: member {shown(name)}"
            n_bytes, n_packed, local = _zip64(extra, [n_bytes, n_packed, local], where)
        if compression == 0 and n_packed != n_bytes and not flags & _ENCRYPTED:
            raise damaged(path, f"its member {shown(name)} has {n_packed} bytes stored for {n_bytes}")
        members[name] = Member(local, n_bytes, flags, compression)
    return members


def _zip64(extra: bytes, values: list[int], where: str) -> list[int]:
    """`values` with those that did not fit 32 bits taken from the zip64 field."""
    position = 0
    while position + 4 <= len(extra):
        kind = int.from_bytes(extra[position : position + 2], "little")
        end = position + 4 + int.from_bytes(extra[position + 2 : position + 4], "little")
        if kind == 1 and end <= len(extra):
            wide = [int.from_bytes(extra[k : k + 8], "little") for k in range(position + 4, end - 7, 8)]
            if len(wide) >= values.count(2**32 - 1):
                return [wide.pop(0) if value == 2**32 - 1 else value for value in values]
        position = end
    raise damaged(where, "has no 64-bit sizes although its entry calls for them")
