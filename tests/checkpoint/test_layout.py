"""Layouts: what the safetensors library makes of them, where shards are cut, what is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from tvfast import dtypes
from tvfast.checkpoint.layout import MAX_HEADER_BYTES, PAGE, Layout, make_layout
from tvfast.errors import ArgumentError, CheckpointError

NUMPY_TYPES = ("F32", "F16", "F64", "U8", "I8", "I16", "I32", "I64", "BOOL", "U16", "U32", "U64")
PACKED_TYPES = ("BF16", "F8_E4M3", "F8_E5M2", "F4")

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda s: s != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def descriptions(draw: st.DrawFn, types: tuple[str, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    found = []
    for name in draw(st.lists(names, unique=True, max_size=12)):
        dtype, shape = draw(st.sampled_from(types)), draw(shapes)
        found.append((name, dtype, (*shape, 2) if dtype == "F4" else shape))
    return found


def contents(layout: Layout) -> list[bytes]:
    """Files whose data bytes count up, so that a tensor in the wrong place shows."""
    files = []
    for shard in layout.shards:
        n_data = shard.n_bytes - len(shard.header)
        files.append(shard.header + bytes(i % 2 for i in range(n_data)))
    return files


def header_of(layout: Layout, shard: int) -> dict[str, Any]:
    raw = layout.shards[shard].header
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    return json.loads(raw[8:])


@given(tensors=descriptions(NUMPY_TYPES), shard_bytes=st.integers(1, 200), note=st.text(max_size=5))
def test_safetensors_loads_every_file(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Any], shard_bytes: int, note: str
) -> None:
    note = note.encode(errors="replace").decode()
    layout = make_layout(tensors, shard_bytes, {"note": note})
    folder = tmp_path_factory.mktemp("layout")
    found: dict[str, int] = {}
    for number, (shard, content) in enumerate(zip(layout.shards, contents(layout), strict=True)):
        path = folder / shard.name
        path.write_bytes(content)
        assert path.stat().st_size == shard.n_bytes
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt", "note": note}
        for name, array in load_file(path).items():
            place = layout.places[name]
            assert array.tobytes() == content[place.offset : place.offset + place.n_bytes]
            found[name] = number
    assert found == {name: place.shard for name, place in layout.places.items()}
    assert set(found) == {name for name, _, _ in tensors}


@given(tensors=descriptions(PACKED_TYPES), shard_bytes=st.integers(1, 40))
def test_packed_types_are_accepted(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Any], shard_bytes: int
) -> None:
    layout = make_layout(tensors, shard_bytes, {})
    path = tmp_path_factory.mktemp("layout") / "model.safetensors"
    for content in contents(layout):
        path.write_bytes(content)
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                dtype, shape = next((d, s) for n, d, s in tensors if n == name)
                assert file.get_slice(name).get_dtype() == dtype
                assert tuple(file.get_slice(name).get_shape()) == shape


@given(tensors=descriptions(NUMPY_TYPES + PACKED_TYPES), shard_bytes=st.integers(1, 200))
def test_tensors_keep_their_order_without_holes(tensors: list[Any], shard_bytes: int) -> None:
    layout = make_layout(tensors, shard_bytes, {})
    assert list(layout.places) == [name for name, _, _ in tensors]
    ends = [len(shard.header) for shard in layout.shards]
    assert all(end % PAGE == 0 for end in ends)
    last = 0
    for (name, dtype, shape), place in zip(tensors, layout.places.values(), strict=True):
        assert place.shard in (last, last + 1)
        last = place.shard
        assert (place.offset, place.n_bytes) == (ends[last], dtypes.n_bytes(dtype, math.prod(shape)))
        ends[last] += place.n_bytes
        entry = header_of(layout, last)[name]
        start = place.offset - len(layout.shards[last].header)
        assert entry == {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, start + place.n_bytes],
        }
    assert ends == [shard.n_bytes for shard in layout.shards]
    assert layout.n_bytes == sum(ends)


@given(tensors=descriptions(NUMPY_TYPES), shard_bytes=st.integers(1, 200))
def test_shards_are_as_full_as_they_may_be(tensors: list[Any], shard_bytes: int) -> None:
    layout = make_layout(tensors, shard_bytes, {})
    sizes: list[list[int]] = [[] for _ in layout.shards]
    for place in layout.places.values():
        sizes[place.shard].append(place.n_bytes)
    assert all(sum(shard) <= shard_bytes or len([n for n in shard if n]) == 1 for shard in sizes)
    for shard, after in itertools.pairwise(sizes):
        assert sum(shard) + after[0] > shard_bytes
    assert make_layout(tensors, shard_bytes, {}) == layout


def test_shards_are_cut_as_transformers_cuts() -> None:
    tensors = [
        (name, "U8", (n,)) for name, n in [("d", 4), ("c", 6), ("a", 11), ("b", 1), ("e", 9), ("f", 1)]
    ]
    layout = make_layout(tensors, 10, {})
    assert [place.shard for place in layout.places.values()] == [0, 0, 1, 2, 2, 3]
    assert [shard.name for shard in layout.shards] == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    assert layout.index is not None
    assert (
        layout.index.decode()
        == json.dumps(
            {
                "metadata": {"total_size": 32},
                "weight_map": {
                    "a": "model-00002-of-00004.safetensors",
                    "b": "model-00003-of-00004.safetensors",
                    "c": "model-00001-of-00004.safetensors",
                    "d": "model-00001-of-00004.safetensors",
                    "e": "model-00003-of-00004.safetensors",
                    "f": "model-00004-of-00004.safetensors",
                },
            },
            indent=2,
        )
        + "\n"
    )


def test_one_shard_has_no_index() -> None:
    layout = make_layout([("w", "BF16", (3, 5))], 30, {})
    assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    assert layout.index is None


def test_no_tensors_make_one_loadable_file(tmp_path: Path) -> None:
    layout = make_layout([], 10, {})
    path = tmp_path / layout.shards[0].name
    path.write_bytes(layout.shards[0].header)
    assert path.stat().st_size == layout.n_bytes == PAGE
    assert load_file(path) == {}


def test_sizes_beyond_32_bits() -> None:
    rows = 2**31 + 7
    layout = make_layout([("a", "U8", (3,)), ("big", "BF16", (rows, 3)), ("z", "F32", ())], 2**50, {})
    assert layout.places["big"].n_bytes == 6 * rows
    assert layout.places["z"].offset == PAGE + 3 + 6 * rows
    assert layout.n_bytes == PAGE + 3 + 6 * rows + 4
    assert header_of(layout, 0)["z"]["data_offsets"] == [3 + 6 * rows, 7 + 6 * rows]


def test_metadata_order_does_not_matter() -> None:
    one = make_layout([("w", "F32", (1,))], 10, {"a": "1", "z": "2"})
    assert one == make_layout([("w", "F32", (1,))], 10, {"z": "2", "a": "1"})


def test_a_header_that_no_reader_accepts_is_refused() -> None:
    # The longest text whose padded header still fits, and one byte more.
    room = (MAX_HEADER_BYTES + 8) // PAGE * PAGE - 8
    text = len(json.dumps({"__metadata__": {"format": "pt", "x": ""}}, separators=(",", ":")))
    assert len(make_layout([], 10, {"x": "y" * (room - text)}).shards[0].header) == room + 8
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the header .* accept 100000000"):
        make_layout([], 10, {"x": "y" * (room - text + 1)})


@pytest.mark.parametrize(
    ("tensors", "shard_bytes", "metadata", "message"),
    [
        ([("w", "F32", (1,)), ("w", "F32", (1,))], 9, {}, "'w' occurs twice"),
        ([("__metadata__", "F32", (1,))], 9, {}, "reserves"),
        ([("w", "F31", (1,))], 9, {}, "'F31'.*F32"),
        ([("w", "F32", (2, -1))], 9, {}, r"\[2, -1\]"),
        ([("w", "F4", (3,))], 9, {}, "whole bytes"),
        ([("w", "F32", (1,))], 0, {}, "shard_bytes is 0"),
        ([("w", "F32", (1,))], 9, {"n": 3}, "'n': 3"),
        ([("w\ud800", "F32", (1,))], 9, {}, r"ud800.*UTF-8"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    tensors: list[Any], shard_bytes: int, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_layout(tensors, shard_bytes, metadata)
