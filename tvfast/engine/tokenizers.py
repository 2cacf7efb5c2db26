"""The tokenizer of the output: that of one model, or the union of all, and the files it is saved in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvfast.engine.vocabulary import (
    VOCABULARY_FILES,
    Vocabulary,
    added_token,
    damaged_vocabulary,
    read_vocabulary,
    same_vocabulary,
    vocabulary_file,
    vocabulary_of,
)
from tvfast.errors import CheckpointError, RecipeError

_CONFIG = "tokenizer_config.json"
_ADDED = "added_tokens.json"
_SETTINGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True, slots=True)
class Member:
    """One model's tokenizer.

    Attributes:
        vocabulary: its own, or that of the base where it has none.
        n_rows: tokens from this number on have no row in the model.
    """

    vocabulary: Vocabulary
    n_rows: int

    def number(self, token: str) -> int:
        """Its number; -1 without a row."""
        number = self.vocabulary.ids.get(token, -1)
        return number if number < self.n_rows else -1


@dataclass(frozen=True, slots=True)
class OutputTokenizer:
    """What the output's tokenizer is.

    Attributes:
        directory: whose files are copied.
        tokens: by number; None where a number stands for none.
        n_tokens: how many there are.
        files: by name, those that differ from the directory's.
    """

    directory: str
    tokens: tuple[str | None, ...]
    n_tokens: int
    files: Mapping[str, bytes]


def load_vocabulary(directory: str, where: str, like: Vocabulary | None = None) -> Vocabulary:
    """The vocabulary of the tokenizer in a directory.

    Args:
        where: the recipe and its key.
        like: one that may be the same, which is then not read again.

    Raises:
        RecipeError: there is none, or it is of a kind that takes transformers.
        CheckpointError: a file is damaged.
    """
    path = vocabulary_file(directory)
    if path is None:
        raise RecipeError(
            f"{where}: {directory} has no tokenizer; expected one of {', '.join(VOCABULARY_FILES)} there."
        )
    if like is not None and same_vocabulary(like.path, path):
        return replace(like, path=path)
    found = read_vocabulary(path)
    if found.exact:
        return found
    from tvfast.engine.tokenizer_conversion import tokenizer_document

    return vocabulary_of(tokenizer_document(directory, where), path)


def tokenizer_as_it_is(vocabulary: Vocabulary, more: Sequence[str], where: str) -> OutputTokenizer:
    """One model's tokenizer, and tokens that the recipe adds to it."""
    return _changed(vocabulary, None, more, where)


def stripped_tokenizer(base: Member, more: Sequence[str], where: str) -> OutputTokenizer:
    """The base's tokenizer without tokens that have no row."""
    return _changed(base.vocabulary, base.n_rows, more, where)


def union_tokenizer(
    base: Member, others: Sequence[Member], more: Sequence[str], where: str
) -> OutputTokenizer:
    """The base's tokenizer with every token that another model has a row for.

    Tokens of the base keep their numbers. New ones follow in the order of the models and of their numbers:
    first what is in a vocabulary, then what was added to one, which keeps the settings of the first that has
    it. A token that is plain in the base and added in another model becomes an added one.
    """
    plain: dict[str, None] = {}
    added: dict[str, dict[str, Any]] = {}
    for member in (base, *others):
        own = member.vocabulary.added
        numbers = member.vocabulary.ids.items()
        plain |= {token: None for token, n in numbers if 0 <= n < member.n_rows and token not in own}
        for token, settings in own.items():
            if member.number(token) >= 0:
                added.setdefault(token, settings)
    kept = {token for token in base.vocabulary.added if base.number(token) >= 0}
    wanted: list[str | Mapping[str, Any]] = [token for token in plain if token not in added]
    wanted += [settings for token, settings in added.items() if token not in kept]
    return _changed(base.vocabulary, base.n_rows, [*wanted, *more], where)


def _changed(
    vocabulary: Vocabulary, n_rows: int | None, wanted: Iterable[str | Mapping[str, Any]], where: str
) -> OutputTokenizer:
    """A tokenizer without the tokens from `n_rows` on, and with others behind the last one.

    Args:
        wanted: tokens, added where they are lacking; or settings of tokens that are added ones then.
    """
    known = vocabulary.ids
    if n_rows is not None:
        known = {token: number for token, number in known.items() if number < n_rows}
    n_dropped = len(vocabulary.ids) - len(known)
    known = dict(known)
    following = max(known.values(), default=-1) + 1
    new: list[dict[str, Any]] = []
    for one in wanted:
        if isinstance(one, str):
            if one in known:
                continue
            one = added_token(following, one)
        number = known.setdefault(one["content"], following)
        following += number == following
        new.append({**one, "id": number})
    tokens: list[str | None] = [None] * following
    for token, number in known.items():
        tokens[number] = token
    changed = new or n_dropped
    files = dict(_files(vocabulary.path, n_rows, new, where)) if changed else {}
    return OutputTokenizer(os.path.dirname(vocabulary.path), tuple(tokens), len(known), files)


def _files(
    path: str, end: int | None, new: Sequence[Mapping[str, Any]], where: str
) -> Iterator[tuple[str, bytes]]:
    """The files of a tokenizer after a change."""
    directory = os.path.dirname(path)
    if path.endswith("tokenizer.json"):
        with open(path, "rb") as file:
            document = json.loads(file.read())
    else:
        from tvfast.engine.tokenizer_conversion import tokenizer_document

        document = tokenizer_document(directory, where)
    if end is not None:
        _strip(document, end, path)
    document["added_tokens"] = _merged(document.get("added_tokens") or [], new)
    yield "tokenizer.json", json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    config = _object(os.path.join(directory, _CONFIG))
    if isinstance(config.get("added_tokens_decoder"), dict):
        kept = {k: v for k, v in config["added_tokens_decoder"].items() if end is None or int(k) < end}
        entries = {str(token["id"]): {name: token[name] for name in _SETTINGS} for token in new}
        yield _CONFIG, _json({**config, "added_tokens_decoder": {**kept, **entries}})
    added = _object(os.path.join(directory, _ADDED))
    if added:
        kept = {token: number for token, number in added.items() if end is None or number < end}
        yield _ADDED, _json({**kept, **{token["content"]: token["id"] for token in new}})


def _strip(document: dict[str, Any], end: int, path: str) -> None:
    """Drop the tokens from number `end` on, and the merges that need them."""
    try:
        model = document["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):
            model["vocab"] = vocabulary[:end]
        else:
            dropped = {token for token, number in vocabulary.items() if number >= end}
            if dropped:
                model["vocab"] = {token: n for token, n in vocabulary.items() if n < end}
                model["merges"] = [pair for pair in model.get("merges") or [] if _is_kept(pair, dropped)]
        document["added_tokens"] = [t for t in document.get("added_tokens") or [] if t["id"] < end]
    except (KeyError, TypeError, AttributeError):
        raise damaged_vocabulary(path) from None


def _is_kept(pair: Any, dropped: set[str]) -> bool:
    """Whether a merge, `"a b"` or `["a", "b"]`, has all of its tokens."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    return dropped.isdisjoint((*parts, "".join(parts)))


def _merged(added: Sequence[dict[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Added tokens by number, as the tokenizers library wants them."""
    entries = {int(token["id"]): dict(token) for token in (*added, *new)}
    return [entries[number] for number in sorted(entries)]


def _object(path: str) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); restore or remove it.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no JSON object; expected one. Restore or remove it.")
    return found


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
