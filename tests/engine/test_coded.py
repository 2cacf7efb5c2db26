"""8-bit checkpoints: merges of what their codes mean, in blocks like the base's, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tests.conftest import load
from tests.engine.devices import merge_on, small_units
from tests.engine.double import HostDouble
from tvfast.errors import CheckpointError, MergeError

__all__ = ["small_units"]

SHAPES = {
    "lm_head.weight": (500, 192),
    "model.embed_tokens.weight": (500, 192),
    "model.layers.0.mlp.down_proj.weight": (192, 300),
    "model.layers.0.mlp.up_proj.weight": (300, 192),
    "model.layers.0.self_attn.q_proj.weight": (1300, 300),
    "model.norm.weight": (192,),
}
CODED = [name for name in SHAPES if "proj" in name]
MEMBERS = ("base", "ft0", "ft1")
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


def block_factors(values: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    largest = torch.zeros(math.ceil(values.shape[0] / rows), math.ceil(values.shape[1] / columns))
    for i in range(largest.shape[0]):
        for j in range(largest.shape[1]):
            block = values[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            largest[i, j] = block.abs().max()
    return (largest / 448).to(dtype)


def spread(factors: Tensor, shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    wide = factors.float().repeat_interleave(rows, 0)[: shape[0]]
    return wide.repeat_interleave(columns, 1)[:, : shape[1]]


def encoded(values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    factors = block_factors(values, rows, columns)
    codes = (values / spread(factors, values.shape, rows, columns)).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn), factors


def decoded(codes: Tensor, factors: Tensor, rows: int, columns: int) -> Tensor:
    return codes.float() * spread(factors, codes.shape, rows, columns)


def numbers() -> dict[str, dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=drawn) * 0.02 for name, shape in SHAPES.items()}
    found = {"base": base}
    for member in MEMBERS[1:]:
        found[member] = {
            name: tensor + torch.randn(tensor.shape, generator=drawn) * 0.004 for name, tensor in base.items()
        }
    return found


def write(
    folder: Path, tensors: dict[str, Tensor], *, block: tuple[int, int] | None, config: dict[str, Any]
) -> None:
    """A model whose projections are coded in blocks, or not."""
    folder.mkdir(parents=True)
    stored = {}
    for name, tensor in tensors.items():
        if name in CODED and block is not None:
            stored[name], stored[f"{name}_scale_inv"] = encoded(tensor, *block)
        else:
            stored[name] = tensor.bfloat16()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = {"num_hidden_layers": 1, "torch_dtype": "bfloat16", **config}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coded models, and under "wide" the bfloat16 ones with exactly their numbers."""
    root = tmp_path_factory.mktemp("coded")
    for member, tensors in numbers().items():
        write(root / member, tensors, block=(128, 128), config={"quantization_config": DEEPSEEK})
        coded = load_file(root / member / "model.safetensors")
        wide = {
            name: decoded(tensor, coded[f"{name}_scale_inv"], 128, 128) if name in CODED else tensor
            for name, tensor in coded.items()
            if not name.endswith("_scale_inv")
        }
        (root / "wide" / member).mkdir(parents=True)
        save_file(wide, root / "wide" / member / "model.safetensors", {"format": "pt"})
    return root


def recipe(root: Path, method: str, parameters: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [{"model": str(root / m), "parameters": {"weight": 0.6}} for m in MEMBERS[1:]],
        "parameters": parameters or {},
        **keys,
    }


