"""A recipe with modules against a mergekit that runs now: an encoder and a decoder, named as in T5."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tests.parity.recipe_runs import VARIABLE

pytestmark = pytest.mark.slow

N_LAYERS = 3
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "num_layers": N_LAYERS,
    "num_decoder_layers": N_LAYERS,
    "vocab_size": 16,
    "torch_dtype": "float32",
}
ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("wi_0", "wi_1", "wo")


def names() -> list[str]:
    found = ["shared.weight", "lm_head.weight"]
    for part, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        found.append(f"{part}.final_layer_norm.weight")
        found.append(f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for k in range(N_LAYERS):
            blocks = [*parts, "DenseReluDense"]
            for i, block in enumerate(blocks):
                own = FEED_FORWARD if block == "DenseReluDense" else ATTENTION
                found += [f"{part}.block.{k}.layer.{i}.{block}.{one}.weight" for one in own]
                found.append(f"{part}.block.{k}.layer.{i}.layer_norm.weight")
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def test_modules_are_merged_as_mergekit_merges_them(tmp_path: Path) -> None:
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"set {VARIABLE} to a Python that has mergekit; tests/parity/make_env.sh makes one")
    paths = {}
    for seed, model in enumerate(("base", "a", "b")):
        (tmp_path / model).mkdir()
        generator = torch.Generator().manual_seed(seed)
        own = {name: torch.randn(8, 8, generator=generator) for name in names()}
        save_file(own, tmp_path / model / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / model / "config.json").write_text(json.dumps(CONFIG))
        paths[model] = str(tmp_path / model)
    base, a, b = paths.values()
    first = {"model": a, "layer_range": [0, 2], "parameters": {"weight": [0.1, 0.9]}}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "dtype": "float32",
        "modules": {
            "decoder": {
                "slices": [
                    {"sources": [{"model": base, "layer_range": [0, 2]}, first]},
                    {
                        "sources": [
                            {"model": base, "layer_range": [1, 3]},
                            {"model": b, "layer_range": [1, 3]},
                        ],
                        "parameters": {"weight": 0.7},
                    },
                ],
                "parameters": {"lambda": 0.5},
            },
            "encoder": {
                "models": [{"model": a, "parameters": {"weight": [0.2, 0.4]}}, {"model": b}],
                "parameters": {"weight": [{"filter": "SelfAttention", "value": [0, 1]}, {"value": 0.3}]},
            },
            "shared": {"models": [{"model": b}]},
        },
        "parameters": {"weight": 0.6},
    }
    path, theirs, ours = tmp_path / "recipe.yml", tmp_path / "theirs", tmp_path / "ours"
    path.write_text(json.dumps(recipe))
    command = [python, "-m", "mergekit.scripts.run_yaml", str(path), str(theirs)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A head is none of `shared` by its name.
    tvfast.merge_checkpoints({**recipe, "tvfast": {"modules": {"shared": ["shared", "lm_head"]}}}, ours)
    expected, found = tensors(theirs), tensors(ours)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert [config["num_layers"] for config in configs] == [3, 3]
    assert [config["num_decoder_layers"] for config in configs] == [4, 4]
