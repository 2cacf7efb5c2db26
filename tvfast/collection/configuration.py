"""What `tvfast collect` is asked for: a YAML file, checked before a model is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvfast.errors import RecipeError
from tvfast.importance.objectives import FISHERS, KINDS
from tvfast.recipe.document import Value, compose, from_mapping

TASKS = ("causal_lm", "masked_lm", "sequence_classification")
FORMS = ("text", "jsonl", "tokens")
SPLITS = ("lines", "blocks")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LOSSES = ("sum", "mean")
KFAC = "kfac"
CONVENTIONS = ("tak", "kfac_expand", "mats", "regmean")
FACTORS = ("dense", "block", "root")
_OF_FACTORS = ("convention", "form", "block", "rank")
_OF_SCORES = ("micro_batch", "layers_at_a_time")

_MOST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Data:
    """Where samples come from.

    Attributes:
        form: "text": a text file; "jsonl": an object a line; "tokens": a list of token ids a line, or an
            object with `input_ids`.
        path: of the file.
        split: of text: a sample a "line", or "blocks" of `max_length` tokens of all lines together.
        text_field, label_field: of JSON objects.
    """

    form: str
    path: str
    split: str = "lines"
    text_field: str = "text"
    label_field: str = "label"


@dataclass(frozen=True, slots=True)
class Configuration:
    """A checked configuration; `docs/statistics.md` has the meaning of its keys."""

    where: str
    model: str
    data: Data
    kind: str
    task: str | None = None
    base: str | None = None
    fisher: str = "mats"
    tokenizer: str | None = None
    loss: str = "sum"
    max_length: int = 512
    max_samples: int = 0
    batch_size: int = 8
    micro_batch: int | None = None
    seed: int = 0
    dtype: str = "float32"
    stored_dtype: str = "float32"
    device: str = "cpu"
    parameters: tuple[str, ...] = ()
    layers_at_a_time: int | None = None
    checkpoint_every: int = 0
    name: str = ""
    content: bool = False
    convention: str = "mats"
    form: str = "dense"
    block: int = 64
    rank: int = 1024


def read_configuration(source: str | os.PathLike[str] | Mapping[str, Any]) -> Configuration:
    """A configuration from a YAML file, or from the mapping that it would hold.

    Raises:
        RecipeError: no such file, no YAML, or no configuration; with file, line and key.
    """
    if isinstance(source, Mapping):
        return _configuration(from_mapping(source, "configuration"))
    path = os.fspath(source)
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        text = raw.decode()
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise RecipeError(f"{path}: {reason}; expected the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is no UTF-8; expected a YAML file.") from None
    if len(raw) > _MOST_BYTES:
        raise RecipeError(f"{path}: has more than {_MOST_BYTES} bytes; expected a configuration.")
    return _configuration(compose(text, path))


def _configuration(document: Value) -> Configuration:
    readers: dict[str, Callable[[Value], Any]] = {
        "model": lambda v: _path(v),
        "data": _data,
        "kind": lambda v: _word(v, (*KINDS, KFAC)),
        "task": lambda v: _word(v, TASKS),
        "base": lambda v: _path(v),
        "fisher": lambda v: _word(v, tuple(FISHERS)),
        "tokenizer": lambda v: _path(v),
        "loss": lambda v: _word(v, LOSSES),
        "max_length": lambda v: _integer(v, 1),
        "max_samples": lambda v: _integer(v, 0),
        "batch_size": lambda v: _integer(v, 1),
        "micro_batch": lambda v: _integer(v, 1),
        "seed": lambda v: _integer(v, 0),
        "dtype": lambda v: _word(v, DTYPES),
        "stored_dtype": lambda v: _word(v, DTYPES),
        "device": lambda v: v.text("cpu, cuda or for example cuda:1"),
        "parameters": _texts,
        "layers_at_a_time": lambda v: _integer(v, 1),
        "checkpoint_every": lambda v: _integer(v, 0),
        "name": lambda v: v.text("a name"),
        "content": _flag,
        "convention": lambda v: _word(v, CONVENTIONS),
        "form": lambda v: _word(v, FACTORS),
        "block": lambda v: _integer(v, 1),
        "rank": lambda v: _integer(v, 1),
    }
    entries = document.mapping(tuple(readers), "a mapping with model, data and kind")
    given = {key: value for key, value in entries.items() if value.plain is not None}
    for key in ("model", "data", "kind"):
        if key not in given:
            raise document.error(f"has no {key}; expected model, data and kind.")
    found = {key: readers[key](value) for key, value in given.items()}
    if (found["kind"] == "delta") != ("base" in found):
        raise given.get("base", given["kind"]).error(
            f"kind is {found['kind']} and base is {'given' if 'base' in found else 'missing'}; expected a "
            "base for kind: delta and for no other."
        )
    if "fisher" in found and found["kind"] != "fisher":
        raise given["fisher"].error(f"kind is {found['kind']}; expected kind: fisher beside it.")
    for key in _OF_SCORES if found["kind"] == KFAC else _OF_FACTORS:
        if key in found:
            one = "another kind" if found["kind"] == KFAC else f"kind: {KFAC}"
            raise given[key].error(f"kind is {found['kind']}; expected {one} beside it.")
    return Configuration(where=document.where, **found)


def _data(value: Value) -> Data:
    found = value.mapping(
        (*FORMS, "split", "text_field", "label_field"), "a mapping with text, jsonl or tokens"
    )
    forms = [form for form in FORMS if form in found and found[form].plain is not None]
    if len(forms) != 1:
        raise value.error(f"has {' and '.join(forms) or 'no file'}; expected one of {', '.join(FORMS)}.")
    form = forms[0]
    fields: dict[str, str] = {
        key: found[key].text("the name of a field") for key in ("text_field", "label_field") if key in found
    }
    if "split" in found:
        fields["split"] = _word(found["split"], SPLITS)
        if form != "text":
            raise found["split"].error(f"belongs to text; the data are {form}.")
    return Data(form, _path(found[form]), **fields)


def _path(value: Value) -> str:
    return os.path.expanduser(value.text("a path"))


def _word(value: Value, known: tuple[str, ...]) -> str:
    if value.plain not in known:
        raise value.expected(f"one of {', '.join(known)}")
    return str(value.plain)


def _integer(value: Value, least: int) -> int:
    plain = value.plain
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < least:
        raise value.expected(f"an integer of at least {least}")
    return plain


def _flag(value: Value) -> bool:
    if not isinstance(value.plain, bool):
        raise value.expected("true or false")
    return value.plain


def _texts(value: Value) -> tuple[str, ...]:
    what = "parts of names of parameters, a list"
    return tuple(item.text(what) for item in value.sequence(what))
