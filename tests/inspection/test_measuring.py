"""Figures of task vectors: any chunk, 8-bit codes, histograms, chance, against plain torch in float64."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.memory import peak_growth
from tvfast.checkpoint.factors import with_factors
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.cli.main import main
from tvfast.inspection.figures import TaskVectors
from tvfast.inspection.headers import header_differences
from tvfast.inspection.measuring import task_vectors
from tvfast.inspection.names import layer_of, module_of

LARGE, SMALL = (600, 700), (33, 65)


def opened(*paths: Path) -> list[Checkpoint]:
    return [with_factors(open_checkpoint(path), missing_is_one=True) for path in paths]


def family(folder: Path, dtype: torch.dtype) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """A base and two models with a tensor that a small chunk does not hold, small ones, and an empty one."""
    generator = torch.Generator().manual_seed(11)
    shapes = {
        "model.layers.0.up.weight": LARGE,
        "model.layers.1.up.weight": SMALL,
        "norm": (65,),
        "none": (0, 3),
    }
    base = {
        name: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()
    }
    states = [base] + [
        {
            name: (t.float() + 1e-3 * torch.randn(t.shape, generator=generator)).to(dtype)
            for name, t in base.items()
        }
        for _ in range(2)
    ]
    paths = []
    for at, state in enumerate(states):
        paths.append(folder / f"{at}.safetensors")
        save_file(state, paths[-1])
    return paths, states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_chunks_do_not_matter(tmp_path: Path, dtype: torch.dtype) -> None:
    paths, states = family(tmp_path, dtype)
    checkpoints = opened(*paths)
    whole = task_vectors(checkpoints, states[0])
    read: list[int] = []
    cut = task_vectors(checkpoints, states[0], chunk_bytes=1, read=read.append)
    assert json.dumps(cut.as_json()) == json.dumps(whole.as_json())
    n_bytes = sum(t.numel() * t.element_size() for state in states for t in state.values())
    assert n_bytes < sum(read) <= 3 * n_bytes  # a sample, and a second pass at most


def test_histograms_count_what_changed(tmp_path: Path) -> None:
    paths, states = family(tmp_path, torch.bfloat16)
    found = task_vectors(opened(*paths), states[0]).as_json()["histograms"]
    expected: dict[str, list[np.ndarray]] = {}
    for name, base in states[0].items():
        for k, model in enumerate(states[1:]):
            tau = (model[name].float() - base.float()).abs().flatten().numpy()
            exponents = np.frexp(tau[tau > 0])[1] - 1  # 2^e <= |tau| < 2^(e + 1)
            rows = expected.setdefault(layer_of(name), [np.zeros(0, int), np.zeros(0, int)])
            rows[k] = np.concatenate([rows[k], exponents])
    first = found["first_exponent"]
    n = len(found["total"][0])
    for layer, rows in expected.items():
        if layer == "none":
            assert layer not in found["layers"]
            continue
        counts = [np.bincount(exponents - first, minlength=n).tolist() for exponents in rows]
        assert found["layers"][layer] == counts
    for k, total in enumerate(found["total"]):
        columns = zip(*(rows[k] for rows in found["layers"].values()), strict=True)
        assert total == [sum(column) for column in columns]
    assert any(row[0] for row in found["total"])
    assert any(row[-1] for row in found["total"])


def test_the_base_has_a_norm(tmp_path: Path) -> None:
    paths, states = family(tmp_path, torch.bfloat16)
    found = task_vectors(opened(*paths), states[0]).as_json()
    for name, base in states[0].items():
        assert found["tensors"][name]["base_norm"] == pytest.approx(base.double().norm().item(), rel=1e-12)
    squares = sum(base.double().square().sum().item() for base in states[0].values())
    assert found["total"]["base_norm"] == pytest.approx(math.sqrt(squares), rel=1e-12)


def test_codes_are_compared_as_numbers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    shape, chunk = (1400, 640), 2**20
    scales = torch.rand(11, 5, generator=generator) * 1e-2
    codes = (torch.randn(shape, generator=generator) * 20).to(torch.float8_e4m3fn)
    spread = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    numbers = codes.float() * spread
    model = numbers + 1e-2 * torch.randn(shape, generator=generator)
    for name, state in {
        "coded": {"a.weight": codes, "a.weight_scale_inv": scales},
        "plain": {"a.weight": numbers},
        "model": {"a.weight": model},
    }.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    coded, plain = (
        task_vectors(
            opened(tmp_path / f"{base}.safetensors", tmp_path / "model.safetensors"),
            ["a.weight"],
            chunk_bytes=chunk,
        )
        for base in ("coded", "plain")
    )
    assert coded.tensors["a.weight"] == plain.tensors["a.weight"]
    assert coded.histograms.as_json() == plain.histograms.as_json()
    expected = (model.double() - numbers.double()).norm().item()
    assert coded.tensors["a.weight"].norms == pytest.approx([expected], rel=1e-6)


def test_codes_without_scales_are_not_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        state = {"x": torch.ones(4, 4).to(torch.float8_e5m2), "y": torch.ones(3)}
        save_file(state, tmp_path / f"{name}.safetensors")
    checkpoints = opened(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = header_differences(checkpoints)
    assert found.common == ("y",)
    assert found.not_compared == {"x": "stored as F8_E5M2 without scales"}


def test_scales_are_no_tensors_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(
        {"x": torch.ones(4, 4).to(torch.float8_e4m3fn), "x_scale": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    save_file({"x": torch.ones(4, 4, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    assert main(["inspect", "--json", *(str(tmp_path / f"{name}.safetensors") for name in "ab")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["tensors"] for one in found["differences"]["missing"]] == [[], []]
    assert found["differences"]["dtypes"] == {"x": ["F8_E4M3", "BF16"]}
    assert found["task_vectors"]["tensors"]["x"]["norms"] == [0.0]


@pytest.mark.parametrize("n_zero", [[0, 0], [6, 2, 0], [10, 10], [4, 10, 7, 1]])
def test_chance_is_that_of_drawn_signs(n_zero: list[int]) -> None:
    row = TaskVectors([[1.0] * len(n_zero)] * len(n_zero), n_zero, [0] * len(n_zero), 0, 10)
    expected = 0.0
    for signs in itertools.product((-1, 0, 1), repeat=len(n_zero)):
        densities = [1 - n / 10 for n in n_zero]
        weights = [1 - d if sign == 0 else d / 2 for d, sign in zip(densities, signs, strict=True)]
        expected += math.prod(weights) * (1 in signs and -1 in signs)
    assert row.share(row.chance) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.3.mlp.up_proj.weight", "mlp.up_proj"),
        ("model.layers.3.self_attn.q_proj.bias", "self_attn.q_proj.bias"),
        ("model.layers.60.mlp.experts.17.down_proj.weight", "mlp.experts.*.down_proj"),
        ("lm_head.weight", "lm_head"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("weight", "weight"),
    ],
)
def test_modules_have_names(name: str, module: str) -> None:
    assert module_of(name) == module


@pytest.mark.slow
def test_memory_is_bounded_by_chunks(tmp_path: Path) -> None:
    """Three files of 192 MiB with one tensor, measured in 16 MiB and what a selection takes."""
    setup = f"""
from safetensors.torch import save_file
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.inspection.measuring import task_vectors
paths = []
for k in range(3):
    paths.append({str(tmp_path)!r} + f"/{{k}}.safetensors")
    save_file({{"x": torch.rand(96 * 2**20, dtype=torch.bfloat16)}}, paths[-1])
opened = [open_checkpoint(path) for path in paths]
"""
    grown = peak_growth(setup, "task_vectors(opened, ['x'], chunk_bytes=16 * 2**20)")
    assert grown < 150 * 2**20
