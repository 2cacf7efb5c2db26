"""Headers of safetensors files, validated completely before any tensor is read.

A file is the header's length (8 bytes, little-endian), the header, and the tensors' bytes. The header is one
JSON object, possibly padded by spaces: tensor name -> `{"dtype", "shape", "data_offsets"}`, and
`__metadata__` -> an object of strings.

Entries are taken one by one and become `Stored` at once, so that memory stays within 10 times the file
whatever it holds; a JSON parser would first build lists 20 times the size of what they are read from.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from json import JSONDecoder
from operator import attrgetter

from tvfast.checkpoint.files import damaged, foreign, open_regular, shown
from tvfast.checkpoint.stored import Stored
from tvfast.dtypes import ITEM_BITS
from tvfast.errors import CheckpointError

MOST_BYTES = 100_000_000
"""Length of a header that the reference library takes."""

_START_BYTES = 64
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_MOST_DIMENSIONS = 64
_NAME_BYTES = 4096
_ENTRY_BYTES = 16384
_STRING_BYTES = 2**20
_FREE_PAIRS = 10_000  # metadata beyond these must be 64 bytes a pair, or its dict outgrows the file 10 times
_PAIR_BYTES = 64

_BY_BYTES = {name.encode(): name for name in ITEM_BITS}

_INTEGER = rb"(?:0|[1-9][0-9]{0,18})"
# What every known writer produces; anything else takes the slower way with the same outcome.
_ENTRY = re.compile(
    rb'"([^"\\\x00-\x1f]{1,%d})": ?\{"dtype": ?"([A-Z0-9_]{1,16})", ?"shape": ?\[((?:%b(?:, ?%b){0,%d})?)\], '
    rb'?"data_offsets": ?\[(%b), ?(%b)\]\}'
    % (_NAME_BYTES, _INTEGER, _INTEGER, _MOST_DIMENSIONS - 1, _INTEGER, _INTEGER)
)
_HALF = re.compile("[\ud800-\udfff]")  # what JSON's escapes can make and UTF-8 cannot hold
_SPACE = re.compile(rb"[ \t\n\r]*")
_PLAIN_STRING = re.compile(rb'"([^"\\\x00-\x1f]*)"')
# Bounded repeats: `re` keeps some 100 bytes for every round of an unbounded one.
_STRING_PART = re.compile(rb'[^"\\\x00-\x1f]*(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*){0,1000}')


@dataclass(frozen=True, slots=True)
class Header:
    """What a file of weights declares.

    Attributes:
        path: of the file.
        tensors: ascending by offset.
        metadata: free strings; `format` is the writer's framework.
        data_start: offset of the first tensor byte.
        n_bytes: of the whole file.
        mtime_ns: when the file was last written to.
        crc32: of the bytes that were read: the length and the header.
    """

    path: str
    tensors: tuple[Stored, ...]
    metadata: dict[str, str]
    data_start: int
    n_bytes: int
    mtime_ns: int = 0
    crc32: int = 0


def read_header(path: str) -> Header:
    """The validated header of a safetensors file. No tensor byte is read.

    Raises:
        CheckpointError: no regular file, or anything that `parse_header` refuses.
    """
    with open_regular(path) as file:
        start = file.read(min(_START_BYTES, file.n_bytes), 0)
        raw = file.read(8 + _length(start, file.n_bytes, path), 0)
        parsed = parse_header(raw, file.n_bytes, path)
        return Header(
            path,
            parsed.tensors,
            parsed.metadata,
            parsed.data_start,
            file.n_bytes,
            file.mtime_ns,
            zlib.crc32(raw),
        )


def parse_header(raw: bytes, n_file_bytes: int, path: str) -> Header:
    """The header in `raw`, the first bytes of a file: its length and all of the header, or more.

    Args:
        raw: first bytes of the file.
        n_file_bytes: length of the file.
        path: for messages and for `Stored.path`; nothing is opened.

    Raises:
        CheckpointError: anything but a header that describes the whole file: every byte belongs to one
            tensor, names are unique and printable as UTF-8, dtypes are known, lengths fit shapes.

    Notes:
        About 3 us a tensor. Memory stays within 10 times `raw` and 4 MiB.
    """
    end = 8 + _length(raw[:_START_BYTES], n_file_bytes, path)
    if len(raw) < end:
        raise CheckpointError(f"{path}: {len(raw)} bytes were given; expected the {end} bytes of the header.")
    if len(raw) > end:
        raw = raw[:end]
    return _Parser(raw, path).parse(n_file_bytes)


def _length(start: bytes, n_file_bytes: int, path: str) -> int:
    """The header's length, from the first 8 bytes; the others tell what a wrong file is."""
    if len(start) < 8:
        raise damaged(
            path,
            f"is {'empty' if not n_file_bytes else f'{n_file_bytes} bytes long'}; "
            f"expected a safetensors file, of 8 bytes at least",
        )
    n_bytes = int.from_bytes(start[:8], "little")
    if n_bytes <= MOST_BYTES and 8 + n_bytes <= n_file_bytes:
        return n_bytes
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{path}: is a {'zip archive' if start.startswith(b'PK') else 'pickle'}, as torch.save writes; "
            "expected a safetensors file. Give it the suffix .bin to have it read as what it is."
        )
    if other := foreign(start):
        raise CheckpointError(f"{path}: {other} Expected a safetensors file.")
    if n_bytes > MOST_BYTES:
        raise CheckpointError(
            f"{path}: declares a header of {n_bytes} bytes; expected {MOST_BYTES} at most. "
            "This is no safetensors file, or a damaged one; download or save it again."
        )
    raise CheckpointError(
        f"{path}: declares a header of {n_bytes} bytes, but only {n_file_bytes - 8} bytes follow; "
        f"{8 + n_bytes - n_file_bytes} bytes are missing. The file was cut; download or save it again."
    )


