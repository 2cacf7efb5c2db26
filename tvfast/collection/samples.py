"""Samples from files: text, JSON lines or token ids, one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvfast.collection.configuration import Data
from tvfast.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Sample:
    """A text or its tokens, and a label where there is one: a class, or a token each."""

    text: str | None
    tokens: tuple[int, ...] | None
    label: int | tuple[int, ...] | None
    place: str


def read_samples(data: Data) -> Iterator[Sample]:
    """The samples of a file, one a line, in order; empty lines are none.

    Raises:
        CheckpointError: the file cannot be read, or a line is not what the form says.
    """
    try:
        with open(data.path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.strip()
                if text:
                    place = f"{data.path}, line {number}"
                    yield (
                        Sample(text, None, None, place) if data.form == "text" else _parsed(data, text, place)
                    )
    except OSError as error:
        raise _unreadable(data.path, error) from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{data.path}: is no UTF-8; expected text.") from None


def digest_of(path: str) -> str:
    """SHA-256 of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise _unreadable(path, error) from None
    return digest.hexdigest()


def _unreadable(path: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error}); expected the data's file.")


def _parsed(data: Data, text: str, place: str) -> Sample:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{place}: is no JSON; expected {data.form}, one JSON value a line.") from None
    if data.form == "tokens":
        if isinstance(found, dict):
            return Sample(None, _ids(found.get("input_ids"), place), _label(found, "labels", place), place)
        return Sample(None, _ids(found, place), None, place)
    if not isinstance(found, dict) or not isinstance(found.get(data.text_field), str):
        raise CheckpointError(f"{place}: has no text {data.text_field!r}; expected an object with one.")
    return Sample(found[data.text_field], None, _label(found, data.label_field, place), place)


def _ids(found: object, place: str) -> tuple[int, ...]:
    if not isinstance(found, list) or not found or not all(type(one) is int and one >= 0 for one in found):
        raise CheckpointError(f"{place}: expected a list of token ids, or an object with them as input_ids.")
    return tuple(found)


def _label(found: dict[str, Any], field: str, place: str) -> int | tuple[int, ...] | None:
    label = found.get(field)
    if label is None or type(label) is int:
        return label
    if isinstance(label, list) and all(type(one) is int for one in label):
        return tuple(label)
    raise CheckpointError(
        f"{place}: {field!r} is no integer and no list of them; expected a class or token ids."
    )
