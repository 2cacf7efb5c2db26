"""Whether models share a vocabulary, from their tokenizer files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from tvfast.errors import CheckpointError, RecipeError

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


def check_same_vocabulary(source: str, others: Sequence[str | None], where: str) -> None:
    """Raise unless other models have the vocabulary of `source`.

    Args:
        source: directory of the tokenizer that is taken.
        others: directory of each model; those without a tokenizer are skipped.
        where: the recipe and its key.

    Raises:
        RecipeError: `source` has no tokenizer, or a token differs; the first is named, with both ids.
        CheckpointError: a tokenizer file is damaged.
    """
    path = vocabulary_file(source)
    if path is None:
        raise RecipeError(
            f"{where}: {source} has no tokenizer; expected one of {', '.join(VOCABULARY_FILES)} there."
        )
    expected: dict[int, str] | None = None
    for directory in others:
        other = vocabulary_file(directory)
        if other is None or (_same_bytes(path, other) and _same_added(path, other)):
            continue
        expected = _tokens(path) if expected is None else expected
        found = _tokens(other)
        for number in sorted(expected.keys() | found.keys()):
            ours, theirs = expected.get(number), found.get(number)
            if ours != theirs:
                raise RecipeError(
                    f"{where}: the vocabularies differ, first in token {number}: {_shown(ours)} in {path}, "
                    f"{_shown(theirs)} in {other}. Joining vocabularies is not supported yet; merge models "
                    "of one vocabulary, or remove the key to take the tokenizer of the base as it is."
                )


def _shown(token: str | None) -> str:
    return "none" if token is None else repr(token[:40])


def _same_bytes(one: str, other: str) -> bool:
    return os.path.basename(one) == os.path.basename(other) and _read(one) == _read(other)


def _same_added(one: str, other: str) -> bool:
    """Whether tokens added beside the vocabulary are the same; `tokenizer.json` has them inside."""
    if one.endswith("tokenizer.json"):
        return True
    return dict(_added(one)) == dict(_added(other))


def _read(path: str) -> bytes:
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise CheckpointError(f"{path}: has more than {_MAX_BYTES} bytes; expected a tokenizer's file.")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None


def _tokens(path: str) -> dict[int, str]:
    """Token by id.

    Raises:
        CheckpointError: the file is none of its kind.
    """
    try:
        return {**dict(_vocabulary(path)), **dict(_added(path))}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        name = os.path.basename(path)
        raise CheckpointError(f"{path}: is damaged; expected a vocabulary as {name} holds it.") from None


def _vocabulary(path: str) -> Iterator[tuple[int, str]]:
    name, data = os.path.basename(path), _read(path)
    if name == "tokenizer.json":
        parsed = json.loads(data)
        vocabulary: Any = parsed["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score]
            yield from ((number, str(entry[0])) for number, entry in enumerate(vocabulary))
        else:
            yield from ((int(number), str(token)) for token, number in vocabulary.items())
        yield from ((int(token["id"]), str(token["content"])) for token in parsed.get("added_tokens") or ())
    elif name == "vocab.json":
        yield from ((int(number), str(token)) for token, number in json.loads(data).items())
    elif name == "vocab.txt":
        yield from enumerate(data.decode().split("\n"))
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
