"""The vocabulary of a model, from its tokenizer files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvfast.errors import CheckpointError

VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
"""A tokenizer's vocabulary, the first of these that a directory has."""

_MAX_BYTES = 512 * 1000**2
_ADDED = "added_tokens.json"
_CONFIG = "tokenizer_config.json"
_EXACT = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def vocabulary_file(directory: str | None) -> str | None:
    """The file that holds the vocabulary of the model in a directory; None: it has no tokenizer.

    Raises:
        CheckpointError: there is something of that name, but no regular file.
    """
    for name in VOCABULARY_FILES if directory is not None else ():
        path = os.path.join(directory or "", name)
        if os.path.isfile(path):
            return path
        if os.path.lexists(path):
            raise CheckpointError(f"{path}: is no regular file; expected the model's tokenizer. Remove it.")
    return None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one tokenizer.

    Attributes:
        path: of its file.
        ids: token -> number.
        added: tokens that were added beside the vocabulary, with their settings as `tokenizer.json` has them.
        exact: whether the file gives every number; of some formats a program adds to what is in the file.
    """

    path: str
    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    exact: bool


def read_vocabulary(path: str) -> Vocabulary:
    """The vocabulary in one of `VOCABULARY_FILES`, with the tokens that files beside it add.

    Raises:
        CheckpointError: a file is none of its kind.
    """
    name, data = os.path.basename(path), _read(path)
    try:
        if name == "tokenizer.json":
            return vocabulary_of(json.loads(data), path)
        tokens = dict(_vocabulary(name, data))
    except _DAMAGED:
        raise damaged_vocabulary(path) from None
    added = {number: added_token(number, token) for number, token in sorted(_added(path))}
    names = {**tokens, **{number: token["content"] for number, token in added.items()}}
    ids = {token: number for number, token in sorted(names.items())}
    found = Vocabulary(path, ids, {token["content"]: token for token in added.values()}, name in _EXACT)
    return _with_declared(found)


def vocabulary_of(document: Any, path: str) -> Vocabulary:
    """The vocabulary of a `tokenizer.json` that is parsed.

    Args:
        path: of its file, or of the one that stands for it.

    Raises:
        CheckpointError: it is no such document.
    """
    try:
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score]
            ids = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
        else:
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        added = {str(token["content"]): dict(token) for token in document.get("added_tokens") or ()}
        ids.update((content, int(token["id"])) for content, token in added.items())
    except _DAMAGED:
        raise damaged_vocabulary(path) from None
    return _with_declared(Vocabulary(path, ids, added, True))


def _with_declared(found: Vocabulary) -> Vocabulary:
    """The same with what `tokenizer_config.json` adds when the tokenizer is loaded."""
    for number, token in sorted(_declared(found.path).items()):
        content = str(token["content"])
        if content not in found.ids:
            found.ids[content] = number
            found.added[content] = {**added_token(number, content), **token, "id": number}
    return found


def _declared(path: str) -> dict[int, dict[str, Any]]:
    """Tokens by number in the `tokenizer_config.json` beside a vocabulary."""
    config = os.path.join(os.path.dirname(path), _CONFIG)
    if not os.path.isfile(config):
        return {}
    try:
        tokens = json.loads(_read(config)).get("added_tokens_decoder") or {}
        found = {int(key): dict(token) for key, token in tokens.items()}
        if all("content" in token for token in found.values()):
            return found
    except _DAMAGED:
        pass
    raise CheckpointError(
        f"{config}: is damaged; expected a JSON object, tokens by number in its added_tokens_decoder."
    )


def added_token(number: int, content: str) -> dict[str, Any]:
    """A token that was added without settings, as the tokenizers library writes it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": number, "content": content, **flags}


def same_vocabulary(one: str, other: str) -> bool:
    """Whether two files of vocabularies are equal byte by byte, and so is what was added to them."""
    return (
        os.path.basename(one) == os.path.basename(other)
        and _read(one) == _read(other)
        and (one.endswith("tokenizer.json") or dict(_added(one)) == dict(_added(other)))
        and _declared(one) == _declared(other)
    )


def damaged_vocabulary(path: str) -> CheckpointError:
    name = os.path.basename(path)
    return CheckpointError(f"{path}: is damaged; expected a vocabulary as {name} holds it.")


def _read(path: str) -> bytes:
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise CheckpointError(f"{path}: has more than {_MAX_BYTES} bytes; expected a tokenizer's file.")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None


def _vocabulary(name: str, data: bytes) -> Iterator[tuple[int, str]]:
    if name == "vocab.json":
        yield from ((int(number), str(token)) for token, number in json.loads(data).items())
    elif name == "vocab.txt":
        yield from enumerate(data.decode().rstrip("\n").split("\n"))
    else:
        yield from enumerate(_pieces(data))


def _added(path: str) -> Iterator[tuple[int, str]]:
    added = os.path.join(os.path.dirname(path), _ADDED)
    if not path.endswith("tokenizer.json") and os.path.isfile(added):
        try:
            yield from [(int(number), str(token)) for token, number in json.loads(_read(added)).items()]
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{added}: is damaged; expected a JSON object of tokens and ids.") from None


def _pieces(data: bytes) -> Iterator[str]:
    """The tokens of a SentencePiece model: field 1 of each message in field 1, in protobuf's encoding."""
    for number, message in _fields(data):
        if number == 1:
            yield next((text.decode() for inner, text in _fields(message) if inner == 1), "")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a message with their bytes; numbers have none.

    Raises:
        ValueError: no such encoding.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
            n_bytes = 0
        elif kind == 2:
            n_bytes, at = _varint(data, at)
        elif kind in (1, 5):
            n_bytes = 8 if kind == 1 else 4
        else:
            raise ValueError(kind)
        if at + n_bytes > len(data):
            raise ValueError(n_bytes)
        yield tag >> 3, data[at : at + n_bytes]
        at += n_bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(shift)
