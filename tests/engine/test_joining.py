"""Slices of several models: what does not make one model is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tvfast
from tests.vocabularies import EMBEDDINGS, HEAD, tokenizer, write_model
from tvfast.errors import DTypeError, ShapeError, StateDictError, TvfastError

WORDS = ["x", "y", "z"]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a", tokenizer(WORDS), 3, seed=1)


def joined(**keys: Any) -> dict[str, Any]:
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 1]}]},
        {"sources": [{"model": "b", "layer_range": [1, 2]}]},
    ]
    return {"merge_method": "passthrough", "slices": slices, **keys}


def refused(error: type[TvfastError], words: str, **keys: Any) -> None:
    for call in (tvfast.plan, lambda config, **own: tvfast.merge_checkpoints(config, "out", **own)):
        with pytest.raises(error, match=words):
            call(joined(**keys), device="cpu")
    assert not Path("out").exists()


def rewritten(drop: tuple[str, ...] = (), **more: torch.Tensor) -> None:
    """Model b without some tensors, and with others."""
    state = load_file("b/model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(drop or ("-",))}
    save_file({**kept, **more}, "b/model.safetensors")


def test_other_widths() -> None:
    write_model(Path("b"), tokenizer(WORDS), 3, seed=2, width=16)
    refused(ShapeError, r"slices: a and b do not fit together: '[a-z_.]+' has shape \[3, 8\] in the first")


def test_other_vocabularies_need_a_tokenizer() -> None:
    write_model(Path("b"), tokenizer(["x", "q"]), 2, seed=2)
    refused(
        ShapeError, r"has shape \[3, 8\] in the first, \[2, 8\] in the second.*tokenizer: \{source: union\}"
    )
    tvfast.merge_checkpoints(joined(tokenizer_source="union"), "out", device="cpu")
    out = load_file("out/model.safetensors")
    assert out[EMBEDDINGS].shape == out[HEAD].shape == (4, 8)


def test_another_inner_width() -> None:
    write_model(Path("b"), tokenizer(WORDS), 3, seed=2)
    rewritten(**{f"model.layers.{k}.mlp.up_proj.weight": torch.ones(24, 8) for k in range(2)})
    refused(ShapeError, r"'mlp.up_proj.weight' has shape \[16, 8\] in the first, \[24, 8\] in the second")


def test_tensors_that_one_of_them_lacks() -> None:
    write_model(Path("b"), tokenizer(WORDS), 3, seed=2, tied=True)
    refused(StateDictError, r"a and b have different tensors outside of the layers: the second lacks lm_head")
    tvfast.merge_checkpoints(joined(tvfast={"on_missing": "base"}), "out", device="cpu")
    assert HEAD not in load_file("out/model.safetensors"), "the recipe asked for it"


def test_tensors_that_one_of_them_has_in_its_layers() -> None:
    write_model(Path("b"), tokenizer(WORDS), 3, seed=2)
    rewritten(**{f"model.layers.{k}.self_attn.q_norm.weight": torch.ones(8) for k in range(2)})
    refused(StateDictError, "different tensors in their layers: the second has self_attn.q_norm.weight")


def test_layers_that_differ_within_a_model_may_differ_between_them() -> None:
    write_model(Path("b"), tokenizer(WORDS), 3, seed=2)
    rewritten(**{"model.layers.1.mlp.up_proj.weight": torch.ones(24, 8)})
    tvfast.merge_checkpoints(joined(), "out", device="cpu")


def test_numbers_and_codes() -> None:
    write_model(Path("b"), tokenizer(WORDS), 3, seed=2)
    state = load_file("b/model.safetensors")
    coded = {}
    for name, tensor in state.items():
        if "proj" in name:
            coded[name] = tensor.to(torch.float8_e4m3fn)
            coded[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file({**state, **coded}, "b/model.safetensors")
    config = json.loads(Path("b/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    Path("b/config.json").write_text(json.dumps(config))
    refused(DTypeError, r"in different ways: plain numbers, F8_E4M3 codes with weight_scale_inv of 8 x 16")
    tvfast.merge_checkpoints(joined(dtype="bfloat16"), "out", device="cpu")
    assert load_file("out/model.safetensors")["model.layers.1.mlp.up_proj.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize("whole", [False, True])
def test_another_architecture_of_equal_tensors_is_noted(whole: bool) -> None:
    write_model(Path("b"), tokenizer(WORDS), 3, seed=2)
    config = json.loads(Path("b/config.json").read_text())
    Path("b/config.json").write_text(json.dumps({**config, "architectures": ["MistralForCausalLM"]}))
    Path("a/config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    recipe = {"merge_method": "linear", "models": models} if whole else joined()
    found = " ".join(tvfast.plan(recipe, device="cpu").warnings)
    assert "b is of architecture MistralForCausalLM, a of LlamaForCausalLM" in found
