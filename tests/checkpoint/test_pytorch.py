"""PyTorch files: the same bytes that torch loads, and a named error for anything else."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus.archives import (
    BROKEN,
    GOOD,
    Broken,
    Call,
    pickled,
    saved,
    storage,
    tensor,
    torch_saved,
    wide_end,
    zipped,
)
from tvfast.checkpoint import unpickling
from tvfast.checkpoint.pytorch import read_pytorch
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.checkpoint.unpickling import load_pickle
from tvfast.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def of_bytes(dtype: torch.dtype, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """A tensor whose bytes count up."""
    n = torch.zeros(shape, dtype=torch.uint8).numel() * dtype.itemsize
    raw = torch.tensor(
        [(first + k) % (2 if dtype == torch.bool else 251) for k in range(n)], dtype=torch.uint8
    )
    return raw.view(dtype).reshape(shape)


def content(found: torch.Tensor) -> bytes:
    return bytes(found.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if found.numel() else b""


def stored_content(found: Stored) -> bytes:
    with open(found.path, "rb") as file:
        file.seek(found.offset)
        return file.read(found.n_bytes)


def opened(path: Path, raw: bytes) -> Checkpoint:
    path.write_bytes(raw)
    return open_checkpoint(path)


def check_same(found: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        stored = found.tensors[name]
        assert stored.name == name
        assert DTYPES[stored.dtype] == expected.dtype
        assert stored.shape == tuple(expected.shape)
        assert stored.n_bytes == expected.numel() * expected.itemsize
        assert stored_content(stored) == content(expected)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_every_defect_is_named(tmp_path: Path, broken: Broken) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(broken.make())
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.process_time() - started < 20
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert [part for part in broken.says if part not in message] == []
    assert len(message) < 1200
    assert message.isprintable()


@pytest.mark.parametrize("name", [name for name in BROKEN if name.startswith("bomb")])
def test_bombs_take_bounded_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling.Machine, "most_opcodes", 300_000)  # tracing takes ten times as long
    path = tmp_path / "x.bin"
    raw = BROKEN[name].make()
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with suppress(CheckpointError):
            read_pytorch(str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + len(raw) + 80 * 300_000


def test_no_code_runs(tmp_path: Path) -> None:
    """The file that a class may have a shell write is not there."""
    target = tmp_path / "written"
    raw = saved(b"cos\nsystem\n(U" + bytes([len(f"touch {target}")]) + f"touch {target}".encode() + b"tR.")
    with pytest.raises(CheckpointError, match=r"asks to run 'os\.system'"):
        opened(tmp_path / "x.bin", raw)
    assert not target.exists()


def test_the_corpus_is_wrong_in_one_place_only(tmp_path: Path) -> None:
    (found,) = opened(tmp_path / "x.bin", GOOD).tensors.values()
    assert (found.name, found.dtype, found.shape, found.n_bytes) == ("w", "F32", (2,), 8)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_torch_files_of_every_dtype(tmp_path: Path, dtype: torch.dtype, protocol: int) -> None:
    tensors = {
        "a.weight": of_bytes(dtype, (2, 3, 5)),
        "a.bias": of_bytes(dtype, (3,), 7),
        "zero_dimensional": of_bytes(dtype, (), 3),
        "empty": of_bytes(dtype, (0, 4)),
        "naïve ☃ 😀": of_bytes(dtype, (1, 1)),
    }
    check_same(opened(tmp_path / "x.pt", torch_saved(tensors, pickle_protocol=protocol)), tensors)


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6)
dtypes = st.sampled_from(sorted(DTYPES))
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@given(
    described=st.dictionaries(names, st.tuples(dtypes, shapes), min_size=1, max_size=6), wrapped=st.booleans()
)
def test_torch_files(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[str, tuple[int, ...]]], wrapped: bool
) -> None:
    tensors = {name: of_bytes(DTYPES[dtype], shape) for name, (dtype, shape) in described.items()}
    raw = torch_saved({"model": tensors} if wrapped else tensors)
    check_same(opened(tmp_path_factory.getbasetemp() / "x.pth", raw), tensors)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    memory = torch.arange(12, dtype=torch.float32)
    tensors = {
        "first": memory.view(3, 4),
        "again": memory.view(3, 4),
        "flat": memory,
        "row": memory.view(3, 4)[1],
        "again_row": memory[4:8],
        "column_of_one": memory.view(3, 4)[1:2, 2:3],
        "nothing": memory[12:],
        "nothing_again": memory[12:],
        "equal": torch.arange(12, dtype=torch.float32).view(3, 4),
    }
    found = opened(tmp_path / "x.bin", torch_saved(tensors))
    check_same(found, tensors)
    assert found.aliases == {"again": "first", "again_row": "row"}
    assert found.tensors["row"].offset == found.tensors["flat"].offset + 16
    offsets = [(t.offset, t.n_bytes) for t in found.tensors.values()]
    assert offsets == sorted(offsets)


def test_modules_parameters_and_attributes(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict(keep_vars=True)
    assert hasattr(state, "_metadata")
    check_same(opened(tmp_path / "x.bin", torch_saved(state)), dict(state))
    check_same(
        opened(tmp_path / "x.bin", torch_saved(collections.OrderedDict(state_dict=state))), dict(state)
    )
    marked = torch.zeros(3)
    marked.partition_dim = 1  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "sharded"  # type: ignore[attr-defined]
    tensors = {"marked": marked, "parameter": parameter}
    check_same(opened(tmp_path / "x.bin", torch_saved(tensors)), tensors)


def test_strides_that_say_nothing(tmp_path: Path) -> None:
    """Along one element any stride is contiguous."""
    raw = saved(
        {"a": tensor((1, 2, 1), (77, 1, 0)), "b": tensor((0, 5), (3, 9)), "c": tensor((), (), first=1)}
    )
    found = opened(tmp_path / "x.bin", raw)
    assert {name: (t.shape, t.n_bytes) for name, t in found.tensors.items()} == {
        "a": ((1, 2, 1), 8),
        "b": ((0, 5), 0),
        "c": ((), 4),
    }


def test_files_without_checksums_or_byte_order(tmp_path: Path) -> None:
    """torch can leave both out: in older versions, or to save time."""
    tensors = {"a": torch.ones(4)}
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        raw = torch_saved(tensors)
    finally:
        torch.serialization.set_crc32_options(before)
    check_same(opened(tmp_path / "x.bin", raw), tensors)
    raw = zipped({"x/data.pkl": pickled({"w": tensor()}), "x/data/0": b"\0\0\x80\x3f" * 2})
    check_same(opened(tmp_path / "y.bin", raw), {"w": torch.ones(2)})


def test_more_than_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets of 64 bits; the file is sparse, as torch leaves out the data."""
    n = 2**32 + 16
    large = torch.tensor([], dtype=torch.uint8).set_(torch.UntypedStorage(n), 0, (n,), (1,))
    small = {f"small{k}": torch.zeros(3) for k in range(3)}
    path = tmp_path / "x.bin"
    with torch.serialization.skip_data():
        torch.save({"large": large, **small}, path)
    assert path.stat().st_size > n
    with path.open("r+b") as file:
        found = open_checkpoint(path)
        for k in range(3):
            stored = found.tensors[f"small{k}"]
            assert stored.offset > n
            file.seek(stored.offset)
            file.write(bytes([k]) * stored.n_bytes)
    assert found.tensors["large"].n_bytes == n
    loaded: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    assert [content(loaded[f"small{k}"]) for k in range(3)] == [bytes([k]) * 12 for k in range(3)]


