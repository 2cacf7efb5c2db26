"""Merges of checkpoints from dot products, by entries and of whole tensors: the bits of `merge`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tvfast.engine import plan as planning

SHAPES = {"embed.weight": (601, 1030), "norm.weight": (1030,), "proj.weight": (60, 500)}
MEMBERS = ("base", "ft1", "ft2", "ft3")

# method, parameters, models, whether the recipe names a base, passes where tensors do not fit the memory
STREAMED: list[tuple[str, dict[str, Any], int, bool, int]] = [
    ("nuslerp", {"weight": 0.5}, 2, True, 2),
    ("nuslerp", {"weight": 0.5}, 2, False, 2),
    ("multislerp", {"weight": 0.5}, 3, True, 2),
    ("multislerp", {"weight": 0.5}, 3, False, 2),
    ("karcher", {}, 3, False, 2),
    ("model_stock", {}, 3, True, 2),
    ("geometric_median", {"max_iter": 20}, 3, True, 2),
    ("nearswap", {"t": 5e-4}, 1, True, 1),
    ("ram", {"epsilon": 5e-4}, 3, True, 1),
    ("ramplus_tl", {"epsilon": 5e-4}, 3, True, 2),
    ("magmax", {}, 3, True, 1),
    ("magnitude_prune", {"density": 0.3}, 3, True, 2),
]
WHOLE: list[tuple[str, dict[str, Any], int, bool]] = [
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False}, 2, True),
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}, 2, False),
    ("model_stock", {"filter_wise": True}, 2, True),
    ("arcee_fusion", {}, 1, True),
    ("tsv_m", {}, 2, True),
]


def members() -> dict[str, dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=drawn) * 0.02 for name, shape in SHAPES.items()}
    found = {"base": {name: tensor.bfloat16() for name, tensor in base.items()}}
    for member in MEMBERS[1:]:
        found[member] = {
            name: (tensor.float() + torch.randn(tensor.shape, generator=drawn) * 1e-3).bfloat16()
            for name, tensor in found["base"].items()
        }
    return found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    for member, tensors in members().items():
        (root / member).mkdir()
        save_file(tensors, root / member / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that cut and stream tensors of hundreds of kilobytes."""
    for name in ("PROGRAM_BYTES", "SCRATCH_BYTES", "RANK_BYTES", "STREAM_BYTES"):
        monkeypatch.setattr(planning, name, 0)
    monkeypatch.setattr(planning, "UNIT_BYTES", 2**19)


def recipe(family: Path, method: str, parameters: dict[str, Any], n: int, base: bool) -> dict[str, Any]:
    named = {"base_model": str(family / "base")} if base else {}
    models = [{"model": str(family / member)} for member in MEMBERS[1 : n + 1]]
    return {"merge_method": method, **named, "models": models, "parameters": parameters}


def expected(method: str, parameters: dict[str, Any], n: int, base: bool) -> dict[str, Tensor]:
    own = {("weights" if key == "weight" else key): value for key, value in parameters.items()}
    if tvfast.methods.METHODS[method].optional_base:
        own["task_vectors"] = base
    tensors = members()
    return tvfast.merge(tensors["base"], [tensors[m] for m in MEMBERS[1 : n + 1]], method, **own)