class _Parser:
    """One walk over the bytes of a header. Positions count from the start of the file."""

    __slots__ = ("metadata", "metadata_start", "path", "raw", "tensors")

    def __init__(self, raw: bytes, path: str) -> None:
        self.raw = raw
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] | None = None
        self.metadata_start = 0

    def parse(self, n_file_bytes: int) -> Header:
        raw = self.raw
        end = self._object(8, self._entry, "the header")
        if self._space(end) != len(raw):
            raise self._malformed(self._space(end), "expected spaces only after the header's object")
        tensors = sorted_by_offset(self.tensors.values())
        self._check_cover(tensors, n_file_bytes)
        return Header(self.path, tuple(tensors), self.metadata or {}, len(raw), n_file_bytes)

    def _object(self, position: int, member: Callable[[int], int], what: str) -> int:
        """The end of the object at `position`; `member` takes a key with its value, and returns their end."""
        raw = self.raw
        if raw[position : position + 1] != b"{":
            raise self._malformed(position, f"expected {what} to be an object and start with '{{'")
        position = self._space(position + 1)
        if raw[position : position + 1] == b"}":
            return position + 1
        while True:
            position = self._space(member(position))
            delimiter = raw[position : position + 1]
            if delimiter != b",":
                break
            position = self._space(position + 1)
        if delimiter != b"}":
            raise self._malformed(position, f"expected ',' or '}}' in {what}")
        return position + 1

    def _entry(self, position: int) -> int:
        """Takes one key of the header."""
        found = _ENTRY.match(self.raw, position)
        if found is not None:
            encoded, dtype, shape, begin, end = found.groups()
            if encoded != _METADATA.encode():
                try:
                    name = encoded.decode()
                except UnicodeDecodeError as error:
                    raise self._not_utf8(position + 1, error) from None
                self._add(
                    name,
                    _BY_BYTES.get(dtype) or dtype.decode(),
                    tuple(map(int, shape.split(b","))) if shape else (),
                    int(begin),
                    int(end),
                )
                return found.end()
        name, position = self._key(position, _NAME_BYTES)
        if name != _METADATA:
            if not name or "\0" in name:
                raise damaged(
                    self.path, f"a tensor's name is {shown(name)}; expected one without NUL, not empty"
                )
            return self._other_entry(name, position)
        if self.metadata is not None:
            raise self._twice(_METADATA)
        self.metadata = {}
        self.metadata_start = position
        position = self._object(position, self._pair, _METADATA)
        self._check_pairs(position)
        return position

    def _pair(self, position: int) -> int:
        """Takes one key of the metadata."""
        assert self.metadata is not None
        key, position = self._key(position, _STRING_BYTES)
        if key in self.metadata:
            raise damaged(self.path, f"{_METADATA} has the key {shown(key)} twice; expected once")
        self._check_pairs(len(self.raw))
        if self.raw[position : position + 1] != b'"':
            raise damaged(
                self.path, f"{_METADATA}[{shown(key)}] is {self._kind(position)}; expected a string"
            )
        self.metadata[key], position = self._string(position, _STRING_BYTES)
        return position

    def _check_pairs(self, end: int) -> None:
        """Raise if the metadata, which ends at `end` or before, has more keys than its length can pay for."""
        assert self.metadata is not None
        n_pairs, n_bytes = len(self.metadata), end - self.metadata_start
        if n_pairs > _FREE_PAIRS and n_pairs * _PAIR_BYTES > n_bytes:
            raise damaged(
                self.path,
                f"{_METADATA} has {n_pairs} keys or more in {n_bytes} bytes; "
                f"expected {_FREE_PAIRS} at most of such short ones",
            )

    def _other_entry(self, name: str, position: int) -> int:
        """Takes the value of a tensor's key, spelled in any way."""
        where = f"{self.path}: tensor {shown(name)}"
        if self.raw[position : position + 1] != b"{":
            raise damaged(
                where, f"its entry is {self._kind(position)}; expected an object of {', '.join(_FIELDS)}"
            )
        end = self.raw.find(b"}", position, position + _ENTRY_BYTES) + 1
        if not end:
            raise damaged(
                where, f"its entry does not end within {_ENTRY_BYTES} bytes; expected {', '.join(_FIELDS)}"
            )
        try:
            pairs: list[tuple[str, object]] = _DECODER.decode(self.raw[position:end].decode())
        except UnicodeDecodeError as error:
            raise self._not_utf8(position, error) from None
        except RecursionError:
            raise damaged(where, "its entry is nested too deeply") from None
        except ValueError as error:
            raise damaged(
                where, f"its entry is not a flat JSON object: {shown(str(error), quote=False)}"
            ) from None
        fields = dict(pairs)
        if len(fields) != len(pairs) or fields.keys() != set(_FIELDS):
            raise damaged(
                where,
                f"its entry has the fields {shown([key for key, _ in pairs])}; expected "
                f"{', '.join(_FIELDS)}, each once",
            )
        dtype, shape, offsets = (fields[key] for key in _FIELDS)
        if not isinstance(dtype, str):
            raise damaged(where, f"dtype is {shown(dtype)}; expected a string")
        self._add(name, dtype, _integers(shape, "shape", where), *_two(offsets, where))
        return end

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> None:
        """Keeps a tensor, if its numbers fit each other."""
        if name in self.tensors:
            raise self._twice(name)
        bits = ITEM_BITS.get(dtype)
        if bits is None:
            raise damaged(
                self.path,
                f"tensor {shown(name)}: dtype is {shown(dtype)}; expected one of "
                f"{', '.join(ITEM_BITS)}.{_nearest(dtype)}",
            )
        n_bits = math.prod(shape) * bits
        n_bytes = end - begin
        # 2^63 bits or more cannot be right, and zeros among the dimensions must not hide the others
        if n_bits != n_bytes * 8 or n_bits >= 2**63 or (n_bits == 0 and _overflows(shape)):
            raise self._bad_extent(name, dtype, shape, begin, end)
        self.tensors[name] = Stored(name, self.path, len(self.raw) + begin, n_bytes, dtype, shape)

    def _bad_extent(
        self, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int
    ) -> CheckpointError:
        where = f"{self.path}: tensor {shown(name)}"
        n_bits = math.prod(shape) * ITEM_BITS[dtype]
        if _overflows(shape) or n_bits >= 2**63:
            found = f"shape {shown(list(shape))} has 2^63 elements or bits, or more; expected fewer"
        elif end < begin:
            found = f"data_offsets are [{begin}, {end}]; expected the first not to be above the second"
        elif n_bits % 8:
            found = f"shape {shown(list(shape))} of {dtype} takes {n_bits} bits; expected whole bytes"
        else:
            found = (
                f"data_offsets [{begin}, {end}] hold {end - begin} bytes; "
                f"expected {n_bits // 8} for shape {shown(list(shape))} of {dtype}"
            )
        return damaged(where, f"{found}")

    def _check_cover(self, tensors: list[Stored], n_file_bytes: int) -> None:
        """Raise unless the tensors follow each other from the first data byte to the last."""
        position = len(self.raw)
        previous: Stored | None = None
        for tensor in tensors:
            if tensor.offset != position:
                raise self._gap(previous, tensor, position)
            position += tensor.n_bytes
            previous = tensor
        if position > n_file_bytes:
            first = next(t for t in tensors if t.offset + t.n_bytes > n_file_bytes)
            raise CheckpointError(
                f"{self.path}: is {n_file_bytes} bytes long; expected {position} by its header: "
                f"{position - n_file_bytes} bytes are missing, from tensor {shown(first.name)} on. "
                "The file was cut; download or save it again."
            )
        if position < n_file_bytes:
            raise damaged(
                self.path,
                f"{n_file_bytes - position} bytes follow the last tensor; expected none: "
                f"the header describes a file of {position} bytes, this one has {n_file_bytes}",
            )

    def _gap(self, previous: Stored | None, tensor: Stored, position: int) -> CheckpointError:
        after = f"the end of tensor {shown(previous.name)}" if previous else "the first data byte"
        begin = tensor.offset - len(self.raw)
        if tensor.offset > position:
            found = f"begins {tensor.offset - position} bytes after {after}, a hole that belongs to no tensor"
        else:
            found = f"begins {position - tensor.offset} bytes before {after}; two tensors overlap"
        return damaged(
            self.path,
            f"tensor {shown(tensor.name)}: {found}: its data_offsets begin at {begin}; "
            f"expected {position - len(self.raw)}",
        )

    def _key(self, position: int, most_bytes: int) -> tuple[str, int]:
        """The string at `position`, and where its value begins."""
        if self.raw[position : position + 1] != b'"':
            raise self._malformed(position, "expected a name in double quotes")
        name, end = self._string(position, most_bytes)
        colon = self._space(end)
        if self.raw[colon : colon + 1] != b":":
            raise self._malformed(colon, f"expected ':' after {shown(name)}")
        return name, self._space(colon + 1)

    def _string(self, position: int, most_bytes: int) -> tuple[str, int]:
        """The string whose quote is at `position`, and its end."""
        plain = _PLAIN_STRING.match(self.raw, position)
        end = plain.end() if plain else self._string_end(position)
        if end - position - 2 > most_bytes:
            raise self._malformed(position, f"expected a string of at most {most_bytes} bytes")
        try:
            text = self.raw[position:end].decode()
            value: str = text[1:-1] if plain else _DECODER.decode(text)
        except UnicodeDecodeError as error:
            raise self._not_utf8(position, error) from None
        except ValueError as error:
            raise self._malformed(position, f"expected a JSON string ({error})") from None
        if not plain and _HALF.search(value):
            raise damaged(
                self.path,
                f"the string {shown(value)} at byte {position} has half a surrogate pair; expected text",
            )
        return value, end

    def _string_end(self, position: int) -> int:
        """The end of a string that has escapes."""
        inside = position + 1
        while True:
            part = _STRING_PART.match(self.raw, inside)
            assert part is not None  # the pattern matches nothing, too
            if self.raw[part.end() : part.end() + 1] == b'"':
                return part.end() + 1
            if part.end() == inside or self.raw[part.end() : part.end() + 1] != b"\\":
                raise self._malformed(position, "expected a string that ends and has no control characters")
            inside = part.end()

    def _space(self, position: int) -> int:
        """The first position from `position` on that is no white space."""
        if self.raw[position : position + 1] > b" ":
            return position
        found = _SPACE.match(self.raw, position)
        return found.end() if found else position

    def _kind(self, position: int) -> str:
        start = self.raw[position : position + 1]
        kinds = {b"{": "an object", b"[": "a list", b'"': "a string", b"": "cut off"}
        return kinds.get(start) or shown(self.raw[position : position + 12].decode("latin-1"), quote=False)

    def _malformed(self, position: int, expected: str) -> CheckpointError:
        here = self.raw[position : position + 12]
        found = repr(here.decode("latin-1")) if here else "the header's end"
        return damaged(self.path, f"the header is not JSON at byte {position}: found {found}; {expected}")

    def _not_utf8(self, position: int, error: UnicodeDecodeError) -> CheckpointError:
        return damaged(
            self.path,
            f"the header is not UTF-8 at byte {position + error.start} ({error.reason}); expected UTF-8",
        )

    def _twice(self, name: str) -> CheckpointError:
        return damaged(self.path, f"the header has the name {shown(name)} twice; expected once")