def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    empty = {f"x/data/{k}": b"" for k in range(1, 2**16)}
    raw = zipped({"x/data.pkl": pickled({"w": tensor()}), **empty, "x/data/0": b"\0\0\x80\x3f" * 2})
    check_same(opened(tmp_path / "x.bin", raw), {"w": torch.ones(2)})


def test_an_end_record_of_64_bits(tmp_path: Path) -> None:
    assert list(opened(tmp_path / "x.bin", wide_end(GOOD)).tensors) == ["w"]


def test_shapes_that_are_torch_sizes(tmp_path: Path) -> None:
    shape = Call(torch.Size, ((1, 2),))
    raw = saved({"w": tensor(shape, Call(torch.Size, ((2, 1),)))})
    assert opened(tmp_path / "x.bin", raw).tensors["w"].shape == (1, 2)


def test_identity_follows_the_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    first = opened(path, torch_saved({"a": torch.zeros(3)})).identity()
    second = opened(path, torch_saved({"b": torch.zeros(3)})).identity()
    assert first[0]["name"] == second[0]["name"] == "x.bin"
    assert first[0]["crc32"] != second[0]["crc32"]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="named pipe"):
        open_checkpoint(tmp_path / "x.bin")


def test_pickles_of_other_things_are_data() -> None:
    value = {"a": [1, -1, 2**40, 1.5, None, True, "x", b"y", (1, (2,))], "b": {"c": ()}, 3: set()}
    for protocol in (3, 4, 5):
        found = load_pickle(pickled(value, protocol) if protocol != 3 else pickled({**value, 3: 0}, 3), "x")
        assert found == {**value, 3: 0 if protocol == 3 else []}
    assert load_pickle(pickled(storage()), "x").n_items == 2


def test_no_torch_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(torch_saved({"a": torch.zeros(3)}))
    code = (
        "import sys; from tvfast.checkpoint.reading import open_checkpoint; "
        f"found = open_checkpoint({str(path)!r}); "
        "print(list(found.tensors), [name for name in ('torch', 'numpy', 'pickle') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['a'] []"
