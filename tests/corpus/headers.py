"""Broken safetensors files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Broken:
    """One file with one defect.

    Attributes:
        raw: its bytes.
        says: parts of the error's message.
        reference_accepts: whether the safetensors library takes it; we are stricter on purpose.
    """

    raw: bytes
    says: tuple[str, ...]
    reference_accepts: bool = False


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """A header's entry; a valid one by default."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: object, n_data: int = 8, *, pad: int = 8) -> bytes:
    """A file from a header (bytes as they are, anything else as JSON) and zeros."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % pad)
    return len(raw).to_bytes(8, "little") + raw + bytes(n_data)


def one(**changes: Any) -> bytes:
    """A file with one tensor `x` whose entry has some fields changed; None drops a field."""
    fields = {**entry(), **changes}
    return packed({"x": {key: value for key, value in fields.items() if value is not None}})


GOOD = b'"dtype":"F32","shape":[2],"data_offsets":[0,8]'
DEEP = 100_000

BROKEN: dict[str, Broken] = {
    # the length
    "empty": Broken(b"", ("is empty",)),
    "seven_bytes": Broken(b"\x08" + bytes(6), ("7 bytes long",)),
    "length_beyond_file": Broken(packed({"x": entry()})[:40], ("bytes are missing", "was cut")),
    "length_2_60": Broken((2**60).to_bytes(8, "little") + b"{}", (str(2**60), "100000000")),
    "length_2_64": Broken(b"\xff" * 8 + b"{}", (str(2**64 - 1), "100000000")),
    "length_over_cap": Broken((100_000_001).to_bytes(8, "little") + b"{}", ("100000001", "100000000")),
    "length_zero": Broken(bytes(8), ("header's end", "'{'")),
    # something else
    "zip": Broken(b"PK\x03\x04" + bytes(60), ("zip archive", ".bin")),
    "pickle": Broken(b"\x80\x02}q\x00." + bytes(60), ("pickle", ".bin")),
    "git_lfs": Broken(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ("git lfs pull",)),
    "html": Broken(b"<!DOCTYPE html><html></html>", ("HTML page",)),
    "gguf": Broken(b"GGUF\x03\x00\x00\x00" + bytes(40), ("GGUF",)),
    # the text
    "not_utf8_in_name": Broken(packed(b'{"\xff\xfe":{' + GOOD + b"}}"), ("not UTF-8", "byte 10")),
    "surrogate_bytes": Broken(packed(b'{"\xed\xa0\x80":{' + GOOD + b"}}"), ("not UTF-8",)),
    "utf16": Broken(packed('{"x":{}}'.encode("utf-16")), ("not JSON at byte 8",)),
    "byte_order_mark": Broken(packed(b"\xef\xbb\xbf{}", 0), ("not JSON at byte 8",)),
    "not_json": Broken(packed(b"hello world"), ("not JSON at byte 8", "hello")),
    "list": Broken(packed([entry()]), ("expected the header to be an object",)),
    "string": Broken(packed("x"), ("expected the header to be an object",)),
    "nothing_but_spaces": Broken(packed(b"        ", 0), ("not JSON at byte 8",)),
    "leading_space": Broken(packed(b" {}", 0), ("start with '{'",), reference_accepts=True),
    "unterminated": Broken(packed(b'{"x":{' + GOOD + b"}"), ("expected ',' or '}'", "header's end")),
    "trailing_comma": Broken(packed(b'{"x":{' + GOOD + b"},}"), ("name in double quotes",)),
    "missing_comma": Broken(packed(b'{"x":{' + GOOD + b'} "y":{}}'), ("expected ',' or '}'",)),
    "missing_colon": Broken(packed(b'{"x" {' + GOOD + b"}}"), ("expected ':'",)),
    "single_quotes": Broken(packed(b"{'x':{" + GOOD + b"}}"), ("name in double quotes",)),
    "text_after": Broken(packed(b'{"x":{' + GOOD + b"}} {}"), ("spaces only",)),
    "zeros_after": Broken(packed(b'{"x":{' + GOOD + b"}}\0\0\0"), ("spaces only",)),
    "comment": Broken(packed(b'{/* */"x":{' + GOOD + b"}}"), ("name in double quotes",)),
    "unterminated_name": Broken(packed(b'{"x'), ("string that ends",)),
    "unterminated_escapes": Broken(packed(b'{"' + b"\\n" * 5000), ("string that ends",)),
    "bad_escape": Broken(packed(b'{"\\x41":{' + GOOD + b"}}"), ("JSON string",)),
    "control_character": Broken(packed(b'{"a\nb":{' + GOOD + b"}}"), ("control characters",)),
    # names
    "same_name_twice": Broken(
        packed(b'{"x":{' + GOOD + b'},"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', 16),
        ("'x'", "twice"),
    ),
    "same_name_escaped": Broken(
        packed(b'{"x":{' + GOOD + b'},"\\u0078":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', 16),
        ("'x'", "twice"),
    ),
    "empty_name": Broken(packed({"": entry()}), ("name is ''",), reference_accepts=True),
    "nul_in_name": Broken(packed({"a\0b": entry()}), (r"'a\x00b'", "NUL"), reference_accepts=True),
    "lone_surrogate": Broken(packed(b'{"\\ud800":{' + GOOD + b"}}"), ("surrogate",)),
    "reversed_surrogates": Broken(packed(b'{"\\ude00\\ud83d":{' + GOOD + b"}}"), ("surrogate",)),
    "long_name": Broken(packed({"n" * 5000: entry()}), ("at most 4096 bytes",), reference_accepts=True),
    # entries
    "entry_number": Broken(packed({"x": 3}), ("'x'", "its entry is 3")),
    "entry_null": Broken(packed({"x": None}), ("'x'", "null")),
    "entry_list": Broken(packed({"x": [1]}), ("'x'", "a list")),
    "entry_string": Broken(packed({"x": "F32"}), ("'x'", "a string")),
    "entry_nan": Broken(packed(b'{"x":NaN}'), ("'x'", "NaN")),
    "entry_cut": Broken(packed(b'{"x":', pad=1), ("'x'", "cut off")),
    "entry_unterminated": Broken(packed(b'{"x":{"dtype":"F32"', pad=1), ("'x'", "does not end")),
    "entry_empty": Broken(packed({"x": {}}), ("'x'", "fields []")),
    "no_dtype": Broken(one(dtype=None), ("'x'", "fields ['shape', 'data_offsets']")),
    "no_shape": Broken(one(shape=None), ("'x'", "fields ['dtype', 'data_offsets']")),
    "no_offsets": Broken(one(data_offsets=None), ("'x'", "fields ['dtype', 'shape']")),
    "unknown_field": Broken(one(note=1), ("'x'", "'note'"), reference_accepts=True),
    "field_twice": Broken(packed(b'{"x":{"dtype":"F32",' + GOOD + b"}}"), ("'x'", "each once")),
    "nested_object": Broken(one(note={"a": {}}), ("'x'", "flat JSON object"), reference_accepts=True),
    "not_utf8_in_entry": Broken(
        packed(b'{"x":{"dtype":"\xff","shape":[2],"data_offsets":[0,8]}}'), ("not UTF-8", "byte 23")
    ),
    "deep_list": Broken(packed(b'{"x":' + b"[" * DEEP), ("'x'", "a list")),
    "deep_shape": Broken(
        packed(b'{"x":{"shape":' + b"[" * 9000 + b"]" * 6000 + b"}}"), ("'x'", "nested too deeply")
    ),
    "deep_object": Broken(packed(b'{"x":' * DEEP), ("'x'", "does not end")),
    "wide_entry": Broken(
        packed({"x": entry(shape=[1] * 20000, offsets=[0, 4])}, 4), ("'x'", "does not end within 16384"), True
    ),
    # dtype
    "dtype_unknown": Broken(one(dtype="F31"), ("'x'", "'F31'", "BF16", "nearest is 'F")),
    "dtype_lower_case": Broken(one(dtype="bf16"), ("'x'", "'bf16'", "nearest is 'BF16'")),
    "dtype_number": Broken(one(dtype=32), ("'x'", "dtype is 32")),
    "dtype_null": Broken(
        packed(b'{"x":{"dtype":null,"shape":[2],"data_offsets":[0,8]}}'), ("dtype is None",)
    ),
    "dtype_long": Broken(one(dtype="F" * 10000), ("'x'", "FF'...; expected one")),
    # shape
    "shape_number": Broken(one(shape=2), ("'x'", "shape is 2")),
    "shape_string": Broken(one(shape="2"), ("'x'", "shape is '2'")),
    "shape_negative": Broken(one(shape=[-2]), ("'x'", "shape is [-2]")),
    "shape_minus_zero": Broken(
        packed(b'{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0), ("'x'", "-0 for an integer")
    ),
    "shape_float": Broken(one(shape=[2.0]), ("'x'", "shape is [2.0]")),
    "shape_boolean": Broken(one(shape=[True, 2]), ("'x'", "shape is [True, 2]")),
    "shape_nan": Broken(one(shape=[float("nan")]), ("'x'", "shape is [nan]")),
    "shape_infinity": Broken(one(shape=[float("inf")]), ("'x'", "shape is [inf]")),
    "shape_nested": Broken(one(shape=[[2]]), ("'x'", "shape is [[2]]")),
    "shape_leading_zero": Broken(
        packed(b'{"x":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}'), ("'x'", "flat JSON object")
    ),
    "shape_huge": Broken(
        packed(b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
        ("'x'", "5000 digits"),
    ),
    "shape_overflow": Broken(one(shape=[2**32, 2**32]), ("'x'", "2^63")),
    "shape_overflow_by_bits": Broken(one(shape=[2**60]), ("'x'", "2^63")),
    "shape_overflow_to_zero": Broken(one(shape=[2**32, 2**32, 2**32]), ("'x'", "2^63")),
    "shape_zero_hides": Broken(
        packed({"x": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, 0), ("'x'", "2^63"), True
    ),
    "shape_too_long": Broken(
        packed({"x": entry(shape=[1] * 65, offsets=[0, 4])}, 4), ("'x'", "65 numbers", "64"), True
    ),
    # offsets
    "offsets_one": Broken(one(data_offsets=[8]), ("'x'", "two integers")),
    "offsets_three": Broken(one(data_offsets=[0, 8, 8]), ("'x'", "two integers")),
    "offsets_string": Broken(one(data_offsets="08"), ("'x'", "data_offsets is '08'")),
    "offsets_float": Broken(one(data_offsets=[0, 8.0]), ("'x'", "data_offsets is [0, 8.0]")),
    "offsets_boolean": Broken(one(data_offsets=[False, 8]), ("'x'", "data_offsets is [False, 8]")),
    "offsets_negative": Broken(one(data_offsets=[-8, 0]), ("'x'", "data_offsets is [-8, 0]")),
    "offsets_reversed": Broken(one(data_offsets=[8, 0]), ("'x'", "above the second")),
    "offsets_short": Broken(one(data_offsets=[0, 7]), ("'x'", "hold 7 bytes", "expected 8")),
    "offsets_long": Broken(packed({"x": entry(offsets=[0, 12])}, 12), ("'x'", "hold 12 bytes", "expected 8")),
    "offsets_far_away": Broken(one(data_offsets=[2**62, 2**62 + 8]), ("'x'", "a hole")),
    "sub_byte_fraction": Broken(
        packed({"x": entry("F4", [3], [0, 2])}, 2), ("'x'", "12 bits", "whole bytes")
    ),
    "sub_byte_length": Broken(
        packed({"x": entry("F6_E2M3", [4], [0, 4])}, 4), ("hold 4 bytes", "expected 3")
    ),
    # cover
    "starts_late": Broken(packed({"x": entry(offsets=[4, 12])}, 12), ("'x'", "4 bytes after the first data")),
    "hole": Broken(
        packed({"x": entry(), "y": entry(offsets=[12, 20])}, 20), ("'y'", "hole", "4 bytes after", "'x'")
    ),
    "overlap": Broken(
        packed({"x": entry(), "y": entry(offsets=[4, 12])}, 12), ("'y'", "overlap", "4 bytes before", "'x'")
    ),
    "same_place": Broken(packed({"x": entry(), "y": entry()}), ("'y'", "overlap", "'x'")),
    "inside": Broken(
        packed({"x": entry(), "y": entry(shape=[1], offsets=[2, 6])}), ("'y'", "overlap", "'x'")
    ),
    "empty_inside": Broken(
        packed({"x": entry(), "y": entry(shape=[0], offsets=[4, 4])}), ("'y'", "overlap", "'x'")
    ),
    "empty_beyond": Broken(packed({"x": entry(), "y": entry(shape=[0], offsets=[12, 12])}), ("'y'", "hole")),
    "cut": Broken(packed({"x": entry()}, 3), ("5 bytes are missing", "'x'", "was cut")),
    "cut_to_header": Broken(packed({"x": entry()}, 0), ("8 bytes are missing",)),
    "longer": Broken(packed({"x": entry()}, 11), ("3 bytes follow",)),
    "bytes_without_tensors": Broken(packed({}, 5), ("5 bytes follow",)),
    # metadata
    "metadata_list": Broken(packed({"__metadata__": ["pt"], "x": entry()}), ("__metadata__", "an object")),
    "metadata_null": Broken(
        packed({"__metadata__": None, "x": entry()}), ("__metadata__", "an object"), True
    ),
    "metadata_number": Broken(packed({"__metadata__": {"a": 1}, "x": entry()}), ("['a'] is 1",)),
    "metadata_object": Broken(packed({"__metadata__": {"a": {}}, "x": entry()}), ("['a'] is an object",)),
    "metadata_tensor": Broken(packed({"__metadata__": entry()}), ("__metadata__['shape'] is a list",)),
    "metadata_twice": Broken(
        packed(b'{"__metadata__":{},"__metadata__":{},"x":{' + GOOD + b"}}"), ("'__metadata__'", "twice")
    ),
    "metadata_key_twice": Broken(
        packed(b'{"__metadata__":{"a":"1","a":"2"},"x":{' + GOOD + b"}}"), ("'a'", "twice"), True
    ),
    "metadata_not_utf8": Broken(
        packed(b'{"__metadata__":{"a":"\xff"},"x":{' + GOOD + b"}}"), ("not UTF-8 at byte 30",)
    ),
    "metadata_surrogate": Broken(
        packed(b'{"__metadata__":{"a":"\\udfff"},"x":{' + GOOD + b"}}"), ("surrogate",)
    ),
    "metadata_cut": Broken(packed(b'{"__metadata__":{"a":"b"', pad=1), ("header's end",)),
    "metadata_long_string": Broken(
        packed({"__metadata__": {"a": "b" * (2**20 + 1)}, "x": entry()}), ("at most 1048576 bytes",), True
    ),
    "metadata_too_many": Broken(
        packed({"__metadata__": {f"{k:x}": "" for k in range(20000)}, "x": entry()}), ("10000",), True
    ),
}
"""Every way for a header to be wrong, by name."""
