"""Whose tokenizer the output takes, and whether the others fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.checkpoints import bound, checkpoint
from tvfast.engine.binding import Binding
from tvfast.engine.vocabulary import added_token, read_vocabulary
from tvfast.errors import CheckpointError, RecipeError

LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"


def write(folder: Path, **files: Any) -> str:
    """A directory with files; `vocab_json` is vocab.json, content that is no bytes is written as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("_json", ".json").replace("_txt", ".txt").replace("_model", ".model")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(folder)


def bpe(*tokens: str, added: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "model": {"vocab": {token: k for k, token in enumerate(tokens)}},
        "added_tokens": [{"id": len(tokens) + k, "content": token} for k, token in enumerate(added)],
    }


def unigram(*tokens: str) -> dict[str, Any]:
    return {"model": {"vocab": [[token, -1.5] for token in tokens]}}


def sentencepiece(*tokens: str) -> bytes:
    """Messages of (piece, score, type) as protobuf writes them, and one more field after them."""
    pieces = b""
    for token in tokens:
        text = token.encode()
        inner = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\xbf" + b"\x18\x01"
        pieces += b"\x0a" + bytes([len(inner)]) + inner
    return pieces + b"\x12\x02\x08\x01"


def merged(text: str, **directories: str | None) -> Binding:
    return bound(text, **{name: checkpoint(name, directory=path) for name, path in directories.items()})


def test_without_a_word_the_donors_tokenizer_is_taken(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", tokenizer_json=bpe("x")), write(tmp_path / "b", tokenizer_json=bpe("y"))
    assert merged(LINEAR, a=a, b=b).tokenizer == a
    assert merged(LINEAR + "base_model: b\n", a=a, b=b).tokenizer == b


def test_without_a_tokenizer_the_next_model_gives_it(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", vocab_json={"x": 0})
    assert merged(LINEAR, a=a, b=b).tokenizer == b
    assert merged(LINEAR, a=a, b=None).tokenizer is None
    assert merged(LINEAR, a=a, b=a).donor == a


@pytest.mark.parametrize("source", ["base", "union", "b"])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_json": bpe("x", "y", "z", added=("<s>",))},
        {"tokenizer_json": unigram("w", "x", "y", "z")},
        {"vocab_json": {"x": 0, "y": 1, "z": 2}, "added_tokens_json": {"<s>": 3}},
        {"vocab_txt": b"w\nx\ny\nz\n"},
        {"tokenizer_model": sentencepiece("w", "x", "y", "z")},
    ],
)
def test_equal_vocabularies(tmp_path: Path, source: str, files: dict[str, Any]) -> None:
    """Four tokens and four rows: nothing is to be aligned."""
    a, b = write(tmp_path / "a", **files), write(tmp_path / "b", **files)
    found = merged(LINEAR + f"tokenizer_source: {source}\n", a=a, b=b)
    assert found.tokenizer == (b if source == "b" else a)
    assert all(task.gather is None for task in found.tasks)
    assert found.tokenizer_files == {}
    assert found.warnings == ()


def test_a_tokenizer_from_outside_of_the_merge(tmp_path: Path) -> None:
    one = {"tokenizer_json": bpe("x")}
    a, b, c = (write(tmp_path / name, **one) for name in "abc")
    assert merged(LINEAR + f"tokenizer_source: {c}\n", a=a, b=b).tokenizer == c


def test_equal_tokens_in_files_that_differ(tmp_path: Path) -> None:
    a = write(tmp_path / "a", tokenizer_json=bpe("x", "y", "z", added=("<s>",)))
    b = write(tmp_path / "b", vocab_json={"y": 1, "x": 0, "z": 2}, added_tokens_json={"<s>": 3})
    c = write(tmp_path / "c", tokenizer_json=unigram("x", "y", "z", "<s>"))
    for other in (b, c):
        found = merged(LINEAR + "tokenizer_source: union\n", a=a, b=other)
        assert found.tokenizer == a
        assert all(task.gather is None for task in found.tasks)


def test_tokens_that_only_the_configuration_declares(tmp_path: Path) -> None:
    declared = {"added_tokens_decoder": {"1": {"content": "<p>", "special": True}}}
    path = write(tmp_path / "a", tokenizer_json=bpe("x"), tokenizer_config_json=declared)
    found = read_vocabulary(f"{path}/tokenizer.json")
    assert found.ids == {"x": 0, "<p>": 1}
    assert found.added["<p>"] == {**added_token(1, "<p>"), "special": True}


def test_a_source_without_a_tokenizer(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", tokenizer_json=bpe("x"))
    with pytest.raises(RecipeError, match=r"a has no tokenizer; expected one of tokenizer\.json"):
        merged(LINEAR + "tokenizer_source: base\n", a=a, b=b)
    with pytest.raises(RecipeError, match="nowhere is no directory"):
        merged(LINEAR + "tokenizer_source: nowhere\n", a=b, b=a)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_json": b"{"},
        {"tokenizer_json": b"[1]"},
        {"tokenizer_json": {"model": {}}},
        {"tokenizer_json": {"model": {"vocab": [3]}}},
        {"tokenizer_json": {"model": {"vocab": {}}, "added_tokens": [3]}},
        {"tokenizer_json": b"[" * 100_000},
        {"vocab_json": b"\xff"},
        {"vocab_txt": b"\xff"},
        {"tokenizer_model": b"\x0a\xff\xff\xff\xff\x0f"},
        {"tokenizer_model": b"\x0a" + b"\xff" * 20},
        {"tokenizer_model": b"\x0b"},
        {"vocab_json": {"x": 0}, "added_tokens_json": b"[3]"},
        {"tokenizer_json": bpe("x"), "tokenizer_config_json": b"[3]"},
        {"tokenizer_json": bpe("x"), "tokenizer_config_json": {"added_tokens_decoder": {"one": {}}}},
    ],
)
def test_damaged_tokenizers(tmp_path: Path, files: dict[str, Any]) -> None:
    a, b = write(tmp_path / "a", tokenizer_json=bpe("x")), write(tmp_path / "b", **files)
    with pytest.raises(CheckpointError, match="is damaged; expected"):
        merged(LINEAR + "tokenizer_source: base\n", a=a, b=b)
