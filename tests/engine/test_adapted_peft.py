"""Adapters that peft wrote, and adapters that peft loads: the same sums as peft's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tvfast

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    folder = tmp_path_factory.mktemp("peft") / "base"
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def applied(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    config = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    tvfast.merge_checkpoints(config, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "lora_alpha": 20, "target_modules": ["q_proj", "up_proj"]},
        {
            "r": 8,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 3},
        },
        {
            "r": 4,
            "target_modules": ["embed_tokens", "v_proj"],
            "modules_to_save": ["lm_head", "norm"],
            "bias": "all",
        },
    ],
    ids=["two", "all-linear", "embeddings"],
)
def test_what_peft_writes_is_applied_as_peft_applies_it(
    base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    """In float32 both are the same product, up to the order of its sums."""
    adapted = peft.get_peft_model(model(base), peft.LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in applied(base, tmp_path / "adapter", tmp_path / "out").items():
        bound = 16 * 2.0**-24 * (1 + float(expected[name].abs().max()))
        assert float((tensor - expected[name]).abs().max()) <= bound, name


def test_peft_loads_what_is_extracted(base: Path, tmp_path: Path) -> None:
    tuned = model(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.ndim == 1 or "embed" in name or "lm_head" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
            else:
                left = torch.randn(parameter.shape[0], 3)
                parameter.add_(0.01 * left @ torch.randn(3, parameter.shape[1]))
    tuned.save_pretrained(tmp_path / "tuned")
    tvfast.extract_lora(tmp_path / "tuned", base, tmp_path / "adapter", rank=3)
    found = peft.PeftModel.from_pretrained(model(base), tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in tuned.state_dict().items():
        assert torch.allclose(found[name], tensor, atol=2e-6), name