METHODS = [
    ("task_arithmetic", {}),
    ("ties", {"density": 0.4}),
    ("dare_ties", {"density": 0.5}),
    ("della", {"density": 0.5, "epsilon": 0.1}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_codes_are_merged_as_their_numbers(
    family: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    """The merge of the same numbers in float32, to the bit; and re-encoded, to the bit of one rounding."""
    tvfast.merge_checkpoints(recipe(family / "wide", method, parameters, out_dtype="float32"), tmp_path / "w")
    tvfast.merge_checkpoints(recipe(family, method, parameters, out_dtype="float32"), tmp_path / "f")
    tvfast.merge_checkpoints(recipe(family, method, parameters), tmp_path / "c")
    wide, plain, coded = (load_file(tmp_path / name / "model.safetensors") for name in "wfc")
    assert plain.keys() == wide.keys() == SHAPES.keys()
    assert all(torch.equal(plain[name], wide[name]) for name in SHAPES)
    assert coded.keys() == {*SHAPES, *(f"{name}_scale_inv" for name in CODED)}
    for name in CODED:
        codes, factors = encoded(wide[name], 128, 128)
        assert torch.equal(coded[f"{name}_scale_inv"], factors)
        assert torch.equal(coded[name].view(torch.uint8), codes.view(torch.uint8))
    assert coded["model.norm.weight"].dtype is torch.bfloat16


def test_a_coded_merge_is_the_wide_one_within_rounding(family: Path, tmp_path: Path) -> None:
    """DeepSeek's layout merges and dequantises to within half a step of the bfloat16 merge."""
    tvfast.merge_checkpoints(
        recipe(family / "wide", "task_arithmetic", out_dtype="bfloat16"), tmp_path / "wide"
    )
    tvfast.merge_checkpoints(recipe(family, "task_arithmetic"), tmp_path / "coded")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    coded = load_file(tmp_path / "coded" / "model.safetensors")
    for name in CODED:
        factors = spread(coded[f"{name}_scale_inv"], SHAPES[name], 128, 128)
        error = (coded[name].float() * factors - wide[name].float()).abs()
        step = torch.maximum(wide[name].float().abs() * 2.0**-4, factors * 2.0**-10)
        assert bool((error <= step + wide[name].float().abs() * 2.0**-8).all())


def test_the_configuration_says_what_the_output_is(family: Path, tmp_path: Path) -> None:
    tvfast.merge_checkpoints(recipe(family, "task_arithmetic"), tmp_path / "coded")
    tvfast.merge_checkpoints(recipe(family, "task_arithmetic", dtype="bfloat16"), tmp_path / "wide")
    coded, wide = (json.loads((tmp_path / out / "config.json").read_text()) for out in ("coded", "wide"))
    assert coded["quantization_config"] == DEEPSEEK
    assert coded["torch_dtype"] == wide["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in wide


def test_the_configuration_of_another_model_learns_of_the_codes(family: Path, tmp_path: Path) -> None:
    """The output takes a 16-bit model's configuration, and 8-bit tensors of the model that is copied."""
    write(tmp_path / "plain", numbers()["base"], block=None, config={"hidden_size": 192})
    config = {
        "merge_method": "passthrough",
        "base_model": str(tmp_path / "plain"),
        "models": [{"model": str(family / "ft0")}],
    }
    tvfast.merge_checkpoints(config, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["hidden_size"], found["quantization_config"]) == (192, DEEPSEEK)


class Stop:
    """Progress of a run that breaks off after some writes."""

    def __init__(self, n_writes: int) -> None:
        self._left = n_writes

    def start(self, read_bytes: int, write_bytes: int) -> None: ...
    def read(self, n_bytes: int) -> None: ...
    def finish(self) -> None: ...

    def wrote(self, n_bytes: int) -> None:
        self._left -= 1
        if not self._left:
            raise RuntimeError("stopped")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("n_writes", [1, 2, 3])
def test_a_run_that_broke_off_goes_on(family: Path, tmp_path: Path, n_writes: int) -> None:
    """Codes and their scales are done together or not at all."""
    config = recipe(family, "ties", {"density": 0.4})
    tvfast.merge_checkpoints(config, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        tvfast.merge_checkpoints(config, tmp_path / "out", threads=1, progress=Stop(n_writes))
    report = tvfast.merge_checkpoints(config, tmp_path / "out", resume=True)
    assert report.resumed_bytes > 0
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_small_memory_and_threads_change_no_bit(
    family: Path,
    tmp_path: Path,
    method: str,
    parameters: dict[str, Any],
) -> None:
    """Cut at whole rows of blocks, streamed in chunks."""
    config = recipe(family, method, parameters)
    tvfast.merge_checkpoints(config, tmp_path / "whole", threads=2)
    for number, memory in enumerate((5 * 2**20, 12 * 2**20)):
        units = tvfast.plan(config, memory=memory, threads=1).units
        assert any(unit.chunk_bytes for unit in units) == (number == 0 and method != "task_arithmetic")
        report = tvfast.merge_checkpoints(config, tmp_path / str(number), memory=memory, threads=1)
        assert report.planned_peak_bytes <= memory
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / str(number) / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.usefixtures("small_units")
def test_a_device_changes_no_bit(family: Path, tmp_path: Path) -> None:
    config = recipe(family, "ties", {"density": 0.4})
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    for number, device_memory in enumerate((None, 3 * 2**20)):
        device = HostDouble(load("cpp-scalar"), seed=number, resumable=True)
        merge_on(device, config, tmp_path / str(number), device_memory=device_memory)
        expected = (tmp_path / "cpu" / "model.safetensors").read_bytes()
        assert (tmp_path / str(number) / "model.safetensors").read_bytes() == expected


def test_a_copy_keeps_codes_and_factors(family: Path, tmp_path: Path) -> None:
    config = {"merge_method": "passthrough", "models": [{"model": str(family / "ft0")}]}
    tvfast.merge_checkpoints(config, tmp_path / "out")
    assert planned_methods(config) == {"copy"}
    copied = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(family / "ft0" / "model.safetensors").items():
        assert torch.equal(copied[name].view(torch.uint8), tensor.view(torch.uint8))


def test_stacked_layers_take_their_scales_along(family: Path, tmp_path: Path) -> None:
    slices = [
        {"sources": [{"model": str(family / member), "layer_range": [0, 1]}]} for member in ("ft0", "base")
    ]
    tvfast.merge_checkpoints({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(found) == len(SHAPES) + 2 * len(CODED) + 3
    for layer, member in enumerate(("ft0", "base")):
        expected = load_file(family / member / "model.safetensors")
        for name in CODED:
            moved = name.replace("layers.0", f"layers.{layer}")
            assert torch.equal(found[moved].view(torch.uint8), expected[name].view(torch.uint8))
            assert torch.equal(found[f"{moved}_scale_inv"], expected[f"{name}_scale_inv"])


def planned_methods(config: dict[str, Any]) -> set[str]:
    return {method for _, _, _, method in tvfast.plan(config).tensors}


def test_a_coded_base_takes_bfloat16_models(family: Path, tmp_path: Path) -> None:
    """What is tuned in 16 bits from an 8-bit model."""
    config = recipe(family, "task_arithmetic", out_dtype="float32")
    config["models"] = [{"model": str(family / "wide" / "ft0"), "parameters": {"weight": 0.6}}]
    tvfast.merge_checkpoints(config, tmp_path / "mixed")
    config["base_model"] = str(family / "wide" / "base")
    tvfast.merge_checkpoints(config, tmp_path / "wide")
    mixed, wide = (load_file(tmp_path / out / "model.safetensors") for out in ("mixed", "wide"))
    assert all(torch.equal(mixed[name], wide[name]) for name in SHAPES)


@pytest.mark.parametrize(
    "shape_of_factors", ["tensor", "scalar", "rows", "row column", "block"], ids=lambda s: s.replace(" ", "-")
)
def test_scales_of_compressed_tensors(tmp_path: Path, shape_of_factors: str) -> None:
    """`weight_scale` by tensor, row or block; activations' scales are the base's and leave with the codes."""
    name, module = "layers.0.proj.weight", "layers.0.proj"
    drawn = torch.Generator().manual_seed(1)
    base = torch.randn(160, 96, generator=drawn)
    block = {"tensor": (160, 96), "scalar": (160, 96), "block": (64, 32)}.get(shape_of_factors, (1, 96))
    expected = []
    for k, member in enumerate(("a", "b")):
        codes, factors = encoded(base + k * 0.1 * torch.randn(160, 96, generator=drawn), *block)
        expected.append(decoded(codes, factors, *block))
        shapes = {"tensor": (1,), "scalar": (), "rows": (160,)}
        stored = factors.reshape(shapes.get(shape_of_factors, factors.shape)).bfloat16()
        expected[-1] = decoded(codes, stored.float().reshape(factors.shape), *block)
        tensors = {name: codes, f"{name}_scale": stored, f"{module}.input_scale": torch.tensor(k + 1.0)}
        (tmp_path / member).mkdir()
        save_file(tensors, tmp_path / member / "model.safetensors")
        group = {"weights": {"block_structure": [64, 32]}}
        quantised = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        (tmp_path / member / "config.json").write_text(json.dumps({"quantization_config": quantised}))
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / m), "parameters": {"weight": 1.0}} for m in ("a", "b")],
    }
    report = tvfast.merge_checkpoints(config, tmp_path / "coded")
    assert any("input_scale" in warning for warning in report.warnings)
    tvfast.merge_checkpoints({**config, "out_dtype": "float32"}, tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    coded = load_file(tmp_path / "coded" / "model.safetensors")
    assert wide.keys() == {name}
    assert torch.equal(wide[name], (expected[0] * 0.5 + expected[1] * 0.5))
    assert coded.keys() == {name, f"{name}_scale", f"{module}.input_scale"}
    assert coded[f"{module}.input_scale"] == 1.0
    found = decoded(coded[name], coded[f"{name}_scale"].float().reshape(factors.shape), *block)
    assert float((found - wide[name]).abs().max()) <= float(wide[name].abs().max()) * 2.0**-4 * 1.01


def test_powers_of_two_stay_powers_of_two(tmp_path: Path) -> None:
    for k, member in enumerate(("a", "b")):
        codes = torch.randint(0, 120, (130, 60), dtype=torch.uint8).view(torch.float8_e4m3fn)
        factors = torch.full((2, 1), 2.0 ** -(5 + k)).to(torch.float8_e8m0fnu)
        (tmp_path / member).mkdir()
        save_file({"p.weight": codes, "p.weight_scale_inv": factors}, tmp_path / member / "model.safetensors")
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / m), "parameters": {"weight": 1.0}} for m in ("a", "b")],
    }
    tvfast.merge_checkpoints(config, tmp_path / "out")
    tvfast.merge_checkpoints({**config, "out_dtype": "float32"}, tmp_path / "wide")
    coded = load_file(tmp_path / "out" / "model.safetensors")
    wide = load_file(tmp_path / "wide" / "model.safetensors")["p.weight"]
    largest = torch.stack([part.abs().max() for part in wide.split(128)])[:, None]
    assert coded["p.weight_scale_inv"].dtype is torch.float8_e8m0fnu
    assert torch.equal(coded["p.weight_scale_inv"].float(), torch.exp2(torch.ceil(torch.log2(largest / 448))))