def check(out: Path, wanted: dict[str, Tensor]) -> None:
    found = load_file(out / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(("method", "parameters", "n", "base", "n_passes"), STREAMED)
def test_memory_changes_no_bit(
    family: Path,
    tmp_path: Path,
    method: str,
    parameters: dict[str, Any],
    n: int,
    base: bool,
    n_passes: int,
) -> None:
    config = recipe(family, method, parameters, n, base)
    large = tvfast.merge_checkpoints(config, tmp_path / "large", threads=2)
    small = tvfast.merge_checkpoints(config, tmp_path / "small", threads=3, memory=3_000_000)
    assert (large.n_passes, small.n_passes) == (1, n_passes)
    wanted = expected(method, parameters, n, base)
    check(tmp_path / "large", wanted)
    check(tmp_path / "small", wanted)


@pytest.mark.parametrize(("method", "parameters", "n", "base"), WHOLE)
def test_whole_tensors(
    family: Path, tmp_path: Path, method: str, parameters: dict[str, Any], n: int, base: bool
) -> None:
    torch.set_num_threads(1)  # as the engine does
    tvfast.merge_checkpoints(recipe(family, method, parameters, n, base), tmp_path / "out", threads=2)
    check(tmp_path / "out", expected(method, parameters, n, base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arcee_fusion_on_the_cpu_needs_no_torch(family: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounded once, also where numbers begin at odd bytes of a file."""
    tensors = members()
    for member in ("base", "ft1"):
        (tmp_path / member).mkdir()
        odd = {"0": torch.zeros(1, dtype=torch.uint8)} | tensors[member]  # first in the file, one byte
        save_file(odd, tmp_path / member / "model.safetensors", {"format": "pt"})
    config = recipe(tmp_path, "arcee_fusion", {"lambda": 0.9}, 1, True)
    config |= {"dtype": "float32", "out_dtype": str(dtype).removeprefix("torch.")}
    script = (
        "import json, sys, tvfast; config, out = sys.argv[1:]; "
        "tvfast.merge_checkpoints(json.loads(config), out); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, json.dumps(config), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    wide = {m: {n: t.float() for n, t in tensors[m].items()} for m in ("base", "ft1")}
    merged = tvfast.merge(wide["base"], [wide["ft1"]], "arcee_fusion", scale=0.9)
    wanted = {name: tensor.to(dtype) for name, tensor in merged.items()}
    check(tmp_path / "out", wanted | {"0": torch.zeros(1, dtype=torch.uint8)})


def test_what_a_spectral_method_averages_is_in_the_report(family: Path, tmp_path: Path) -> None:
    report = tvfast.merge_checkpoints(recipe(family, "tsv_m", {}, 2, True), tmp_path / "out")
    assert "tsv_m: averaged, no matrices: 1 tensor (norm.weight)." in report.warnings


def test_karcher_counts_a_named_base_as_one_more_model(family: Path, tmp_path: Path) -> None:
    report = tvfast.merge_checkpoints(recipe(family, "karcher", {}, 2, True), tmp_path / "out")
    assert any("base_model: is one more input of 'karcher'" in warning for warning in report.warnings)
    tensors = members()
    wanted = tvfast.merge(tensors["ft1"], [tensors[m] for m in ("ft1", "ft2", "base")], "karcher")
    check(tmp_path / "out", wanted)


# Of an architecture that nobody has named: a vision tower, norms of heads, experts, a scalar, a tied head.
UNKNOWN = {
    "tower.patches.proj.weight": (8, 3, 4, 4),
    "tower.patches.proj.bias": (8,),
    "tower.blocks.0.attn.q_norm.weight": (16,),
    "tower.logit_scale": (),
    "text.embed.weight": (21, 40),
    "text.layers.0.linear_attn.A_log": (4,),
    "text.layers.0.experts.gate_up": (2, 12, 40),
    "text.layers.0.mixer.weight": (40, 24),
    "text.norm.weight": (40,),
}


def unknown_member(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=drawn) * 0.02 for name, shape in UNKNOWN.items()}
    drawn = torch.Generator().manual_seed(seed)
    for tensor in found.values():
        tensor += torch.randn(tensor.shape, generator=drawn) * 1e-3 * bool(seed)
    return {name: tensor.bfloat16() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("method", "parameters", "n"),
    [
        ("nuslerp", {"weight": 0.5}, 2),
        ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
        ("multislerp", {"weight": 0.5}, 3),
        ("karcher", {}, 3),
        ("model_stock", {}, 3),
        ("model_stock", {"filter_wise": True}, 3),
        ("nearswap", {"t": 5e-4}, 1),
        ("ram", {"epsilon": 5e-4}, 3),
        ("ramplus_tl", {"epsilon": 5e-4}, 3),
        ("arcee_fusion", {}, 1),
        ("geometric_median", {}, 3),
        ("consensus", {}, 3),
        ("pcb", {}, 3),
        ("magmax", {}, 3),
        ("tsv_m", {}, 3),
        ("iso_cts", {}, 3),
        ("knots", {}, 3),
        ("wudi", {}, 3),
    ],
)
def test_every_tensor_of_an_unknown_architecture_reaches_the_output(
    tmp_path: Path, method: str, parameters: dict[str, Any], n: int
) -> None:
    torch.set_num_threads(1)
    tensors = {member: unknown_member(k) for k, member in enumerate(MEMBERS)}
    config = {"architectures": ["NewForAnything"], "model_type": "new", "tie_word_embeddings": True}
    buffers = {"text.layers.0.positions": torch.arange(9), "text.mask": torch.ones(3, dtype=torch.bool)}
    for member, found in tensors.items():
        (tmp_path / member).mkdir()
        save_file(found | buffers, tmp_path / member / "model.safetensors", {"format": "pt"})
        (tmp_path / member / "config.json").write_text(json.dumps(config))
    base = method != "karcher"
    tvfast.merge_checkpoints(recipe(tmp_path, method, parameters, n, base), tmp_path / "out")
    own = {("weights" if key == "weight" else key): value for key, value in parameters.items()}
    wanted = tvfast.merge(tensors["base"], [tensors[m] for m in MEMBERS[1 : n + 1]], method, **own)
    check(tmp_path / "out", wanted | buffers)
    changed = load_file(tmp_path / "out" / "model.safetensors")
    for name in UNKNOWN:
        if tensors["base"][name].numel() > 20:
            assert not torch.equal(changed[name], tensors["base"][name]), name