def sorted_by_offset(tensors: Iterable[Stored]) -> list[Stored]:
    """Ascending by offset, empty tensors before what lies at the same place."""
    found = list(tensors)
    # two stable sorts: tuples as keys would take more memory than the entries themselves
    found.sort(key=attrgetter("n_bytes"))
    found.sort(key=attrgetter("offset"))
    return found


def _overflows(shape: tuple[int, ...]) -> bool:
    return math.prod(size for size in shape if size) >= 2**63


def _integers(found: object, what: str, where: str) -> tuple[int, ...]:
    if not isinstance(found, list) or any(type(value) is not int or value < 0 for value in found):
        raise damaged(where, f"{what} is {shown(found)}; expected a list of non-negative integers")
    if len(found) > _MOST_DIMENSIONS:
        raise damaged(where, f"{what} has {len(found)} numbers; expected {_MOST_DIMENSIONS} at most")
    return tuple(found)


def _two(found: object, where: str) -> tuple[int, int]:
    offsets = _integers(found, "data_offsets", where)
    if len(offsets) != 2:
        raise damaged(where, f"data_offsets is {shown(found)}; expected two integers")
    return offsets[0], offsets[1]


def _nearest(dtype: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(dtype.upper(), ITEM_BITS, n=1) if len(dtype) < 32 else []
    return f" The nearest is {near[0]!r}." if near else ""


def _integer(digits: str) -> int:
    # longer ones take quadratic time in older Pythons
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits")
    if digits == "-0":
        raise ValueError("-0 for an integer")
    return int(digits)


_DECODER = JSONDecoder(object_pairs_hook=list, parse_int=_integer)