# -- refusals -------------------------------------------------------------------------------------------


def without(folder: Path, out: Path, names: list[str], **changed: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    out.mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if name not in names} | changed
    save_file(kept, out / "model.safetensors")


def test_codes_without_scales_are_refused_by_name(family: Path, tmp_path: Path) -> None:
    lost = f"{CODED[0]}_scale_inv"
    without(family / "ft0", tmp_path / "broken", [lost])
    config = recipe(family, "task_arithmetic")
    config["models"][0]["model"] = str(tmp_path / "broken")
    with pytest.raises(CheckpointError) as caught:
        tvfast.plan(config)
    assert str(tmp_path / "broken" / "model.safetensors") in str(caught.value)
    assert CODED[0] in str(caught.value)
    assert lost in str(caught.value)
    assert "on_missing_scale" in str(caught.value)


def test_unscaled_codes_can_be_meant(tmp_path: Path) -> None:
    tensors = {"p.weight": (torch.randn(40, 30) * 9).to(torch.float8_e5m2)}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / "a"), "parameters": {"weight": 0.75}}],
        "parameters": {"normalize": False},
        "tvfast": {"on_missing_scale": "one"},
    }
    tvfast.merge_checkpoints(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {"p.weight"}
    expected = (tensors["p.weight"].float() * 0.75).to(torch.float8_e5m2)
    assert torch.equal(found["p.weight"].view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (torch.ones(3, 9), "shape [3, 9]; expected one factor"),
        (torch.ones(2, 3, dtype=torch.float64), "stored as F64"),
    ],
)
def test_scales_that_fit_nothing_are_refused(
    family: Path, tmp_path: Path, factors: Tensor, said: str
) -> None:
    name = f"{CODED[0]}_scale_inv"
    without(family / "base", tmp_path / "broken", [name], **{name: factors})
    with pytest.raises(CheckpointError) as caught:
        tvfast.plan({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "broken")}]})
    assert said in str(caught.value)
    assert name in str(caught.value)
    assert CODED[0] in str(caught.value)


@pytest.mark.parametrize("place", ["code", "scale"])
def test_codes_that_are_no_numbers_are_refused(family: Path, tmp_path: Path, place: str) -> None:
    tensors = load_file(family / "ft0" / "model.safetensors")
    name = CODED[1] if place == "code" else f"{CODED[1]}_scale_inv"
    changed = tensors[name].clone()
    if place == "code":
        changed.view(torch.uint8)[200, 5] = 0x7F
    else:
        changed[1, 0] = torch.inf
    without(family / "ft0", tmp_path / "broken", [], **{name: changed})
    config = recipe(family, "task_arithmetic")
    config["models"][0]["model"] = str(tmp_path / "broken")
    with pytest.raises(MergeError, match="NaN or infinity") as caught:
        tvfast.merge_checkpoints(config, tmp_path / "out")
    assert CODED[1] in str(caught.value)
