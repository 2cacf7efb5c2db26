"""Headers: what is taken, what is refused and how, and what that costs."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus.headers import BROKEN, GOOD, Broken, entry, packed
from tvfast.checkpoint.files import OpenFile
from tvfast.checkpoint.header import Header, parse_header, read_header
from tvfast.dtypes import ITEM_BITS
from tvfast.errors import CheckpointError


def parse(raw: bytes) -> Header:
    return parse_header(raw, len(raw), "model.safetensors")


def message_of(raw: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    return str(caught.value)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_every_defect_is_named(broken: Broken) -> None:
    message = message_of(broken.raw)
    assert message.startswith("model.safetensors: ")
    assert [part for part in broken.says if part not in message] == []
    assert len(message) < 900
    assert "\n" not in message
    assert message.isprintable()


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_reference_refuses_the_same(broken: Broken) -> None:
    """Where the safetensors library is more lenient, the corpus says so."""
    try:
        safetensors.deserialize(broken.raw)
        accepted = True
    except safetensors.SafetensorError:
        accepted = False
    assert accepted == broken.reference_accepts


def test_a_header() -> None:
    raw = packed(
        {
            "b": entry("BF16", [2, 3], [8, 20]),
            "__metadata__": {"format": "pt", "naïve": "☃"},
            "a": entry("F32", [], [4, 8]),
            "empty": entry("F64", [0, 5], [8, 8]),
            "nibbles": entry("F4", [8], [0, 4]),
        },
        20,
    )
    header = parse(raw)
    start = len(raw) - 20
    assert [(t.name, t.offset - start, t.n_bytes, t.dtype, t.shape) for t in header.tensors] == [
        ("nibbles", 0, 4, "F4", (8,)),
        ("a", 4, 4, "F32", ()),
        ("empty", 8, 0, "F64", (0, 5)),
        ("b", 8, 12, "BF16", (2, 3)),
    ]
    assert {t.path for t in header.tensors} == {"model.safetensors"}
    assert header.metadata == {"format": "pt", "naïve": "☃"}
    assert (header.data_start, header.n_bytes) == (start, len(raw))


def test_no_tensors_are_a_header() -> None:
    assert parse(packed({}, 0)).tensors == ()
    assert parse(packed(b"{ }\n\t", 0)).tensors == ()


@pytest.mark.parametrize(
    "text",
    [
        b'{"x":{' + GOOD + b"}}",
        b'{ "x" : { "dtype" : "F32" , "shape" : [ 2 ] , "data_offsets" : [ 0 , 8 ] } }',
        b'{"x":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}',
        b'{\n\t"x": {\r\n"dtype": "F32", "shape": [\n2\n], "data_offsets": [0, 8]}\n}\n',
        b'{"\\u0078":{"d\\u0074ype":"F\\u00332","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_every_spelling_is_the_same_header(text: bytes) -> None:
    (tensor,) = parse(packed(text)).tensors
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.n_bytes) == ("x", "F32", (2,), 8)


def test_the_largest_length_that_fits() -> None:
    shape = [2**57]
    raw = packed({"x": entry("F32", shape, [0, 2**59])}, 0)
    (tensor,) = parse_header(raw, len(raw) + 2**59, "x").tensors
    assert tensor.n_bytes == 2**59


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header whose tensors cover `n` bytes, its keys in any order."""
    found, n = [], 0
    for name in draw(st.lists(names.filter(lambda name: name != "__metadata__"), unique=True, max_size=8)):
        dtype = draw(st.sampled_from(sorted(ITEM_BITS)))
        shape = [*draw(st.lists(st.integers(0, 4), max_size=3)), 4]
        n_bytes = ITEM_BITS[dtype] * math.prod(shape) // 8
        found.append((name, entry(dtype, shape, [n, n + n_bytes])))
        n += n_bytes
    if draw(st.booleans()):
        found.append(
            ("__metadata__", draw(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), names)))
        )
    return dict(draw(st.permutations(found))), n


@given(
    described=headers(), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]), compact=st.booleans()
)
def test_valid_headers_are_taken_as_they_are(
    described: tuple[dict[str, Any], int], ascii_only: bool, indent: int | None, compact: bool
) -> None:
    header, n = described
    separators = (",", ":") if compact else None
    text = json.dumps(header, ensure_ascii=ascii_only, indent=indent, separators=separators)
    parsed = parse(packed(text.encode(), n))
    metadata = header.pop("__metadata__", {})
    assert parsed.metadata == metadata
    assert {
        t.name: entry(
            t.dtype, list(t.shape), [t.offset - parsed.data_start, t.offset + t.n_bytes - parsed.data_start]
        )
        for t in parsed.tensors
    } == header
    offsets = [(t.offset, t.n_bytes) for t in parsed.tensors]
    assert offsets == sorted(offsets)
    assert dict(safetensors.deserialize(packed(text.encode(), n))).keys() == header.keys()


def many(n: int, name: str, shape: list[int], *, space: str = "") -> bytes:
    """A file of `n` empty tensors."""
    compact = json.dumps(entry("U8", shape, [0, 0]), separators=(",", ":")).replace(",", space + ",")
    return packed(("{" + ",".join(f'"{name}{k:x}":{compact}' for k in range(n)) + "}").encode(), 0)


