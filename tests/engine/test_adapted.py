"""Models that are a base with an adapter: the merge of the sum, which is written nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tests.engine.devices import small_units
from tvfast.errors import AdapterError, CheckpointError, RecipeError, ShapeError

__all__ = ["small_units"]

SHAPES = {
    "lm_head.weight": (300, 64),
    "model.embed_tokens.weight": (300, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.self_attn.q_proj.bias": (9000,),
    "model.layers.0.self_attn.q_proj.weight": (9000, 64),
    "model.norm.weight": (64,),
}
Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def base_tensors() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(5)
    return {name: (torch.randn(s, generator=drawn) * 0.02).bfloat16() for name, s in SHAPES.items()}


def write_adapter(
    folder: Path, modules: dict[str, int], *, seed: int = 0, whole: tuple[str, ...] = (), **config: Any
) -> dict[str, Tensor]:
    """An adapter of the given ranks; returns the exact tensors of the sum, in float64."""
    drawn = torch.Generator().manual_seed(100 + seed)
    base = base_tensors()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **config}
    ranks = {"r": 8, "lora_alpha": 16, **config}
    stored: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for module, rank in modules.items():
        rows, columns = SHAPES[f"{module}.weight"]
        embedding = module.endswith("embed_tokens")
        turned = embedding or bool(config.get("fan_in_fan_out"))
        n_in, n_out = (rows, columns) if turned else (columns, rows)
        a = torch.randn(rank, n_in, generator=drawn) * 0.1
        b = (torch.randn(n_out, rank, generator=drawn) * 0.1).bfloat16()
        kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        stored[f"base_model.model.{module}.{kind}A{end}"] = a
        stored[f"base_model.model.{module}.{kind}B{end}"] = b
        alpha = config.get("alpha_pattern", {}).get(module, ranks["lora_alpha"])
        factor = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        delta = factor * (b.double() @ a.double())
        sums[f"{module}.weight"] = base[f"{module}.weight"].double() + (delta.T if turned else delta)
    for name in whole:
        tensor = (torch.randn(SHAPES[name], generator=drawn) * 0.02).bfloat16()
        stored[f"base_model.model.{name}"] = tensor
        sums[name] = tensor.double()
    folder.mkdir(parents=True)
    save_file(stored, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return sums


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base_tensors(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "torch_dtype": "bfloat16"}))
    return folder


def applied(base: Path, adapter: Path, out: Path, **keys: Any) -> dict[str, Tensor]:
    config = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}], **keys}
    tvfast.merge_checkpoints(config, out)
    return load_file(out / "model.safetensors")


CONFIGS: list[dict[str, Any]] = [
    {},
    {"lora_alpha": 5, "use_rslora": True},
    {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {UP: 9}},
    {"fan_in_fan_out": True},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c) or "plain")
def test_the_sum_is_rounded_once(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """Within the rounding of float32 sums, then the nearest bfloat16; everything else is the base's."""
    rank = 3 if "rank_pattern" in config else 8
    modules = {Q: 8, UP: rank, "model.embed_tokens": 8}
    sums = write_adapter(tmp_path / "adapter", modules, whole=("model.norm.weight",), **config)
    wide = applied(base, tmp_path / "adapter", tmp_path / "wide", tvfast={"lora_merge_dtype": "float32"})
    plain = applied(base, tmp_path / "adapter", tmp_path / "plain")
    exact = applied(
        base,
        tmp_path / "adapter",
        tmp_path / "exact",
        out_dtype="float32",
        tvfast={"lora_merge_dtype": "float32"},
    )
    for name, tensor in base_tensors().items():
        assert plain[name].dtype is wide[name].dtype is torch.bfloat16
        if name not in sums:
            assert torch.equal(plain[name], tensor)
            continue
        scale = sums[name].abs().max()
        assert float((exact[name].double() - sums[name]).abs().max()) <= float(scale) * 10 * 2.0**-24 * 8
        assert torch.equal(plain[name], exact[name].bfloat16())
        assert torch.equal(plain[name], wide[name])


def merged(config: dict[str, Any], out: Path, **options: Any) -> bytes:
    tvfast.merge_checkpoints(config, out, **options)
    return (out / "model.safetensors").read_bytes()


def family(base: Path, models: list[str], **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models],
        "parameters": {"density": 0.5},
        **keys,
    }


@pytest.mark.usefixtures("small_units")
def test_a_merge_of_adapters_is_the_merge_of_the_models(base: Path, tmp_path: Path) -> None:
    """To the bit, with much memory and with little, on one thread and on two; two adapters of one base."""
    sums = [{Q: 8, UP: 8}, {Q: 8, DOWN: 8, "lm_head": 8}]
    for k, modules in enumerate(sums):
        write_adapter(tmp_path / f"adapter{k}", modules, seed=k)
        applied(base, tmp_path / f"adapter{k}", tmp_path / f"model{k}")
    references = [f"{base}+{tmp_path}/adapter{k}" for k in range(2)]
    whole = merged(family(base, [str(tmp_path / f"model{k}") for k in range(2)]), tmp_path / "whole")
    config = family(base, references)
    assert merged(config, tmp_path / "two", threads=2) == whole
    memory = 2**22
    streamed = tvfast.plan(config, memory=memory, threads=1)
    assert any(unit.chunk_bytes for unit in streamed.units)
    assert merged(config, tmp_path / "small", memory=memory, threads=1) == whole


