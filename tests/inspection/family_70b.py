"""A family with the 723 tensor names of an 80-layer Llama, narrow enough to be made in seconds.

python -m tests.inspection.family_70b DIR writes `base`, `chat`, `code` and `math` there.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, WIDTH, KEYS, INNER, VOCABULARY = 80, 64, 16, 160, 320
MODELS = ("chat", "code", "math")


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "input_layernorm.weight": (WIDTH,),
            prefix + "mlp.down_proj.weight": (WIDTH, INNER),
            prefix + "mlp.gate_proj.weight": (INNER, WIDTH),
            prefix + "mlp.up_proj.weight": (INNER, WIDTH),
            prefix + "post_attention_layernorm.weight": (WIDTH,),
            prefix + "self_attn.k_proj.weight": (KEYS, WIDTH),
            prefix + "self_attn.o_proj.weight": (WIDTH, WIDTH),
            prefix + "self_attn.q_proj.weight": (WIDTH, WIDTH),
            prefix + "self_attn.v_proj.weight": (KEYS, WIDTH),
        }
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def write_family(root: Path, n_shards: int = 6) -> dict[str, Path]:
    """Directories by name. Code and math share a direction in the middle; chat moved the last layers most."""
    generator = torch.Generator().manual_seed(70)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {}
    members: dict[str, dict[str, Tensor]] = {name: {} for name in MODELS}
    for name, shape in shapes().items():
        norm = "norm" in name
        base[name] = (torch.ones(shape) if norm else 0.03 * noise(shape)).to(torch.bfloat16)
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        shared = noise(shape)
        for model in MODELS:
            size, common = _change(model, layer, name)
            own = math.sqrt(1 - common * common) * noise(shape) + common * shared
            moved = base[name].float() + size * own * noise(shape).abs()
            members[model][name] = moved.to(torch.bfloat16)
    return {
        model: _write(root / model, tensors, n_shards) for model, tensors in {"base": base, **members}.items()
    }


def _change(model: str, layer: int, name: str) -> tuple[float, float]:
    """Typical size of a model's change of a tensor, and how much of it all models share."""
    depth = max(layer, 0) / (LAYERS - 1)
    attention = 1.5 if "self_attn" in name else 1.0
    if "norm" in name:
        return 2e-3, 0.2
    if model == "chat":
        return attention * 3e-4 * (1 + 2.5 * depth**3), 0.15
    middle = math.exp(-(((depth - 0.45) / 0.22) ** 2))
    size = 4.5e-4 if model == "code" else 3.5e-4
    return attention * size * (0.7 + middle), 0.25 + 0.55 * middle


def _write(folder: Path, tensors: dict[str, Tensor], n_shards: int) -> Path:
    folder.mkdir(parents=True)
    names = list(tensors)
    for shard in range(n_shards):
        part = names[len(names) * shard // n_shards : len(names) * (shard + 1) // n_shards]
        file = folder / f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, file, {"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return folder


if __name__ == "__main__":
    for model, folder in write_family(Path(sys.argv[1])).items():
        print(f"{model}: {folder}")
