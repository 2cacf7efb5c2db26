"""Adapters of the difference of two models: applied to the base they give the model back, nearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tvfast.cli.main import main
from tvfast.errors import ArgumentError, DTypeError, OutputError, ShapeError, StateDictError

SHAPES = {
    "lm_head.weight": (220, 96),
    "model.embed_tokens.weight": (220, 96),
    **{
        f"model.layers.{layer}.{part}": shape
        for layer in range(2)
        for part, shape in {
            "input_layernorm.weight": (96,),
            "self_attn.q_proj.weight": (160, 96),
            "self_attn.q_proj.bias": (160,),
            "self_attn.k_proj.weight": (6, 96),
            "mlp.down_proj.weight": (96, 200),
        }.items()
    },
    "model.norm.weight": (96,),
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 220}


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a model that differs by rank 4 in float32, in biases, norms, embeddings, not in k_proj."""
    drawn = torch.Generator().manual_seed(2)
    base = {name: torch.randn(shape, generator=drawn) * 0.02 for name, shape in SHAPES.items()}
    tuned = {}
    for name, tensor in base.items():
        if len(tensor.shape) == 1 or "embed" in name or "head" in name:
            tuned[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=drawn)
        elif "k_proj" in name:
            tuned[name] = tensor
        else:
            left = torch.randn(tensor.shape[0], 4, generator=drawn)
            tuned[name] = tensor + 0.01 * left @ torch.randn(4, tensor.shape[1], generator=drawn)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    return tmp_path / "base", tmp_path / "tuned"


