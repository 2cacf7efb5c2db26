"""Broken checkpoint directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.corpus.archives import GOOD as PYTORCH
from tests.corpus.headers import entry, packed

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def file_of(*names: str) -> bytes:
    """A safetensors file with tensors of these names, 8 bytes each."""
    return packed(
        {name: entry(offsets=[8 * k, 8 * k + 8]) for k, name in enumerate(names)},
        8 * len(names),
    )


def index_of(weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}).encode()


SHARDS = {FIRST: file_of("a", "b"), SECOND: file_of("c")}
MAP = {"a": FIRST, "b": FIRST, "c": SECOND}
GOOD = {**SHARDS, INDEX: index_of(MAP), "config.json": b'{"model_type": "llama"}'}


def write(root: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass(frozen=True)
class Broken:
    """A directory with one defect, the file that the error names (none: the directory) and what it says."""

    make: Callable[[Path], None]
    names: str
    says: tuple[str, ...]


def _files(files: Mapping[str, bytes], names: str, *says: str) -> Broken:
    return Broken(lambda root: write(root, files), names, says)


def _index(content: bytes, *says: str) -> Broken:
    return _files({**SHARDS, INDEX: content}, INDEX, *says)


def _map(weight_map: object, *says: str, **files: bytes) -> Broken:
    return _files({**SHARDS, INDEX: index_of(weight_map), **files}, INDEX, *says)


def _config(content: bytes, *says: str) -> Broken:
    return _files({**GOOD, "config.json": content}, "config.json", *says)


def _linked(name: str, target: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        write(root, {key: content for key, content in GOOD.items() if key != name})
        (root / name).symlink_to(root / target)

    return make


def _special(name: str, make: Callable[[str], Any]) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        write(root, {key: content for key, content in GOOD.items() if key != name})
        make(str(root / name))

    return build


BROKEN: dict[str, Broken] = {
    # what lies there
    "empty": _files({}, "", "holds nothing", "expected model.safetensors"),
    "unrelated": _files({"notes.txt": b"", "x.gguf": b""}, "", "no weights but 'notes.txt', 'x.gguf'"),
    "only_companions": _files({"config.json": b"{}", "tokenizer.json": b"{}"}, "", "no weights", "download"),
    "hidden_files": _files({".a.safetensors": file_of("a")}, "", "no weights but '.a.safetensors'"),
    "adapter": _files({"adapter_model.safetensors": file_of("a")}, "", "PEFT adapter"),
    "adapter_bin": _files({"adapter_model.bin": b"", "adapter_config.json": b"{}"}, "", "PEFT adapter"),
    "first_shard_missing": _files({SECOND: SHARDS[SECOND]}, "", "1 of 2 shards are missing", FIRST),
    "last_shard_missing": _files({FIRST: SHARDS[FIRST]}, "", "1 of 2 shards are missing", SECOND),
    "most_shards_missing": _files(
        {"m-3-of-999999999.safetensors": file_of("a")}, "", "999999998 of 999999999", "m-000000001-of-"
    ),
    "same_tensor_twice": _files(
        {"one.safetensors": file_of("a"), "two.safetensors": file_of("b", "a")},
        *("two.safetensors", "'a' is in", "one.safetensors"),
    ),
    "nothing_in_it": _files({"model.safetensors": packed({}, 0)}, "", "holds no tensor"),
    # the index
    "index_empty": _index(b"", "not JSON"),
    "index_text": _index(b"hello", "not JSON", "Expecting value"),
    "index_not_utf8": _index(b'{"weight_map":{"\xff":"a"}}', "not UTF-8", "byte 16"),
    "index_git_lfs": _index(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "index_html": _index(b"<!DOCTYPE html>", "HTML page"),
    "index_list": _index(b"[1, 2]", "is [1, 2]", "'weight_map'"),
    "index_null": _index(b"null", "is None", "'weight_map'"),
    "index_without_map": _index(b'{"metadata": {}}', "keys are ['metadata']", "'weight_map'"),
    "index_map_list": _map(["a"], "'weight_map'"),
    "index_map_object": _map({"a": {"b": 1}}, "'a' is in an object of 1 keys"),
    "index_map_empty": _map({}, "names no tensor"),
    "index_map_number": _map({**MAP, "a": 3}, "'a' is in 3", "name of a file"),
    "index_map_null": _map({**MAP, "a": None}, "'a' is in None"),
    "index_deep": _index(b'{"a":' * 50_000, "nested too deeply"),
    "index_of_lists": _index(b"[" + b"[]," * 300_000 + b"[]]", "lists and objects"),
    "index_huge": _index(b'{"weight_map":{}}' + b" " * 2**25, "bytes long", "at most 33554432"),
    "index_is_a_directory": Broken(_special(INDEX, os.mkdir), INDEX, ("a directory",)),
    "index_is_a_pipe": Broken(_special(INDEX, os.mkfifo), INDEX, ("named pipe",)),
    # its shards
    "shard_parent": _map({**MAP, "a": "../x.safetensors"}, "'../x.safetensors'", "own directory"),
    "shard_parent_inside": _map({**MAP, "a": f"sub/../{FIRST}"}, "'sub/../", "own directory"),
    "shard_parent_backslash": _map({**MAP, "a": "..\\x.safetensors"}, "own directory"),
    "shard_absolute": _map({**MAP, "a": "/etc/passwd"}, "'/etc/passwd'", "own directory"),
    "shard_nul": _map({**MAP, "a": "x\0.safetensors"}, r"'x\x00.safetensors'", "own directory"),
    "shard_no_name": _map({**MAP, "a": ""}, "the file ''"),
    "shard_missing": _map({**MAP, "a": "x.safetensors"}, "1 of 3 shards are missing", "'x.safetensors'"),
    "shards_missing": _files({INDEX: index_of(MAP)}, INDEX, "2 of 2 shards are missing", FIRST),
    "shard_surrogate": _map({**MAP, "a": "\ud800.safetensors"}, "shards are missing"),
    "shard_link_to_nothing": Broken(_linked(FIRST, "nowhere"), FIRST, ("symbolic link to nothing",)),
    "shard_is_a_pipe": Broken(_special(FIRST, os.mkfifo), FIRST, ("named pipe",)),
    "shard_is_a_directory": Broken(_special(FIRST, os.mkdir), FIRST, ("a directory",)),
    "shard_is_a_device": Broken(_linked(SECOND, "/dev/zero"), SECOND, ("character device",)),
    "shard_broken": _files({**GOOD, SECOND: SHARDS[SECOND][:-1]}, SECOND, "1 bytes are missing", "'c'"),
    "shard_is_pytorch": _files({**GOOD, SECOND: PYTORCH}, SECOND, "zip archive"),
    "tensor_missing": _map({**MAP, "d": FIRST}, "places tensor 'd' in", FIRST),
    "tensors_missing": _map(
        MAP | {f"d{k}": SECOND for k in range(9)}, "tensors 'd0', 'd1', 'd2' and 6 more in", SECOND
    ),
    "tensor_in_other_shard": _map({**MAP, "a": SECOND}, "does not place tensor 'a' in", FIRST),
    "tensor_not_named": _map({"a": FIRST, "c": SECOND}, "does not place tensor 'b' in", FIRST),
    "tensor_in_both": _files({**GOOD, SECOND: file_of("c", "b")}, SECOND, "'b' is in", FIRST),
    # config.json
    "config_text": _config(b"hello", "not JSON"),
    "config_cut": _config(b'{"a": ', "not JSON"),
    "config_list": _config(b"[1]", "is [1]", "JSON object"),
    "config_not_utf8": _config(b'{"a": "\xff"}', "not UTF-8"),
    "config_long": _config(b"{}" + b" " * 2**23, "at most 8388608"),
    "config_digits": _config(b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    "config_is_a_directory": Broken(_special("config.json", os.mkdir), "config.json", ("a directory",)),
    "config_is_a_pipe": Broken(_special("config.json", os.mkfifo), "config.json", ("named pipe",)),
    "config_is_a_link_to_nothing": Broken(_linked("config.json", "x"), "config.json", ("link to nothing",)),
    # PyTorch
    "pytorch_cut": _files({"pytorch_model.bin": PYTORCH[:-1]}, "pytorch_model.bin", "without its end"),
    "pytorch_index_list": _files(
        {"pytorch_model.bin.index.json": b"[]"}, "pytorch_model.bin.index.json", "is []"
    ),
    "pytorch_shard_missing": _files(
        {"pytorch_model.bin.index.json": index_of({"w": "x.bin"})}, "pytorch_model.bin.index.json", "'x.bin'"
    ),
}
"""Every way for a directory to be wrong, by name."""
