"""Models of different vocabularies: the tokens of the output, and which rows of every model they are.

Read from tokenizer files and headers; nothing here reads a tensor.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from tvfast.checkpoint import hub
from tvfast.checkpoint.reading import Checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.dtypes import MERGEABLE
from tvfast.engine.configuration import vocabulary_size
from tvfast.engine.gather import Gather, RowMap, padding_row
from tvfast.engine.layers import place
from tvfast.engine.rows import Row
from tvfast.engine.tokenizers import (
    Member,
    OutputTokenizer,
    load_vocabulary,
    stripped_tokenizer,
    tokenizer_as_it_is,
    union_tokenizer,
)
from tvfast.engine.vocabulary import vocabulary_file
from tvfast.errors import AdapterError, DTypeError, RecipeError, ShapeError
from tvfast.ops.host import CONSTANT_ROW, MEAN_ROW, ZERO_ROW
from tvfast.recipe import OtherRow, OwnRow, Recipe, TokenRule, ZeroRow

# In the names of tensors by token: embeddings, heads and their biases; and what sets others apart from them.
_WORDS = (
    "embed_tokens",
    "tok_embeddings",
    "word_embeddings",
    "embed_in",
    "embed_out",
    "embeddings.weight",
    "wte",
    "shared.weight",
    "lm_head",
    "output.weight",
    "output_layer",
    "vocab_projector",
    "predictions.",
)
_IN_LAYERS = ("embed", "wte")  # of these words, inside what looks like a layer
_OTHERS = ("position", "pos_emb", "wpe", "token_type", "patch", "visual", "vision")


class Alignment:
    """The vocabulary of the output.

    Attributes:
        tokenizer: of the output.
        n_rows: of its matrices by token, padding included.
        warnings: what the recipe may not mean.

    Raises:
        RecipeError: no tokenizer where one is needed, or a rule that names no token of its model.
        CheckpointError: a tokenizer file is damaged.
    """

    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        assert recipe.tokenizer is not None
        self._section = recipe.tokenizer
        self._where = f"{recipe.where}: {self._section.place}"
        self._checkpoints = checkpoints
        self._donor = recipe.donor
        self.warnings: list[str] = []
        self._members = dict(self._read(recipe.donor, recipe.model_paths()))
        self.tokenizer = self._output(recipe.donor)
        multiple = self._section.multiple
        self.n_rows = -(-len(self.tokenizer.tokens) // multiple) * multiple
        self._rules = {rule.token: rule for rule in self._section.rules if rule.row is not None}
        self._own: dict[tuple[str, int], array[int]] = {}
        self._maps: dict[tuple[tuple[tuple[str, int], ...], int | None], RowMap] = {}
        self._in_layers: dict[str, set[int]] = {}

    @property
    def n_bytes(self) -> int:
        """Of the maps and of the tokenizer's files."""
        files = sum(len(content) for content in self.tokenizer.files.values())
        return files + sum(row_map.n_bytes for row_map in self._maps.values())

    def digest(self) -> list[str]:
        """What tells whether another run gathers the same rows."""
        return [row_map.digest() for row_map in self._maps.values()]

    # -- tokenizers -------------------------------------------------------------------------------------

    def _read(self, base: str, models: Sequence[str]) -> Iterator[tuple[str, Member]]:
        """Every model's tokenizer, the base's first."""
        directory = self._checkpoints[base].directory
        if directory is None:
            raise RecipeError(
                f"{self._where}: {base} is one file, without a tokenizer; expected a model's directory."
            )
        first = load_vocabulary(directory, self._where)
        for model in (base, *(model for model in models if model != base)):
            checkpoint = self._checkpoints[model]
            vocabulary = first
            if vocabulary_file(checkpoint.directory) is not None:
                assert checkpoint.directory is not None
                vocabulary = load_vocabulary(checkpoint.directory, self._where, like=first)
            elif model != base:
                self.warnings.append(f"{model} has no tokenizer; it is taken to have that of {base}.")
            n_rows = vocabulary_size(checkpoint.config)
            yield model, Member(vocabulary, len(vocabulary.ids) if n_rows is None else n_rows)

    def _output(self, base: str) -> OutputTokenizer:
        more = [rule.token for rule in self._section.rules]
        source, members = self._section.source, self._members
        if source == "union":
            others = [member for model, member in members.items() if model != base]
            return union_tokenizer(members[base], others, more, self._where)
        if source == "base":
            return stripped_tokenizer(members[base], more, self._where)
        if source in members and self._checkpoints[source].directory is not None:
            return tokenizer_as_it_is(members[source].vocabulary, more, self._where)
        directory = os.path.expanduser(source)
        if not os.path.isdir(directory):
            directory = self._from_hub(source)
        vocabulary = load_vocabulary(directory, self._where, like=members[base].vocabulary)
        return tokenizer_as_it_is(vocabulary, more, self._where)

    def _from_hub(self, source: str) -> str:
        """The directory of a model of the hub that is no input.

        Raises:
            RecipeError: it is no id of one.
            CheckpointError: it is not in the local cache, and cannot be downloaded.
        """
        cached = hub.cached_snapshot(source)
        if cached is not None and vocabulary_file(cached) is not None:
            return cached
        if not hub.may_be_downloaded(source):
            raise RecipeError(
                f"{self._where}: {source}: {source} is no directory; expected one that has a tokenizer, or a "
                "model of the hub."
            )
        return hub.downloaded(source, hub.TOKENIZER)

    # -- tensors ----------------------------------------------------------------------------------------

    def gather(self, row: Row) -> Gather | None:
        """How the inputs of a tensor are aligned; None: they stay as they are.

        Raises:
            ShapeError: the models' rows differ in more than their number.
            DTypeError: rows that have to be found are codes.
            AdapterError: an adapter adds to them.
        """
        present = [(k, stored) for k, stored in enumerate(row.inputs) if stored is not None]
        models = [row.part.sources[k].model for k, _ in present]
        if not all(self._is_by_token(m, stored) for m, (_, stored) in zip(models, present, strict=True)):
            return None
        tensors = tuple(stored for _, stored in present)
        for model, stored in zip(models, tensors, strict=True):
            if stored.shape[1:] != row.reference.shape[1:]:
                raise ShapeError(
                    f"tensor {stored.name!r}: {model} has shape {list(stored.shape)}, "
                    f"{row.part.sources[row.part.reference].model} has {list(row.reference.shape)}; expected "
                    "equal ones but for the number of tokens. The models do not have one architecture."
                )
        base = next((i for i, (k, _) in enumerate(present) if k == row.part.base), None)
        key = tuple((model, stored.shape[0]) for model, stored in zip(models, tensors, strict=True))
        row_map = self._maps.get((key, base))
        if row_map is None:
            row_map = self._maps[key, base] = self._map(key, base)
        if all(n == self.n_rows for _, n in key) and row_map.is_identity:
            return None
        for model, stored in zip(models, tensors, strict=True):
            _check_plain(model, stored)
        types = {stored.dtype for stored in tensors}
        wide = row_map.is_computed or len(types) > 1
        return Gather(tensors, "F32" if wide else types.pop(), row_map, tuple(range(len(tensors))))

    def _is_by_token(self, model: str, stored: Stored) -> bool:
        """Whether a tensor has one row per token of its model.

        Its name says so; or, outside of layers, that nothing inside of them is of this extent.
        """
        if not stored.shape or stored.operand not in MERGEABLE or any(w in stored.name for w in _OTHERS):
            return False
        outside = place(stored.name) is None
        named = any(word in stored.name for word in _WORDS)
        if not outside:
            named = named and any(word in stored.name for word in _IN_LAYERS)
        n_tokens = vocabulary_size(self._checkpoints[model].config)
        if n_tokens is None:
            return named
        if stored.shape[0] != n_tokens:
            return False
        return named or (outside and n_tokens not in self._extents(model))

    def _extents(self, model: str) -> set[int]:
        """Of everything inside the layers of a model."""
        found = self._in_layers.get(model)
        if found is None:
            inside = (s for s in self._checkpoints[model].tensors.values() if place(s.name) is not None)
            found = self._in_layers[model] = {extent for stored in inside for extent in stored.shape}
        return found

    # -- rows -------------------------------------------------------------------------------------------

    def _map(self, models: Sequence[tuple[str, int]], base: int | None) -> RowMap:
        """Where the rows of some models' matrices come from; `base` is the position of θ₀ among them."""
        tokens = self.tokenizer.tokens
        rows = [self._own_rows(model, n_stored)[:] for model, n_stored in models]
        fill = array("i", [ZERO_ROW]) * len(tokens)
        constants: dict[tuple[int, int], int] = {}
        incomplete = {i for part in rows for i, own in enumerate(part) if own < 0}
        places = {model: k for k, (model, _) in enumerate(models)}
        ruled = {i: self._rules[token] for i, token in enumerate(tokens) if token in self._rules}
        nowhere = 0
        for i in incomplete.difference(ruled):
            have = [k for k, part in enumerate(rows) if part[i] >= 0]
            if not have:
                nowhere += tokens[i] is not None
            elif base in have or len(have) == 1:
                fill[i] = have[0] if len(have) == 1 or base is None else base
            else:
                fill[i] = MEAN_ROW
        for i, rule in ruled.items():
            fill[i] = self._ruled(rule, i, rows, places, models, constants)
            if rule.force:
                keeps = fill[i] if fill[i] >= 0 else -1
                for k, part in enumerate(rows):
                    if k != keeps:
                        part[i] = -1
        if nowhere:
            self._note(f"{nowhere} token{'s' * (nowhere != 1)} of the output, in no model: zeros.")
        found = RowMap(tuple(rows), fill, tuple(constants), len(tokens))
        n_padding = self.n_rows - len(tokens)
        if n_padding:
            found.fill.extend(array("i", [padding_row(found)]) * n_padding)
            for part in rows:
                part.extend(array("i", [-1]) * n_padding)
        return found

    def _own_rows(self, model: str, n_stored: int) -> array[int]:
        """Of each token of the output: its row in a model's matrix, or -1."""
        known = self._own.get((model, n_stored))
        if known is None:
            member = self._members[model]
            end = min(member.n_rows, n_stored)
            ids: Mapping[Any, int] = member.vocabulary.ids  # also asked for None, which has no token
            numbers = list(map(ids.get, self.tokenizer.tokens, repeat(-1)))
            if max(numbers, default=-1) >= end:
                numbers = [n if n < end else -1 for n in numbers]
            known = array("i", numbers)
            self._own[model, n_stored] = known
            if model == self._donor and n_stored > self.n_rows:
                self._note(
                    f"{n_stored - self.n_rows} rows of {model} behind the last token are left out; "
                    "`tokenizer: {pad_to_multiple_of: ...}` gives the output padding of its own."
                )
        return known

    def _ruled(
        self,
        rule: TokenRule,
        i: int,
        rows: Sequence[array[int]],
        places: Mapping[str, int],
        models: Sequence[tuple[str, int]],
        constants: dict[tuple[int, int], int],
    ) -> int:
        """What `fill` has for a token with a rule.

        Raises:
            RecipeError: the rule's model has no such token, or not this tensor.
        """
        if isinstance(rule.row, ZeroRow):
            return ZERO_ROW
        assert rule.model is not None
        k = places.get(rule.model)
        if k is None:
            raise self._no_row(rule, "lacks the tensor that the row is of")
        if isinstance(rule.row, OwnRow):
            if rows[k][i] < 0:
                raise self._no_row(rule, f"has no token {rule.token!r}")
            return k
        assert isinstance(rule.row, OtherRow)
        token = rule.row.token
        number = token if isinstance(token, int) else self._members[rule.model].vocabulary.ids.get(token, -1)
        if not 0 <= number < models[k][1]:
            raise self._no_row(rule, f"has no token {token!r} with a row of its {models[k][1]}")
        return CONSTANT_ROW - constants.setdefault((k, number), len(constants))

    def _no_row(self, rule: TokenRule, found: str) -> RecipeError:
        recipe = self._where.removesuffix(f": {self._section.place}")
        return RecipeError(f"{recipe}: {rule.place}.source: {rule.model} {found}; expected a row of it.")

    def _note(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)


def _check_plain(model: str, stored: Stored) -> None:
    """Raise unless the rows of a file are the numbers themselves.

    Raises:
        DTypeError: they are codes.
        AdapterError: an adapter adds to them.
    """
    where = f"tensor {stored.name!r}: {model}"
    if stored.blocks is not None:
        raise DTypeError(
            f"{where} has it as {stored.dtype} codes in {stored.path}, and its rows need another order; "
            f"expected one of {', '.join(sorted(MERGEABLE))}. Merge that model alone first, with "
            "`merge_method: passthrough` and `dtype: bfloat16`; that may be a stage of this recipe."
        )
    if stored.update is not None:
        raise AdapterError(
            f"{where} adds an adapter to it, and its rows need another order; expected an adapter that "
            "leaves tensors by token as they are. Merge that model alone first, with `merge_method: "
            "passthrough`; that may be a stage of this recipe."
        )
