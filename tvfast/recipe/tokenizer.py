"""The tokenizer section: whose vocabulary the output takes, and where single tokens have their rows from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

from tvfast.recipe.document import Value, shortened
from tvfast.recipe.references import References

SPECIAL_SOURCES = ("union", "base")
_MOST_MULTIPLE = 2**20


@dataclass(frozen=True, slots=True)
class OwnRow:
    """The row of the same token."""


@dataclass(frozen=True, slots=True)
class OtherRow:
    """The row of another token, by its text or its number."""

    token: str | int


@dataclass(frozen=True, slots=True)
class ZeroRow:
    """Zeros."""


Row: TypeAlias = OwnRow | OtherRow | ZeroRow


@dataclass(frozen=True, slots=True)
class TokenRule:
    """What one token has its embedding from where a model lacks it.

    Attributes:
        token: its text.
        row: of `model`; None: as for tokens without a rule.
        model: as the recipe names it; None for zeros, and without a rule.
        force: also where a model has the token.
        place: where the recipe says so.
    """

    token: str
    row: Row | None
    model: str | None
    force: bool
    place: str


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer of the output.

    Attributes:
        source: "union", "base" or a model.
        rules: of single tokens; those that the source lacks are added to it.
        multiple: the output has so many rows, or a multiple of it.
        place: key of the recipe.
    """

    source: str
    rules: tuple[TokenRule, ...]
    multiple: int
    place: str


def read_tokenizer(
    section: Value | None, legacy: Value | None, models: Collection[str], references: References
) -> Tokenizer | None:
    """What the keys `tokenizer` and `tokenizer_source` say; None: neither is there.

    Args:
        models: every input of the recipe.
        references: reads their names.

    Raises:
        RecipeError: both are there, or one says what it cannot.
    """
    if section is None:
        return None if legacy is None else Tokenizer(_source(legacy, references), (), 1, legacy.path)
    if legacy is not None:
        raise section.error("there is a tokenizer_source too; expected one of them.")
    found = section.mapping(("source", "tokens", "pad_to_multiple_of"))
    entries = {key: value for key, value in found.items() if value.plain is not None}
    source = _source(entries["source"], references) if "source" in entries else "union"
    rules = tuple(
        _rule(token, value, models, references)
        for token, value in (entries["tokens"].mapping() if "tokens" in entries else {}).items()
    )
    multiple = _multiple(entries["pad_to_multiple_of"]) if "pad_to_multiple_of" in entries else 1
    return Tokenizer(source, rules, multiple, section.path)


def _source(value: Value, references: References) -> str:
    return str(value.plain) if value.plain in SPECIAL_SOURCES else references.read(value)


def _multiple(value: Value) -> int:
    plain = value.plain
    if isinstance(plain, bool) or not isinstance(plain, int) or not 1 <= plain <= _MOST_MULTIPLE:
        raise value.expected(f"a number of rows from 1 to {_MOST_MULTIPLE}")
    return plain


def _rule(token: str, value: Value, models: Collection[str], references: References) -> TokenRule:
    if not token:
        raise value.error("the token is empty; expected its text.")
    found = value.mapping(("source", "force"), "a mapping with source and force")
    force = found["force"].plain if "force" in found else False
    if not isinstance(force, bool):
        raise found["force"].expected("true or false")
    if "source" not in found or found["source"].plain is None:
        if force:
            raise value.error("force needs a source; expected one beside it.")
        return TokenRule(token, None, None, False, value.path)
    row, model = _row(found["source"], models, references)
    return TokenRule(token, row, model, force, value.path)


def _row(value: Value, models: Collection[str], references: References) -> tuple[Row, str | None]:
    """A model; or `{kind: model_token, model, token or token_id}`; or `{kind: zero}`."""
    if not isinstance(value.plain, dict) or "kind" not in value.plain:
        return OwnRow(), _input(value, models, references)
    found = value.mapping(("kind", "model", "token", "token_id"))
    kind = found["kind"].plain
    if kind == "zero":
        beside = [key for key in found if key != "kind"]
        if beside:
            raise found[beside[0]].error("does not go with kind zero. Remove it.")
        return ZeroRow(), None
    if kind != "model_token":
        raise found["kind"].expected("model_token or zero; for a model's own row, the model alone")
    if "model" not in found:
        raise value.error("has no model; expected {kind: model_token, model, token or token_id}.")
    given = [key for key in ("token", "token_id") if key in found and found[key].plain is not None]
    if len(given) != 1:
        raise value.error(f"has {'both' if given else 'neither'} token and token_id; expected one of them.")
    model = _input(found["model"], models, references)
    return OtherRow(_token(found[given[0]], given[0])), model


def _token(value: Value, key: str) -> str | int:
    plain = value.plain
    if key == "token":
        return value.text("the text of a token")
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < 0:
        raise value.expected("the number of a token, from 0 on")
    return plain


def _input(value: Value, models: Collection[str], references: References) -> str:
    """A model that is an input: rows of others are not read."""
    model = references.read(value)
    if model not in models:
        listed = ", ".join(shortened(name) for name in models)
        raise value.error(f"{shortened(repr(model))} is no input of this recipe; expected one of {listed}.")
    return model
