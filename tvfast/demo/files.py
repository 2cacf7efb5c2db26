"""Checkpoints of the demonstration: sharded safetensors with an index, and recipes that merge them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

SHARD_BYTES = 400_000

_INDEX = "model.safetensors.index.json"


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a checkpoint in shards of about `SHARD_BYTES`; what was in its files before is replaced."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(map(_n_bytes, (*shards[-1].values(), tensor))) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.detach().contiguous()
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    total = {"total_size": sum(map(_n_bytes, tensors.values()))}
    (folder / _INDEX).write_text(json.dumps({"metadata": total, "weight_map": where}, indent=2) + "\n")


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by the safetensors package."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def recipe(
    method: str, base: Path | None, models: Sequence[Path], parameters: Mapping[str, float], *, weighted: bool
) -> str:
    """The YAML of one merge. `weighted`: every model has the weight 1."""
    lines = [f"merge_method: {method}"]
    if base is not None:
        lines.append(f"base_model: {json.dumps(str(base))}")
    lines.append("models:")
    for model in models:
        lines.append(f"  - model: {json.dumps(str(model))}")
        if weighted:
            lines += ["    parameters:", "      weight: 1.0"]
    if parameters:
        lines.append("parameters:")
        lines += [f"  {name}: {value}" for name, value in parameters.items()]
    lines += ["dtype: float32", "out_shard_size: 400KB"]
    return "\n".join(lines) + "\n"


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
