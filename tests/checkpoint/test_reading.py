"""Whole checkpoints: which files are taken, what they add up to, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.corpus.archives import GOOD as PYTORCH
from tests.corpus.archives import torch_saved
from tests.corpus.directories import (
    BROKEN,
    FIRST,
    GOOD,
    INDEX,
    SECOND,
    SHARDS,
    Broken,
    file_of,
    index_of,
    write,
)
from tests.corpus.headers import entry, packed
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.errors import CheckpointError


def message_of(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert len(message) < 1200
    assert message.isprintable()
    return message


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_every_defect_is_named(tmp_path: Path, broken: Broken) -> None:
    broken.make(tmp_path)
    message = message_of(tmp_path)
    assert message.startswith(f"{tmp_path / broken.names}: ")
    assert [part for part in broken.says if part not in message] == []


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    found = open_checkpoint(str(tmp_path))
    assert found.path == str(tmp_path)
    assert found.directory == str(tmp_path)
    assert found.files == (str(tmp_path / FIRST), str(tmp_path / SECOND))
    assert list(found.tensors) == ["a", "b", "c"]
    assert [t.path for t in found.tensors.values()] == [found.files[0], found.files[0], found.files[1]]
    assert found.tensors["b"].offset == len(SHARDS[FIRST]) - 8
    assert found.config == {"model_type": "llama"}
    assert found.aliases == {}


def test_order_is_that_of_files_and_offsets(tmp_path: Path) -> None:
    names = {"b.safetensors": ("z", "y"), "a.safetensors": ("x", "w"), "c.safetensors": ("a",)}
    write(tmp_path, {file: file_of(*tensors) for file, tensors in names.items()})
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["x", "w", "z", "y", "a"]
    assert [os.path.basename(file) for file in found.files] == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]


BIN = {"pytorch_model.bin": PYTORCH}
BIN_INDEX = {
    "pytorch_model.bin.index.json": index_of({"w": "pytorch_model-1.bin"}),
    "pytorch_model-1.bin": PYTORCH,
}
ONE = {"model.safetensors": file_of("one")}
OTHER = {"other.safetensors": file_of("other")}
SHARDED = {INDEX: GOOD[INDEX], **SHARDS}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (ONE | SHARDED | BIN | BIN_INDEX | OTHER, ["one"]),
        (SHARDED | BIN | BIN_INDEX | OTHER, ["a", "b", "c"]),
        (BIN | BIN_INDEX | OTHER, ["w"]),
        (BIN_INDEX | OTHER, ["w"]),
        (OTHER, ["other"]),
        (SHARDS, ["a", "b", "c"]),
        (SHARDS | {"adapter_model.safetensors": file_of("lora")}, ["a", "b", "c"]),
        (ONE | {INDEX: b"broken"}, ["one"]),
        (ONE | {"model.safetensors.part": b"", "optimizer.pt": b"junk"}, ["one"]),
    ],
)
def test_which_files_of_a_directory_are_taken(
    tmp_path: Path, files: dict[str, bytes], expected: list[str]
) -> None:
    write(tmp_path, files)
    assert list(open_checkpoint(tmp_path).tensors) == expected


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
def test_one_file(tmp_path: Path, name: str) -> None:
    content = file_of("w") if name == "x.safetensors" else PYTORCH
    write(tmp_path, {name: content, "config.json": b'{"of": "another model"}'})
    found = open_checkpoint(tmp_path / name)
    assert found.path == str(tmp_path / name)
    assert found.files == (str(tmp_path / name),)
    assert list(found.tensors) == ["w"]
    assert (found.directory, found.config) == (None, None)
    assert found.identity()[0]["name"] == name


def test_an_index_is_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    assert list(open_checkpoint(tmp_path / INDEX).tensors) == ["a", "b", "c"]
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(INDEX).directory == "."
    assert list(open_checkpoint(".").tensors) == ["a", "b", "c"]


def test_shards_in_a_folder_and_behind_links(tmp_path: Path) -> None:
    """As the Hugging Face cache keeps them: links to blobs elsewhere."""
    write(tmp_path / "blobs", {"1": SHARDS[FIRST], "2": SHARDS[SECOND]})
    write(
        tmp_path / "model",
        {INDEX: index_of({"a": "sub/1.safetensors", "b": "sub/1.safetensors", "c": SECOND})},
    )
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / "sub" / "1.safetensors").symlink_to("../../blobs/1")
    (tmp_path / "model" / SECOND).symlink_to("../blobs/2")
    found = open_checkpoint(tmp_path / "model")
    assert found.tensors["c"].path == str(tmp_path / "model" / SECOND)
    assert [one["name"] for one in found.identity()] == [SECOND, "sub/1.safetensors"]


def test_a_linked_directory(tmp_path: Path) -> None:
    write(tmp_path / "model", GOOD)
    (tmp_path / "link").symlink_to("model")
    assert open_checkpoint(tmp_path / "link").files[0] == str(tmp_path / "link" / FIRST)


def test_config_may_hold_what_transformers_writes(tmp_path: Path) -> None:
    write(tmp_path, ONE | {"config.json": b'{"time_step_limit": [0.0, Infinity], "a": NaN}'})
    assert (open_checkpoint(tmp_path).config or {})["time_step_limit"] == [0.0, float("inf")]
    (tmp_path / "config.json").unlink()
    assert open_checkpoint(tmp_path).config is None


def test_identity_tells_changes(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    before = open_checkpoint(tmp_path)
    first = before.identity()
    status = (tmp_path / FIRST).stat()
    assert first[0] == {
        "name": FIRST,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "crc32": zlib.crc32(SHARDS[FIRST][:-16]),
    }
    assert json.loads(json.dumps(first)) == first
    write(tmp_path, {SECOND: packed({"c": entry("I32")})})
    os.utime(tmp_path / SECOND, ns=(0, first[1]["mtime_ns"]))
    after = open_checkpoint(tmp_path).identity()
    assert before.identity() == first
    assert after[0] == first[0]
    assert {key for key in after[1] if after[1][key] != first[1][key]} == {"crc32"}
    os.utime(tmp_path / SECOND, ns=(0, 1))
    assert open_checkpoint(tmp_path).identity()[1]["mtime_ns"] == 1


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"llama-base/model.safetensors": file_of("a")})
    message = message_of(tmp_path / "lama-base")
    assert message.startswith(f"{tmp_path / 'lama-base'}: no such file or directory")
    assert f"Did you mean '{tmp_path / 'llama-base'}'?" in message
    monkeypatch.chdir(tmp_path)
    assert "Did you mean 'llama-base'?" in message_of("llama-bas/")
    assert "Check the path." in message_of(tmp_path / "no" / "such" / "folder")
    assert "is no path" in message_of("")
    assert "is no path" in message_of("a\0b")
    assert "no such file" in message_of("n" * 300)  # longer than a name can be
    write(tmp_path, {"notes.txt": b""})
    assert "no known suffix" in message_of("notes.txt")
    os.mkfifo("pipe")
    assert "no known suffix" in message_of("pipe")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of hub models, and an empty working directory."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "hub"


def cache(
    hub: Path, *, repository: str = "models--org--name", commit: str = "c0ffee", ref: str = "main"
) -> None:
    write(
        hub / repository,
        {f"refs/{ref}": commit.encode(), f"snapshots/{commit}/model.safetensors": file_of(commit)},
    )


def test_hub_models_are_found_in_the_cache(hub: Path) -> None:
    cache(hub)
    cache(hub, commit="abcdef", ref="refs/pr/1")
    cache(hub, repository="models--gpt2", commit="123")
    found = open_checkpoint("org/name")
    assert found.path == "org/name"
    assert found.directory == str(hub / "models--org--name" / "snapshots" / "c0ffee")
    assert list(found.tensors) == ["c0ffee"]
    assert list(open_checkpoint("org/name@main").tensors) == ["c0ffee"]
    assert list(open_checkpoint("org/name@abcdef").tensors) == ["abcdef"]
    assert list(open_checkpoint("org/name@refs/pr/1").tensors) == ["abcdef"]
    assert list(open_checkpoint("gpt2").tensors) == ["123"]


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HOME", ".cache/huggingface/hub"),
    ],
)
def test_where_the_cache_may_be(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    cache(tmp_path / "elsewhere" / below)
    assert list(open_checkpoint("org/name").tensors) == ["c0ffee"]


def test_a_directory_comes_before_the_cache(hub: Path) -> None:
    cache(hub)
    write(Path("org/name"), ONE)
    assert list(open_checkpoint("org/name").tensors) == ["one"]


@pytest.mark.parametrize(
    "path", ["org/other", "org/name@other", "org/name@../../x", "org/..", "org/name/more", "org/name@"]
)
def test_what_is_not_in_the_cache_must_be_downloaded(hub: Path, path: str) -> None:
    cache(hub, ref="v1")
    write(hub / "models--org--..", {"snapshots/x/model.safetensors": file_of("a"), "refs/main": b"x"})
    message = message_of(path)
    assert message.startswith(f"{path}: no such file or directory")
    assert ("download it first" in message) == (path.count("/") == 1 or "@" in path)


def test_a_cache_entry_that_points_outside_is_not_followed(hub: Path) -> None:
    write(hub / "models--org--name", {"refs/main": b"../../x\n", "snapshots/a/b": b""})
    write(hub / "x", ONE)
    assert "download it first" in message_of("org/name")


def test_an_unfinished_download_is_named(hub: Path) -> None:
    cache(hub)
    (hub / "models--org--name/snapshots/c0ffee/model.safetensors").unlink()
    assert "holds nothing" in message_of("org/name")


ARRAYS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
tensors = st.tuples(st.sampled_from(sorted(ARRAYS)), st.lists(st.integers(0, 4), max_size=4).map(tuple))


def array(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    n = int(np.prod(shape)) * np.dtype(ARRAYS[dtype]).itemsize
    return np.arange(n, dtype=np.uint8).view(ARRAYS[dtype]).reshape(shape)


def content(found: Checkpoint, name: str) -> bytes:
    stored = found.tensors[name]
    with open(stored.path, "rb") as file:
        file.seek(stored.offset)
        return file.read(stored.n_bytes)


@given(
    described=st.dictionaries(
        names.filter(lambda name: name != "__metadata__"), tensors, min_size=1, max_size=8
    ),
    n_shards=st.integers(1, 3),
)
def test_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], n_shards: int
) -> None:
    root = tmp_path_factory.mktemp("model")
    weight_map = {name: f"{k % n_shards}.safetensors" for k, name in enumerate(described)}
    for file in set(weight_map.values()):
        arrays = {name: array(*described[name]) for name in described if weight_map[name] == file}
        save_file(arrays, root / file, {"format": "np"})
    (root / INDEX).write_bytes(index_of(weight_map))
    found = open_checkpoint(root)
    assert {name: (t.dtype, t.shape) for name, t in found.tensors.items()} == described
    assert {name: os.path.basename(t.path) for name, t in found.tensors.items()} == weight_map
    for name in described:
        assert content(found, name) == array(*described[name]).tobytes()


def test_sharded_pytorch_files(tmp_path: Path) -> None:
    shared = torch.ones(3)
    write(
        tmp_path,
        {
            "pytorch_model-1.bin": torch_saved({"b": shared, "a": torch.zeros(2), "tied": shared}),
            "pytorch_model-2.bin": torch_saved({"c": torch.full((2,), 2.0)}),
            "pytorch_model.bin.index.json": index_of(
                dict.fromkeys(("a", "b", "tied"), "pytorch_model-1.bin") | {"c": "pytorch_model-2.bin"}
            ),
        },
    )
    found = open_checkpoint(tmp_path)
    assert found.tensors.keys() == {"a", "b", "c", "tied"}
    assert found.aliases == {"tied": "b"}
    assert content(found, "c") == torch.full((2,), 2.0).numpy().tobytes()
    assert [os.path.basename(file) for file in found.files] == ["pytorch_model-1.bin", "pytorch_model-2.bin"]


def test_a_model_of_70_billion_opens_in_no_time(tmp_path: Path) -> None:
    """723 tensors in 30 sparse shards."""
    all_names = [f"model.layers.{layer}.{k}.weight" for layer in range(80) for k in range(9)] + [
        "x",
        "y",
        "z",
    ]
    weight_map = {}
    for k in range(30):
        file, n, described = f"model-{k + 1:05d}-of-00030.safetensors", 0, {}
        for name in all_names[k::30]:
            described[name] = entry("BF16", [28672, 8192], [n, n + 2 * 28672 * 8192])
            weight_map[name] = file
            n += 2 * 28672 * 8192
        (tmp_path / file).write_bytes(packed(described, 0))
        os.truncate(tmp_path / file, (tmp_path / file).stat().st_size + n)
    (tmp_path / INDEX).write_bytes(index_of(weight_map))
    spent = []
    for _ in range(5):
        started = time.perf_counter()
        found = open_checkpoint(tmp_path)
        spent.append(time.perf_counter() - started)
    assert len(found.tensors) == 723
    assert min(spent) < 0.1


def test_opening_leaves_no_file_open(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    n_open = len(os.listdir("/proc/self/fd"))
    open_checkpoint(tmp_path)
    write(tmp_path, {SECOND: b"broken"})
    message_of(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_a_directory_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    write(tmp_path, GOOD)
    monkeypatch.setattr(os, "listdir", refuse)
    assert message_of(tmp_path).startswith(f"{tmp_path}: cannot be read: Permission denied")


def test_home_is_expanded_and_a_local_path_has_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "model", ONE)
    write(tmp_path / "model@v2", {**ONE, "two": ONE["one"]} if "one" in ONE else ONE)
    for path in ("~/model", f"{tmp_path}/model@main", "~/model@main"):
        found = open_checkpoint(path)
        assert found.path == path
        assert found.directory == str(tmp_path / "model")
    assert open_checkpoint(f"{tmp_path}/model@v2").directory == str(tmp_path / "model@v2")
