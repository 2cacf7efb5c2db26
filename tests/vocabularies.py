"""Tiny models whose vocabularies differ, and their tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, LAYERS = 8, 2
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokenizer(
    tokens: Sequence[str], added: Sequence[str] = (), special: Sequence[str] = ()
) -> dict[str, Any]:
    """A `tokenizer.json` of whole words; `added` and `special` follow them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    entries = [
        {
            "id": len(tokens) + k,
            "content": token,
            **flags,
            "normalized": k < len(added),
            "special": k >= len(added),
        }
        for k, token in enumerate((*added, *special))
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: k for k, token in enumerate(tokens)},
        "merges": [],
    }
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    return {"version": "1.0", **empty, "added_tokens": entries, "model": model}


def write_model(
    folder: Path,
    document: Mapping[str, Any] | None,
    n_rows: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    width: int = WIDTH,
    n_layers: int = LAYERS,
) -> dict[str, Tensor]:
    """A small Llama of `n_rows` tokens with that tokenizer, if any; its tensors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {EMBEDDINGS: noise(n_rows, width)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = noise(width, width)
        for part in ("gate", "up"):
            tensors[f"{prefix}mlp.{part}_proj.weight"] = noise(2 * width, width)
        tensors[f"{prefix}mlp.down_proj.weight"] = noise(width, 2 * width)
        for part in ("input", "post_attention"):
            tensors[f"{prefix}{part}_layernorm.weight"] = noise(width)
    tensors["model.norm.weight"] = noise(width)
    if not tied:
        tensors[HEAD] = noise(n_rows, width)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 2,
        "num_hidden_layers": n_layers,
        "vocab_size": n_rows,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    if document is not None:
        (folder / "tokenizer.json").write_text(json.dumps(document))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tensors


def vocabulary(folder: Path) -> dict[str, int]:
    """Token -> number of the tokenizer in a folder."""
    document = json.loads((folder / "tokenizer.json").read_text())
    added = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    return {**document["model"]["vocab"], **added}
