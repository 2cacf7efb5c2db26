"""An adapter's files: weights, configuration, model card; what makes it complete is written last."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvfast.checkpoint.layout import Described, file_header
from tvfast.checkpoint.stored import Stored
from tvfast.engine.durable import output_error, replace_file, sync_data
from tvfast.engine.output import check_writable, checked_output
from tvfast.engine.reading import bytes_of, tensor_in_memory
from tvfast.errors import OutputError

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"

_PREFIX = "base_model.model."
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PART = ".part"


@dataclass(slots=True)
class Contents:
    """What goes into an adapter.

    Attributes:
        base, model: paths of the two models.
        inputs: directories or files that are read.
        transposed: matrices are stored as [n_in, n_out].
        factors: (A, B) of each module.
        embeddings: modules among them whose factors are those of an embedding.
        whole: tensors that are saved as they are, by name.
        modules: every module by its kind: those with a matrix, and others.
    """

    base: str
    model: str
    inputs: tuple[str, ...]
    transposed: bool
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    whole: dict[str, Stored] = field(default_factory=dict)
    matrices: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def check_folder(out: str, inputs: Iterable[str], *, overwrite: bool) -> str:
    """The real path of the output directory, which an adapter may be written to.

    Raises:
        OutputError: it holds an adapter already, is no directory, or is one of the inputs.
    """
    folder = checked_output(out, list(inputs))
    check_writable(folder)
    found = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if os.path.lexists(os.path.join(folder, name))]
    if found and not overwrite:
        raise OutputError(
            f"{out} holds {', '.join(found)} already; name another directory, or pass --overwrite."
        )
    return folder


def write_adapter(contents: Contents, folder: str) -> int:
    """Write everything into the directory, and return the size of the weights.

    Raises:
        OutputError: the directory cannot be written.
        CheckpointError: an input changed meanwhile.
    """
    tensors = list(_tensors(contents))
    header = file_header(WEIGHTS_NAME, [described for described, _ in tensors], {})
    config = adapter_config(contents)
    try:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, WEIGHTS_NAME)
        with open(path + _PART, "wb") as file:
            file.write(header)
            for _, pieces in tensors:
                file.writelines(pieces)
            file.flush()
            sync_data(file.fileno())
            n_bytes = file.tell()
        stale = os.path.join(folder, CONFIG_NAME)
        if os.path.lexists(stale):  # until the new one is there, there is no adapter
            os.remove(stale)
        os.replace(path + _PART, path)
        for name, text in ((CARD_NAME, _card(contents, config)), (CONFIG_NAME, _json(config))):
            replace_file(os.path.join(folder, name), text.encode())
    except OSError as error:
        raise output_error(error, "write the adapter", folder) from error
    return n_bytes


def adapter_config(contents: Contents) -> dict[str, Any]:
    """`adapter_config.json`. Alpha is the rank, so that the product is added as it is."""
    ranks = {module: a.shape[0] for module, (a, _) in contents.factors.items()}
    most = max(ranks.values(), default=1)
    others = {module: rank for module, rank in ranks.items() if rank != most}
    saved = {name.rpartition(".")[0] for name in contents.whole}
    biases = any(_is_bias(name, contents) for name in contents.whole)
    return {
        "base_model_name_or_path": contents.base,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": contents.transposed,
        "inference_mode": True,
        "lora_alpha": most,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "modules_to_save": _targets(saved - ranks.keys(), [*contents.matrices, *contents.others]) or None,
        "peft_type": "LORA",
        "r": most,
        "rank_pattern": others,
        "target_modules": _targets(ranks.keys(), contents.matrices),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def _targets(wanted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Last parts of names where all modules that end so are wanted, whole names otherwise."""
    chosen = set(wanted)
    by_end: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        by_end[module.rpartition(".")[2]].append(module)
    found = []
    for end, members in by_end.items():
        if not end.isdecimal() and chosen.issuperset(members):
            found.append(end)
        else:
            found += [module for module in members if module in chosen]
    return sorted(found)


def _is_bias(name: str, contents: Contents) -> bool:
    """Whether a tensor belongs to a module with factors, and so not to one that is saved whole."""
    return name.rpartition(".")[0] in contents.factors


def _tensors(contents: Contents) -> Iterator[tuple[Described, Iterator[bytes]]]:
    for module, (a, b) in contents.factors.items():
        kind, end = ("lora_embedding_", "") if module in contents.embeddings else ("lora_", ".weight")
        for side, tensor in (("A", a), ("B", b)):
            described = (
                f"{_PREFIX}{module}.{kind}{side}{end}",
                _KINDS[tensor.dtype],
                tuple(tensor.shape),
            )
            yield described, iter([_bytes(tensor)])
    for name, stored in contents.whole.items():
        module, _, parameter = name.rpartition(".")
        layer = ".base_layer" if _is_bias(name, contents) else ""
        described = (f"{_PREFIX}{module}{layer}.{parameter}", stored.operand, stored.shape)
        yield described, bytes_of(stored) if stored.blocks is None else _numbers(stored)


def _numbers(stored: Stored) -> Iterator[bytes]:
    with tensor_in_memory(stored) as view:
        yield bytes(view)


def _bytes(tensor: Tensor) -> bytes:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)  # one row may have any strides
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _card(contents: Contents, config: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "---",
            "library_name: peft",
            "tags:",
            "- tvfast",
            "- lora",
            "---",
            "",
            "# LoRA adapter",
            "",
            f"The difference of `{contents.model}` and `{contents.base}`, in {len(contents.factors)} modules "
            f"of rank {config['r']} at most, extracted with `tvfast extract-lora`.",
            "",
        ]
    )
