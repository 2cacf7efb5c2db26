"""PEFT's LoRA adapters: which tensors of a model they change, from headers and configuration alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvfast.checkpoint.files import read_json, shown
from tvfast.checkpoint.header import Header, read_header
from tvfast.checkpoint.locating import locate_adapter
from tvfast.checkpoint.pytorch import read_pytorch
from tvfast.checkpoint.reading import Checkpoint, aliases_of
from tvfast.checkpoint.stored import LowRank, Stored
from tvfast.dtypes import MERGEABLE
from tvfast.errors import AdapterError, ShapeError

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CONFIG_BYTES = 2**22
_PATTERN_CHARACTERS = 1000
_PREFIX = "base_model.model."
_SHOWN = 3

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.[^.]+)?(?:\.weight)?")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.")

_UNSUPPORTED = {
    "use_dora": "DoRA, whose magnitudes rescale the sum",
    "use_qalora": "QALoRA, which pools its inputs",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "LoRA with biases of its own (lora_bias)",
    "alora_invocation_tokens": "activated LoRA, which holds for some tokens only",
    "trainable_token_indices": "rows of single tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "target_parameters": "LoRA of bare parameters (target_parameters)",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


@dataclass(frozen=True, slots=True)
class _Pair:
    """The factors of one module."""

    a: Stored
    b: Stored
    embedding: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter. No tensor has been read.

    Attributes:
        directory: where it lies.
        header: of its weights.
        config: `adapter_config.json`, parsed.
        pairs: by module of the model.
        whole: tensors that take the place of the model's, by their names there.
    """

    directory: str
    header: Header
    config: Mapping[str, Any]
    pairs: Mapping[str, _Pair]
    whole: Mapping[str, Stored]

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank of a module, and by what its product is multiplied.

        Raises:
            AdapterError: a rank or alpha that is no positive number, or a pattern that is none.
        """
        rank = self._number("r", "rank_pattern", module)
        alpha = self._number("lora_alpha", "alpha_pattern", module)
        if rank < 1 or rank != int(rank):
            raise self._error(f"the rank of {shown(module)} is {rank}; expected a positive integer")
        return int(rank), alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _number(self, key: str, patterns: str, module: str) -> float:
        """The value for a module: that of the first pattern that its name ends with, or the general one."""
        value = self.config.get(key)
        found = self.config.get(patterns) or {}
        if not isinstance(found, Mapping):
            raise self._error(f"{patterns} is {shown(found)}; expected an object")
        for pattern, special in found.items():
            if _ends_with(pattern, module, self):
                value = special
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._error(f"{key} is {shown(value)} for {shown(module)}; expected a number")
        return float(value)

    def _error(self, found: str) -> AdapterError:
        return AdapterError(f"{os.path.join(self.directory, _CONFIG)}: {found}.")


def open_adapter(path: str) -> Adapter:
    """The adapter at `path`, a directory or the id of one on the Hugging Face hub.

    Raises:
        CheckpointError: nothing there, or damaged.
        AdapterError: another kind than LoRA, or one that is more than a sum; it is named.
    """
    directory = locate_adapter(path)
    config = _read_config(directory)
    name = next((name for name in _WEIGHTS if os.path.lexists(os.path.join(directory, name))), None)
    if name is None:
        raise AdapterError(
            f"{directory}: has {_CONFIG} but no weights; expected {' or '.join(_WEIGHTS)}. Download the rest."
        )
    file = os.path.join(directory, name)
    header = read_header(file) if name == _WEIGHTS[0] else read_pytorch(file)
    pairs, whole = _sorted_out(header)
    return Adapter(directory, header, config, pairs, whole)


def with_adapter(checkpoint: Checkpoint, adapter: Adapter, *, dtype: str | None = None) -> Checkpoint:
    """The checkpoint with an adapter added: W + s B A, computed in float32 and rounded once.

    Args:
        dtype: that sums are rounded to; None: as the model stores the tensor, float32 where that is 8-bit.

    Raises:
        AdapterError: the adapter names what the model has not, or its rank is another than it says.
        ShapeError: its factors do not fit the model's tensors.
    """
    tensors = dict(checkpoint.tensors)
    unknown = [module for module in adapter.pairs if f"{module}.weight" not in tensors]
    unknown += [name for name in adapter.whole if name not in tensors]
    if unknown:
        raise _unknown(adapter, checkpoint, unknown)
    stored_as = dict(checkpoint.stored_as)
    for name, stored in adapter.whole.items():
        old = tensors[name]
        if stored.shape != old.shape:
            raise _other_shape(adapter, checkpoint, stored.name, stored.shape, old)
        tensors[name] = replace(stored, name=name)
        if old.blocks is None:
            stored_as[name] = old.dtype
    for module, pair in adapter.pairs.items():
        name = f"{module}.weight"
        tensors[name] = _updated(tensors[name], module, pair, adapter, checkpoint, dtype)
    return replace(
        checkpoint,
        tensors=tensors,
        files=(*checkpoint.files, adapter.header.path),
        aliases=aliases_of(tensors),
        headers=(*checkpoint.headers, adapter.header),
        adapter=adapter.directory,
        notes=(*checkpoint.notes, _note(adapter, dtype)),
        stored_as=stored_as,
    )


def _read_config(directory: str) -> Mapping[str, Any]:
    path = os.path.join(directory, _CONFIG)
    if not os.path.lexists(path):
        raise AdapterError(
            f"{directory}: has no {_CONFIG}; expected the directory of a PEFT adapter. Check the path behind "
            "the '+'."
        )
    config = read_json(path, _CONFIG_BYTES)
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: is {shown(config)}; expected a JSON object.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {shown(kind)}; expected 'LORA'. Merge the adapter into its base with peft."
        )
    start = config.get("init_lora_weights", True)
    refused = [what for key, what in _UNSUPPORTED.items() if config.get(key)]
    if not (isinstance(start, bool | str | None) and start in _PLAIN_STARTS):
        refused.append(f"an adapter that began as {shown(start)}, which changes the base (init_lora_weights)")
    if refused:
        raise AdapterError(
            f"{path}: is {refused[0]}; expected plain LoRA, W + s B A. Merge the adapter into its base with "
            "peft, or convert it."
        )
    return config


def _sorted_out(header: Header) -> tuple[dict[str, _Pair], dict[str, Stored]]:
    """Factors by module, and whole tensors by their names in the model."""
    sides: dict[str, dict[str, Stored]] = {}
    embeddings: set[str] = set()
    whole: dict[str, Stored] = {}
    for stored in header.tensors:
        name = stored.name.removeprefix(_PREFIX)
        where = f"{stored.path}: tensor {shown(stored.name)}"
        if "lora_magnitude_vector" in name:
            raise AdapterError(
                f"{where} is of DoRA, whose magnitudes rescale the sum; expected plain LoRA, W + s B A. "
                "Merge the adapter into its base with peft."
            )
        if name.endswith((".lora_A.bias", ".lora_B.bias")):
            raise AdapterError(f"{where} is a bias of LoRA's own; expected plain LoRA. Merge it with peft.")
        if stored.dtype not in MERGEABLE:
            raise AdapterError(f"{where} is {stored.dtype}; expected one of {', '.join(sorted(MERGEABLE))}.")
        found = _FACTOR.fullmatch(name)
        if found is None:
            whole[_WRAPPERS.sub(".", name)] = stored
            continue
        module, embedding, side = _WRAPPERS.sub(".", found[1] + ".")[:-1], found[2], found[3]
        if side in sides.setdefault(module, {}):
            raise AdapterError(f"{where}: {shown(module)} has two factors {side}; expected one adapter.")
        sides[module][side] = stored
        if embedding:
            embeddings.add(module)
    for module, found_sides in sides.items():
        if len(found_sides) != 2:
            (side,) = found_sides
            raise AdapterError(
                f"{header.path}: {shown(module)} has lora_{side} without its counterpart; expected both. "
                "Download or save the adapter again."
            )
    pairs = {module: _Pair(two["A"], two["B"], module in embeddings) for module, two in sides.items()}
    if not pairs and not whole:
        raise AdapterError(f"{header.path}: holds no tensor; expected factors of LoRA.")
    return pairs, whole


def _updated(
    old: Stored, module: str, pair: _Pair, adapter: Adapter, checkpoint: Checkpoint, dtype: str | None
) -> Stored:
    """The tensor with its factors."""
    rank, factor = adapter.scaling(module)
    if pair.a.shape[:1] != (rank,) or pair.b.shape[1:2] != (rank,):
        raise AdapterError(
            f"{adapter.header.path}: the factors of {shown(module)} have shapes {list(pair.a.shape)} and "
            f"{list(pair.b.shape)}; expected rank {rank}, as {_CONFIG} says (r, rank_pattern)."
        )
    transposed = pair.embedding or bool(adapter.config.get("fan_in_fan_out"))
    n_in, n_out = pair.a.n_elements // rank, pair.b.n_elements // rank
    rows, columns = (n_in, n_out) if transposed else (n_out, n_in)
    if len(old.shape) < 2 or old.shape[0] != rows or old.n_elements != rows * columns:
        raise _other_shape(adapter, checkpoint, module, (rows, columns), old)
    if old.operand not in MERGEABLE:
        raise AdapterError(
            f"{old.path}: tensor {shown(old.name)} is {old.dtype}, to which no adapter can be added; "
            f"expected one of {', '.join(sorted(MERGEABLE))}, or 8-bit codes with factors."
        )
    return replace(old, update=LowRank(pair.a, pair.b, rank, factor, transposed, dtype or old.operand))


def _ends_with(pattern: str, module: str, adapter: Adapter) -> bool:
    """Whether a module's name, or its end from a dot on, is what a pattern describes."""
    if len(pattern) <= _PATTERN_CHARACTERS:
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error:
            pass
    raise adapter._error(f"{shown(pattern)} is no pattern for names of modules")