EXPENSIVE = {
    "brackets": packed(b'{"x":' + b"[" * 2_000_000, 0),
    "empty_lists": packed(b'{"x":[' + b"[]," * 700_000 + b"[]]}", 0),
    "lists_in_shape": packed(b'{"x":{"shape":[' + b"[]," * 700_000 + b"[]]}}", 0),
    "objects": packed(b'{"x":[' + b"{}," * 700_000 + b"{}]}", 0),
    "entries_without_fields": packed(b'{"x":{' + b'"a":[],' * 300_000 + b'"a":[]}}', 0),
    "short_metadata": packed(
        b'{"__metadata__":{' + b",".join(b'"%x":"ab"' % k for k in range(100_000)) + b"}}", 0
    ),
    "metadata_of_snowmen": packed(
        json.dumps(
            {"__metadata__": {f"{k:x}😀": "😀" * 14 for k in range(30_000)}}, ensure_ascii=False
        ).encode(),
        0,
    ),
    "tiny_entries": many(20_000, "", [0]),
    "tiny_entries_of_snowmen": many(20_000, "😀", [0]),
    "one_large_dimension": many(12_000, "", [0, 300]),
    "seven_dimensions": many(12_000, "", [0, *[300] * 7]),
    "sixty_four_dimensions": many(5_000, "", [0] * 64),
    "other_spelling": many(12_000, "", [0, 1, 1], space=" "),
    "spaces": packed(b"{" + b" " * 2_000_000 + b"}", 0),
    "spaces_in_entry": packed(b'{"x":{"dtype":"F32","shape":[' + b" " * 2_000_000 + b"]}}", 0),
    "escapes": packed(b'{"' + b"\\n" * 1_000_000 + b'":{}}', 0),
    "long_plain_name": packed(b'{"' + b"n" * 2_000_000 + b'":{}}', 0),
    "long_value": packed({"__metadata__": {"a": '"' * 500_000 + "\U0001f600"}}, 0),
    "digits": packed(b'{"x":{"dtype":"F32","shape":[' + b"9" * 2_000_000 + b"]}}", 0),
}


@pytest.mark.parametrize("raw", EXPENSIVE.values(), ids=EXPENSIVE)
def test_memory_and_time_stay_within_bounds(raw: bytes) -> None:
    """Ten times the file at most, and some constant; tracing makes it some four times slower."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with suppress(CheckpointError):
            parse(raw)
        seconds = time.process_time() - started
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak + len(raw) <= 10 * len(raw) + 2**20
    assert seconds < 10


@pytest.mark.parametrize("raw", [b'{"a":{' * 2000, b'{"a":[' * 2000 + b'"\\'], ids=["objects", "lists"])
def test_nesting_deep_in_a_stack_is_named(raw: bytes) -> None:
    def below(depth: int) -> str:
        return below(depth - 1) if depth else message_of(packed(raw))

    assert "model.safetensors: " in below(500)


def test_a_file_is_read_up_to_its_data(tmp_path: Path) -> None:
    raw = packed({"x": entry(), "__metadata__": {"format": "pt"}})
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    header = read_header(str(path))
    assert header.path == header.tensors[0].path == str(path)
    assert header.n_bytes == len(raw)
    assert header.mtime_ns == path.stat().st_mtime_ns
    assert header.crc32 == zlib.crc32(raw[:-8])


@pytest.mark.parametrize(
    "name", ["empty", "seven_bytes", "length_2_64", "length_beyond_file", "cut", "longer", "zip"]
)
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(BROKEN[name].raw)
    with pytest.raises(CheckpointError) as caught:
        read_header(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert [part for part in BROKEN[name].says if part not in str(caught.value)] == []


def test_a_large_sparse_file_costs_its_header_only(tmp_path: Path) -> None:
    n = 2**38
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed({"x": entry("U8", [n], [0, n])}, 0))
    os.truncate(path, path.stat().st_size + n)
    tracemalloc.start()
    try:
        (tensor,) = read_header(str(path)).tensors
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensor.n_bytes == n
    assert peak < 2**20


def refused_at_once(path: Path | str) -> str:
    """The message of `read_header`, in another thread so that waiting would show."""
    found: list[str] = []

    def read() -> None:
        try:
            read_header(str(path))
        except CheckpointError as error:
            found.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the file was opened to wait"
    (message,) = found
    assert message.startswith(f"{path}: ")
    return message


def test_no_pipe_directory_device_or_socket_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    assert "named pipe" in refused_at_once(fifo)
    assert "a directory" in refused_at_once(tmp_path)
    assert "character device" in refused_at_once("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.safetensors")
        assert "a socket" in refused_at_once("socket.safetensors")


def test_a_file_replaced_by_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before opening says nothing about what is there when it is opened."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed({"x": entry()}))
    real = os.open

    def swapped(name: str, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    assert "named pipe" in refused_at_once(path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert "no such file" in refused_at_once(path)
    path.symlink_to(tmp_path / "nowhere")
    assert "symbolic link to nothing" in refused_at_once(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read" in refused_at_once(tmp_path / "loop")
    assert "cannot be read" in refused_at_once("n" * 5000)


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    with path.open("rb") as file, pytest.raises(CheckpointError, match="ended 6 bytes early"):
        OpenFile(file.fileno(), str(path), 16, 0).read(16, 0)


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a").write_bytes(packed({"x": entry()}))
    monkeypatch.setattr(os, "pread", fail)
    assert "cannot be read: Input/output error" in refused_at_once(tmp_path / "a")


def test_part_of_a_header_is_refused() -> None:
    raw = packed({"x": entry()})
    with pytest.raises(CheckpointError, match="20 bytes were given; expected the 72 bytes of the header"):
        parse_header(raw[:20], len(raw), "x")


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed({"x": entry()}))
    path.chmod(0o400)
    before = path.stat()
    n_open = len(os.listdir("/proc/self/fd"))
    read_header(str(path))
    with pytest.raises(CheckpointError):
        read_header(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == n_open
    after = path.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_size) == (
        before.st_mtime_ns,
        before.st_mode,
        before.st_size,
    )


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "zipfile", "pickle", "difflib", "yaml", "safetensors", "tvfast._C_cpu")
    code = f"import sys, tvfast.checkpoint.reading; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
