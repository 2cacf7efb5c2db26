"""Checkpoints that exist as headers only, for what is decided before a tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tvfast.checkpoint.reading import Checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.dtypes import n_bytes
from tvfast.engine.binding import Binding, bind
from tvfast.engine.tasks import Task
from tvfast.recipe import parse_recipe

IN_LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def names(n_layers: int = 5, *, head: bool = True) -> Iterator[str]:
    """Of a small Llama, in the order of its file."""
    if head:
        yield "lm_head.weight"
    yield "model.embed_tokens.weight"
    for layer in range(n_layers):
        for part in IN_LAYER:
            yield f"model.layers.{layer}.{part}.weight"
    yield "model.norm.weight"


def checkpoint(
    path: str,
    n_layers: int = 5,
    *,
    dtype: str = "F32",
    head: bool = True,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[str, tuple[int, ...]] | None] | None = None,
    aliases: Mapping[str, str] | None = None,
    directory: str | None = None,
) -> Checkpoint:
    """A small Llama.

    Args:
        config: beside the number of layers.
        tensors: dtype and shape of single tensors, added or changed; None removes one.
        aliases: tensors that are another one.
    """
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (dtype, (8,) if "norm" in name else (4, 8)) for name in names(n_layers, head=head)
    }
    for name, found in (tensors or {}).items():
        if found is None:
            del wanted[name]
        else:
            wanted[name] = found
    file = f"{path}/model.safetensors"
    stored: dict[str, Stored] = {}
    offset = 1024
    for name, (kind, shape) in wanted.items():
        size = n_bytes(kind, math.prod(shape))
        stored[name] = Stored(name, file, offset, size, kind, shape)
        offset += size
    for name, first in (aliases or {}).items():
        twin = stored[first]
        stored[name] = Stored(name, file, twin.offset, twin.n_bytes, twin.dtype, twin.shape)
    settings = {"num_hidden_layers": n_layers, "torch_dtype": "float32", **(config or {})}
    return Checkpoint(path, directory, stored, (file,), dict(aliases or {}), settings, ())


def bound(text: str, *, seed: int | None = None, **checkpoints: Checkpoint) -> Binding:
    """A recipe on checkpoints by name; those that are not given are small Llamas."""
    recipe = parse_recipe(text, "r.yml")
    return bind(recipe, {p: checkpoints.get(p) or checkpoint(p) for p in recipe.model_paths()}, seed=seed)


def task(binding: Binding, name: str) -> Task:
    """What is done for one tensor of the output."""
    return next(found for found in binding.tasks if found.name == name)