def _note(adapter: Adapter, dtype: str | None) -> tuple[str, str]:
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")
    return _CONFIG, f"{[adapter.config.get(key) for key in keys]}, sums in {dtype}"


def _unknown(adapter: Adapter, checkpoint: Checkpoint, names: list[str]) -> AdapterError:
    listed = ", ".join(map(shown, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    base = adapter.config.get("base_model_name_or_path")
    of = f" {_CONFIG} says that its base is {shown(base)}." if isinstance(base, str) and base else ""
    head = ""
    if any("lm_head" in name for name in names) and (checkpoint.config or {}).get("tie_word_embeddings"):
        head = " The model reads its head from its embeddings (tie_word_embeddings)."
    return AdapterError(
        f"{adapter.header.path}: changes {listed} ({len(names)} of its "
        f"{len(adapter.pairs) + len(adapter.whole)} targets), which {checkpoint.path} has not; expected an "
        f"adapter of this model.{of}{head} Name the base that it was trained on."
    )


def _other_shape(
    adapter: Adapter, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], old: Stored
) -> ShapeError:
    rows = ""
    if shape[1:] == old.shape[1:]:
        rows = " If these are embeddings, the adapter was trained with another vocabulary."
    return ShapeError(
        f"{adapter.header.path}: {shown(name)} is for a tensor of shape {list(shape)}, but {shown(old.name)} "
        f"of {checkpoint.path} has {list(old.shape)}; expected an adapter of this model.{rows}"
    )