def test_the_mapping_form_and_plus_signs_in_paths(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a+b", {UP: 8})
    (tmp_path / "adapter").symlink_to(tmp_path / "a+b")
    mapping = {"model": {"path": str(base)}, "lora": {"path": str(tmp_path / "a+b")}}
    one = merged({"merge_method": "passthrough", "models": [{"model": mapping}]}, tmp_path / "one")
    applied(base, tmp_path / "adapter", tmp_path / "two")
    assert one == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_a_changed_adapter_is_another_merge(base: Path, tmp_path: Path) -> None:
    """`--resume` of a finished merge notices another scaling."""
    write_adapter(tmp_path / "adapter", {UP: 8})
    config = {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path}/adapter"}]}
    tvfast.merge_checkpoints(config, tmp_path / "out")
    assert tvfast.merge_checkpoints(config, tmp_path / "out", resume=True).finished_before
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 17}))
    with pytest.raises(tvfast.errors.OutputError):
        tvfast.merge_checkpoints(config, tmp_path / "out", resume=True)


def test_adapters_of_convolutions(tmp_path: Path) -> None:
    """A [r, in, 3, 3] and B [out, r, 1, 1]."""
    w = torch.randn(10, 6, 3, 3)
    a, b = torch.randn(4, 6, 3, 3), torch.randn(10, 4, 1, 1)
    for folder, tensors in (
        ("base", {"conv.weight": w}),
        ("adapter", {"base_model.model.conv.lora_A.weight": a, "base_model.model.conv.lora_B.weight": b}),
    ):
        (tmp_path / folder).mkdir()
        name = "model" if folder == "base" else "adapter_model"
        save_file(tensors, tmp_path / folder / f"{name}.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = applied(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")["conv.weight"]
    delta = (b.flatten(1).double() @ a.flatten(1).double()).reshape(w.shape)
    assert float((found.double() - (w.double() + delta)).abs().max()) < 1e-5


# -- refusals -------------------------------------------------------------------------------------------


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        tvfast.plan({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]})
    assert isinstance(caught.value, AdapterError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"r": 4}, "expected rank 4"),
        ({"rank_pattern": {"up_proj": 2}}, "expected rank 2"),
        ({"rank_pattern": {"(": 2}}, "'('"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    base: Path, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    write_adapter(tmp_path / "adapter", {UP: 8})
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **config}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    found = refusal(base, tmp_path / "adapter")
    assert said in found
    assert str(tmp_path / "adapter") in found


def test_the_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    """An unknown target, another shape, half a pair, and magnitudes of DoRA in the file alone."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/other"}

    def adapter(name: str, tensors: dict[str, Tensor]) -> Path:
        (tmp_path / name).mkdir()
        prefixed = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
        save_file(prefixed, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path / name

    a, b = torch.zeros(2, 64), torch.zeros(96, 2)
    other = {"model.layers.9.x.lora_A.weight": a, "model.layers.9.x.lora_B.weight": b}
    unknown = refusal(base, adapter("unknown", other))
    assert "'model.layers.9.x'" in unknown
    assert "'org/other'" in unknown
    half = refusal(base, adapter("half", {f"{UP}.lora_A.weight": a}))
    assert "lora_A without its counterpart" in half
    tensors = {f"{UP}.lora_A.weight": a, f"{UP}.lora_B.weight": b}
    dora = refusal(base, adapter("dora", {**tensors, f"{UP}.lora_magnitude_vector": torch.zeros(96)}))
    assert "DoRA" in dora
    shape = adapter("shape", {f"{UP}.lora_A.weight": torch.zeros(2, 63), f"{UP}.lora_B.weight": b})
    with pytest.raises(ShapeError, match=r"\[96, 63\].*\[96, 64\]"):
        tvfast.plan({"merge_method": "passthrough", "models": [{"model": f"{base}+{shape}"}]})
    whole = adapter("whole", {"lm_head.weight": torch.zeros(301, 64)})
    with pytest.raises(ShapeError, match="another vocabulary"):
        tvfast.plan({"merge_method": "passthrough", "models": [{"model": f"{base}+{whole}"}]})


def test_an_output_is_not_written_into_an_adapter(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", {UP: 8})
    with pytest.raises(tvfast.errors.OutputError, match="input"):
        applied(base, tmp_path / "adapter", tmp_path / "adapter")


@pytest.mark.parametrize("model", ["a+", "+b", "a+b+c"])
def test_names_with_misplaced_plus_signs_are_refused(model: str) -> None:
    with pytest.raises(RecipeError, match="base\\+adapter"):
        tvfast.load_recipe({"merge_method": "passthrough", "models": [{"model": model}]})


def test_a_directory_without_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in refusal(base, tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "no weights" in refusal(base, tmp_path / "empty")