def applied(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    config = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    tvfast.merge_checkpoints(config, out)
    return load_file(out / "model.safetensors")


def test_the_adapter_gives_the_model_back(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    found = tvfast.extract_lora(tuned, base, tmp_path / "adapter", rank=4)
    expected = load_file(tuned / "model.safetensors")
    for name, tensor in applied(base, tmp_path / "adapter", tmp_path / "out").items():
        assert torch.allclose(tensor, expected[name], atol=2e-6), name
    assert set(found.ranks.values()) == {4}
    assert max(found.errors.values()) < 1e-4
    assert found.equal == tuple(f"model.layers.{layer}.self_attn.k_proj" for layer in range(2))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["modules_to_save"] == ["embed_tokens", "input_layernorm", "lm_head", "norm"]
    assert config["bias"] == "all"
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"]) == (4, 4)


@pytest.mark.parametrize("distribute", [True, False])
def test_factors_are_the_leading_triplets(
    models: tuple[Path, Path], tmp_path: Path, distribute: bool
) -> None:
    base, tuned = models
    tvfast.extract_lora(tuned, base, tmp_path / "adapter", rank=3, distribute_scale=distribute)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    delta = sum(
        sign * load_file(folder / "model.safetensors")[f"{name}.weight"].double()
        for sign, folder in ((1, tuned), (-1, base))
    )
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    assert torch.allclose(b @ a, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-6)
    norms = a.norm(dim=1), b.norm(dim=0)
    expected = (s[:3].sqrt(), s[:3].sqrt()) if distribute else (s[:3], torch.ones(3, dtype=torch.float64))
    assert all(torch.allclose(x, y, rtol=1e-4) for x, y in zip(norms, expected, strict=True))


def test_smaller_ranks_are_patterns(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Singular values up to epsilon are dropped, and a matrix has no more than its sides."""
    base, tuned = models
    found = tvfast.extract_lora(tuned, base, tmp_path / "adapter", rank=7, sv_epsilon=1e-4, embed_lora=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert found.ranks["model.embed_tokens"] == config["r"] == 7
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"]["model.layers.0.mlp.down_proj"] == 4
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (7, 220)
    assert stored["base_model.model.lm_head.lora_A.weight"].shape == (7, 96)
    out = applied(base, tmp_path / "adapter", tmp_path / "out")
    expected = load_file(tuned / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(out[name], expected[name], atol=2e-6)
    start = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    gap = expected["model.embed_tokens.weight"] - start
    left = expected["model.embed_tokens.weight"] - out["model.embed_tokens.weight"]
    assert float(left.norm() / gap.norm()) == pytest.approx(found.errors["model.embed_tokens"], rel=1e-3)


def test_choices_of_modules(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    found = tvfast.extract_lora(
        tuned,
        base,
        tmp_path / "adapter",
        rank=2,
        include=["q_proj", "down_proj"],
        exclude=[r"layers\.1", "lm_head", "embed"],
        save_modules=["down_proj"],
    )
    assert set(found.ranks) == {"model.layers.0.self_attn.q_proj"}
    assert set(found.saved) == {
        "model.layers.0.self_attn.q_proj.bias",
        *(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)),
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["modules_to_save"] == ["down_proj"]
    skipped = tvfast.extract_lora(tuned, base, tmp_path / "other", rank=2, skip_undecomposable=True)
    assert not any("norm" in name for name in skipped.saved)


def test_models_in_bfloat16_and_eight_bits(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Δ is that of the stored numbers, in float32; factors have the base's type, or the one asked for."""
    base, tuned = models
    name = "model.layers.0.self_attn.q_proj"
    wide = load_file(tuned / "model.safetensors")[f"{name}.weight"]
    factor = wide.abs().max() / 448
    codes = (wide / factor).to(torch.float8_e4m3fn)
    (tmp_path / "c").mkdir()
    save_file({f"{name}.weight": codes, f"{name}.weight_scale": factor}, tmp_path / "c" / "model.safetensors")
    (tmp_path / "b").mkdir()
    start = load_file(base / "model.safetensors")[f"{name}.weight"].bfloat16()
    save_file({f"{name}.weight": start}, tmp_path / "b" / "model.safetensors")
    found = tvfast.extract_lora(tmp_path / "c", tmp_path / "b", tmp_path / "adapter", rank=96)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert a.dtype is b.dtype is torch.bfloat16
    delta = codes.float() * factor - start.float()
    left = float((delta - b.float() @ a.float()).norm() / delta.norm())
    assert found.errors[name] == pytest.approx(left, rel=1e-3)
    assert left < 0.01
    again = tvfast.extract_lora(
        tmp_path / "c", tmp_path / "b", tmp_path / "adapter", rank=96, dtype="float32", overwrite=True
    )
    assert again.errors[name] < 1e-5


def test_matrices_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's linear layers are [n_in, n_out]: A belongs to the rows."""
    start = {"h.0.mlp.c_fc.weight": torch.randn(60, 100), "wpe.weight": torch.randn(30, 60)}
    delta = torch.randn(60, 2) @ torch.randn(2, 100)
    name = "h.0.mlp.c_fc.weight"
    write(tmp_path / "base", start, model_type="gpt2")
    write(tmp_path / "tuned", {**start, name: start[name] + delta}, model_type="gpt2")
    tvfast.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=2)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.h.0.mlp.c_fc.lora_A.weight"].shape == (2, 60)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    found = applied(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert torch.allclose(found[name], start[name] + delta, atol=1e-5)


def test_a_resized_vocabulary_is_saved_whole(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    tensors = load_file(tuned / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(4, 96)])
    write(tmp_path / "larger", tensors, vocab_size=224)
    found = tvfast.extract_lora(tmp_path / "larger", base, tmp_path / "adapter", rank=2, embed_lora=True)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(found.saved)
    assert any("resize" in warning for warning in found.warnings)


# -- refusals and the command line ----------------------------------------------------------------------


def test_two_architectures_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    tensors = load_file(tuned / "model.safetensors")
    write(tmp_path / "less", {name: t for name, t in tensors.items() if "bias" not in name})
    with pytest.raises(StateDictError, match="lacks"):
        tvfast.extract_lora(tmp_path / "less", base, tmp_path / "out")
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(96, 201)
    write(tmp_path / "other", tensors)
    with pytest.raises(ShapeError, match=r"\[96, 201\]"):
        tvfast.extract_lora(tmp_path / "other", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "choice", [{"rank": 0}, {"tolerance": 0.0}, {"sv_epsilon": -1.0}, {"include": ["("]}, {"dtype": "int8"}]
)
def test_bad_numbers_are_refused(models: tuple[Path, Path], tmp_path: Path, choice: dict[str, Any]) -> None:
    base, tuned = models
    with pytest.raises(ArgumentError, match=next(iter(choice))):
        tvfast.extract_lora(tuned, base, tmp_path / "out", **choice)


def test_matrices_of_other_types_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(tuned / "model.safetensors")
    write(tmp_path / "wide", {**tensors, name: tensors[name].double()})
    with pytest.raises(DTypeError, match="F64"):
        tvfast.extract_lora(tmp_path / "wide", base, tmp_path / "out")


def test_equal_models_have_nothing_to_extract(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = models
    write(tmp_path / "same", load_file(base / "model.safetensors"))
    with pytest.raises(ArgumentError, match="agree in everything"):
        tvfast.extract_lora(tmp_path / "same", base, tmp_path / "out")


def test_an_adapter_is_not_overwritten_unasked(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    tvfast.extract_lora(tuned, base, tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="overwrite"):
        tvfast.extract_lora(tuned, base, tmp_path / "out", rank=2)
    tvfast.extract_lora(tuned, base, tmp_path / "out", rank=1, overwrite=True)
    with pytest.raises(OutputError, match="input"):
        tvfast.extract_lora(tuned, base, base, rank=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_one(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randn(40, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    left, right = torch.ones(40, 1), torch.linspace(-1, 1, 32)[None]
    for name, tensor in (("base", base), ("tuned", (base + 0.5 * left @ right).to(dtype))):
        write(tmp_path / name, {"model.layers.0.self_attn.q_proj.weight": tensor})
    tvfast.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "one", rank=1)
    kept = tvfast.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "two", sv_epsilon=1.0)
    assert kept.ranks == {"model.layers.0.self_attn.q_proj": 1}
    factors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    a, b = (next(t for name, t in factors.items() if f"lora_{side}" in name) for side in "AB")
    assert (a.shape, b.shape) == ((1, 32), (40, 1))
    product = b.float() @ a.float()
    assert torch.allclose(product, 0.5 * left @ right, atol=0.02)


def test_the_command_has_both_spellings(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = map(str, models)
    ours = ["extract-lora", tuned, "--base", base, "--out", str(tmp_path / "a"), "--rank", "3", "--json"]
    theirs = ["--model", tuned, "--base-model", base, "--out-path", str(tmp_path / "b"), "--max-rank", "3"]
    assert main(ours) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modules"]["model.layers.0.mlp.down_proj"]["rank"] == 3
    assert main(["extract-lora", *theirs]) == 0
    assert "4 modules of rank 3" in capsys.readouterr().out
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    flags = ["--lazy-unpickle", "--no-allow-crimes", "--device", "cpu", "-j", "1", "--random-seed", "7"]
    assert main(["extract-lora", *theirs, "--overwrite", *flags, "-v", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "note: --lazy-unpickle has no effect: tensors of .bin files" in said.err
    assert "note: --device has no effect: matrices are decomposed on the CPU." in said.err
    assert "--random-seed" not in said.err
    assert main(["extract-lora", "--base", base, "--out", str(tmp_path / "c")]) == 2
    assert "expected one" in capsys.readouterr().err
