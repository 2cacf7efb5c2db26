"""Models of the hub: what is asked for, what the cache holds afterwards, and every reason why not."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest

from tests.corpus.directories import file_of
from tvfast.checkpoint.adapter import open_adapter
from tvfast.checkpoint.hub import cached_snapshot
from tvfast.checkpoint.locating import locate_adapter
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.errors import CheckpointError

COMMIT = "c0ffee"


class Hub:
    """A hub with one model, and the calls that reach it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files: dict[str, bytes] = {}
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def snapshot_download(self, name: str, **options: Any) -> str:
        """As the hub's own: blobs, links to them in a snapshot, and the commit that a revision stands for."""
        from fnmatch import fnmatch

        self.calls.append({"name": name, **options})
        if self.error is not None:
            raise self.error
        repository = Path(options["cache_dir"]) / ("models--" + name.replace("/", "--"))
        snapshot = repository / "snapshots" / COMMIT
        reference = repository / "refs" / options["revision"]
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(COMMIT)
        (repository / "blobs").mkdir(exist_ok=True)
        for number, (file, content) in enumerate(self.files.items()):
            wanted = any(fnmatch(file, pattern) for pattern in options["allow_patterns"])
            if wanted and not any(fnmatch(file, pattern) for pattern in options["ignore_patterns"]):
                blob = repository / "blobs" / str(number)
                blob.write_bytes(content)
                link = snapshot / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty cache, an empty working directory, downloads allowed."""
    found = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(found.cache))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return found


def message_of(path: str, opened: Callable[[str], object] = open_checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    return str(caught.value)


class ClientError(Exception):
    """What an HTTP client raises that is not huggingface_hub's own."""


def answer(kind: type[Exception]) -> Exception:
    """An error as huggingface_hub raises it after an answer of its server."""
    response = types.SimpleNamespace(headers={}, request=None, status_code=404)
    error = kind.__new__(kind)
    error.args = ("404",)
    error.__dict__["response"] = response
    return error


FILES: Mapping[str, bytes] = {
    "model.safetensors": file_of("a"),
    "consolidated.safetensors": file_of("a"),
    "config.json": b"{}",
    "tokenizer.model": b"",
    "README.md": b"",
    "training_args.bin": b"",
    "onnx/model.json": b"",
}


def test_a_model_that_is_not_in_the_cache_is_downloaded_once(hub: Hub) -> None:
    hub.files = dict(FILES)
    found = open_checkpoint("org/name")
    assert found.path == "org/name"
    assert list(found.tensors) == ["a"]
    assert found.directory is not None
    assert sorted(os.listdir(found.directory)) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert [(call["name"], call["revision"]) for call in hub.calls] == [("org/name", "main")]
    open_checkpoint("org/name")
    assert len(hub.calls) == 1


def test_a_revision_is_asked_for(hub: Hub) -> None:
    hub.files = dict(FILES)
    assert list(open_checkpoint("org/name@v2").tensors) == ["a"]
    assert hub.calls[0]["revision"] == "v2"
    assert hub.calls[0]["name"] == "org/name"
    assert cached_snapshot("org/name") is None


def test_pytorch_files_are_taken_only_where_there_are_no_others(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"no archive"}
    assert "pytorch_model.bin" in message_of("org/name")
    assert [call["allow_patterns"][0] for call in hub.calls] == ["*.safetensors", "*.bin"]


def test_weights_may_be_all_that_is_taken(hub: Hub) -> None:
    hub.files = {"README.md": b"", "pytorch_model.bin": b"no archive"}
    assert "pytorch_model.bin" in message_of("org/name")
    assert len(hub.calls) == 2


def test_a_model_of_other_formats_is_named_as_one(hub: Hub) -> None:
    hub.files = {"README.md": b"", "model-Q8_0.gguf": b""}
    message = message_of("org/name")
    assert message.startswith("org/name: the hub's org/name has no file that is read here")
    assert "*.safetensors" in message
    assert "*.bin" in message


def test_what_the_cache_lacks_is_downloaded(hub: Hub) -> None:
    hub.files = {"config.json": b"{}"}
    assert "holds no weights" in message_of("org/name")
    hub.files = dict(FILES)
    assert list(open_checkpoint("org/name").tensors) == ["a"]


def test_an_incomplete_model_stays_one_without_a_connection(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"config.json": b"{}"}
    message_of("org/name")
    n_calls = len(hub.calls)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "holds no weights" in message_of("org/name")
    assert len(hub.calls) == n_calls


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_downloads_may_be_forbidden(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = message_of("org/name@v1")
    assert message.startswith("org/name@v1: no such file or directory, and not in the local cache")
    assert f"{variable} forbids" in message
    assert "hf download org/name`" in message
    assert not hub.calls


def test_the_package_may_be_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = message_of("org/name")
    assert "not in the local cache" in message
    assert "pip install tvfast[hub]" in message


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (hub_errors.GatedRepoError, "accepted its terms"),
        (hub_errors.RepositoryNotFoundError, "no model org/name on the hub"),
        (hub_errors.RevisionNotFoundError, "has no revision 'v1'"),
        (hub_errors.LocalEntryNotFoundError, "could not be downloaded from the hub (404)"),
        (ConnectionError, "could not be downloaded"),
        (ClientError, "could not be downloaded"),
    ],
)
def test_every_reason_is_named(hub: Hub, error: type[Exception], expected: str) -> None:
    hub.error = answer(error)
    message = message_of("org/name@v1")
    assert message.startswith("org/name@v1: ")
    assert expected in message


@pytest.mark.parametrize("path", ["name", "org/name/more", "../org/name", "org/..", "./name"])
def test_paths_are_no_ids(hub: Hub, path: str) -> None:
    assert "no such file or directory" in message_of(path)
    assert not hub.calls


def test_a_directory_of_the_owners_name_says_that_it_is_a_path(hub: Hub) -> None:
    Path("org").mkdir()
    assert message_of("org/name").startswith("org/name: no such file or directory; expected")
    assert not hub.calls


def test_an_adapter_is_downloaded_alone(hub: Hub) -> None:
    hub.files = {**FILES, "adapter_model.safetensors": file_of("a")}
    assert "adapter_config.json" in message_of("org/adapter", open_adapter)
    assert hub.calls[0]["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert len(hub.calls) == 1


def test_an_adapter_that_is_there_in_part_is_completed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"adapter_config.json": b'{"peft_type": "LORA"}'}
    assert "but no weights" in message_of("org/adapter", open_adapter)
    n_calls = len(hub.calls)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "but no weights" in message_of("org/adapter", open_adapter)
    assert len(hub.calls) == n_calls
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.files["adapter_model.safetensors"] = file_of("a")
    directory = locate_adapter("org/adapter")
    assert sorted(os.listdir(directory)) == ["adapter_config.json", "adapter_model.safetensors"]
    n_calls = len(hub.calls)
    assert locate_adapter("org/adapter") == directory
    assert len(hub.calls) == n_calls


def test_a_part_in_the_cache_is_said_to_be_one(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"config.json": b"{}"}
    message_of("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = message_of("org/name")
    assert "only in part in the local cache" in message
    assert "pip install tvfast[hub]" in message
