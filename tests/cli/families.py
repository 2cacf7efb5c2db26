"""Tiny families of sharded checkpoints, written by the safetensors package, and the command as a process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
HIDDEN, VOCABULARY, LAYERS = 16, 48, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOKENIZER_CONFIG = {"model_max_length": 128, "chat_template": TEMPLATE, "eos_token": "</s>"}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found[prefix + "input_layernorm.weight"] = (HIDDEN,)
        found[prefix + "self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        found[prefix + "self_attn.k_proj.weight"] = (HIDDEN // 2, HIDDEN)
        found[prefix + "mlp.gate_proj.weight"] = (24, HIDDEN)
        found[prefix + "mlp.down_proj.weight"] = (HIDDEN, 24)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], *, n_shards: int = 2, config: Mapping[str, Any] | None = None
) -> Path:
    """A model directory: shards, index, config and tokenizer files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    where = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        part = names[len(names) * shard // n_shards : len(names) * (shard + 1) // n_shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "from": folder.name}))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return folder


@dataclass(frozen=True, slots=True)
class Family:
    """A base and three fine-tunes of it, as tensors and as directories."""

    root: Path
    tensors: dict[str, dict[str, Tensor]]

    def path(self, member: str) -> Path:
        return self.root / member

    @property
    def base(self) -> dict[str, Tensor]:
        return self.tensors["base"]

    @property
    def models(self) -> list[dict[str, Tensor]]:
        return [self.tensors[f"ft{k}"] for k in (1, 2, 3)]


def make_family(root: Path, dtype: torch.dtype = torch.bfloat16, n_shards: int = 2) -> Family:
    """bf16 weights with σ 0.02 and fine-tuning noise 1e-3, so that thresholds meet ties."""
    generator = torch.Generator().manual_seed(7)

    def noise(shape: tuple[int, ...], scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    base = {name: noise(shape, 0.02).to(dtype) for name, shape in shapes().items()}
    tensors = {"base": base}
    for k in (1, 2, 3):
        tensors[f"ft{k}"] = {
            name: (t.float() + noise(tuple(t.shape), 1e-3)).to(dtype) for name, t in base.items()
        }
    for member, state in tensors.items():
        write_checkpoint(root / member, state, n_shards=n_shards)
    return Family(root, tensors)


def recipe(
    family: Family,
    method: str,
    *,
    base: str | None = "base",
    models: Mapping[str, Mapping[str, Any]] | None = None,
    **keys: Any,
) -> str:
    """YAML, written as JSON, which is YAML: model directories by their names in the family.

    `models` is parameters by name; without it, the three fine-tunes with weight 1.
    """
    found: dict[str, Any] = {"merge_method": method}
    if base is not None:
        found["base_model"] = str(family.path(base))
    chosen = {f"ft{k}": {"weight": 1.0} for k in (1, 2, 3)} if models is None else models
    found["models"] = [
        {"model": str(family.path(name)), **({"parameters": dict(numbers)} if numbers else {})}
        for name, numbers in chosen.items()
    ]
    return json.dumps({**found, "dtype": "bfloat16", **keys}, indent=1)


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory by the safetensors package, through the index where there is one."""
    index = folder / INDEX
    if not index.exists():
        return load_file(folder / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in sorted(set(where.values()))}
    assert sum(map(len, shards.values())) == len(where)
    return {name: shards[file][name] for name, file in where.items()}


def digest(folder: Path) -> dict[str, str]:
    """A checksum of every regular file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tvfast(
    *arguments: object, limit: Callable[[], None] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; 60 seconds are a hang. `limit` runs in it first."""
    return subprocess.run(
        [sys.executable, "-m", "tvfast", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=limit,
        env={**os.environ, **variables},
    )
