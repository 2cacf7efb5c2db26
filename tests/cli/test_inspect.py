"""`tvfast inspect`: headers of one checkpoint, differences and task vectors of several."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tvfast
from tests.cli.families import CONFIG, LAYERS, Family, shapes, write_checkpoint
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.cli.main import main
from tvfast.comparing import layer_of as layer_of_compare
from tvfast.errors import CheckpointError
from tvfast.inspection.figures import TIE_DENSITY
from tvfast.inspection.headers import header_differences
from tvfast.inspection.measuring import task_vectors
from tvfast.inspection.names import layer_of


def found_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["inspect", "--json", *map(str, arguments)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found: dict[str, Any] = json.loads(shown.out)
    return found


def test_one_checkpoint(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    found = found_by(capsys, family.path("base"))
    n = sum(math.prod(shape) for shape in shapes().values())
    assert found["tensors"] == len(shapes())
    assert found["parameters"] == n
    assert found["dtypes"] == {"BF16": {"tensors": len(shapes()), "parameters": n, "bytes": 2 * n}}
    assert found["layers"] == {"model.layers": LAYERS}
    assert [file["name"] for file in found["files"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for file in found["files"]:
        assert file["bytes"] == (family.path("base") / file["name"]).stat().st_size
    assert found["config"]["hidden_size"] == CONFIG["hidden_size"]
    assert found["metadata"] == {"format": "pt"}
    assert main(["inspect", str(family.path("base"))]) == 0
    text = capsys.readouterr().out
    for part in (f"{n:,}", "BF16", f"{LAYERS} in model.layers", "model-00002-of-00002.safetensors", "llama"):
        assert part in text


def test_scales_of_eight_bit_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = [torch.zeros(200, 100, dtype=torch.float8_e4m3fn) for _ in range(4)]
    tensors = {
        "a.weight": codes[0],
        "a.weight_scale_inv": torch.ones(2, 1),
        "b.weight": codes[1],
        "b.weight_scale": torch.ones(200, 1),
        "c.weight": codes[2],
        "c.weight_scale": torch.ones(()),
        "d.weight": codes[3],
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = found_by(capsys, tmp_path / "model.safetensors")
    assert found["dtypes"]["F8_E4M3"] == {"tensors": 4, "parameters": 80000, "bytes": 80000}
    assert found["scales"] == {
        "by": {"one per block of 128 x 128": 1, "one per row": 1, "one per tensor": 1},
        "missing": ["d.weight"],
    }
    assert main(["inspect", str(tmp_path / "model.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "scales      of 1 tensor: one per block of 128 x 128" in text
    assert "8-bit without scales: d.weight" in text


def test_task_vectors_are_those_of_compare(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    found = found_by(capsys, *(family.path(name) for name in ("base", "ft1", "ft2", "ft3")))
    expected = tvfast.compare(family.base, family.models)
    rows = found["task_vectors"]["tensors"]
    assert set(rows) == set(expected.tensors)
    for name, row in rows.items():
        one = expected.tensors[name]
        assert row["norms"] == one.norms
        assert row["cosines"] == one.cosines
        assert row["sign_conflict"] == one.sign_conflict
        assert row["n_elements"] == one.n_elements
    for name, row in found["task_vectors"]["layers"].items():
        assert row["norms"] == expected.layers[name].norms
        assert row["cosines"] == expected.layers[name].cosines
    total = found["task_vectors"]["total"]
    assert total["norms"] == expected.total.norms
    assert total["sign_conflict"] == pytest.approx(expected.total.sign_conflict, rel=1e-12)


def test_sparsity_and_tie_mass_are_counts(family: Family) -> None:
    checkpoints = [open_checkpoint(str(family.path(name))) for name in ("base", "ft1", "ft2", "ft3")]
    found = task_vectors(checkpoints, family.base).tensors
    some_tied = 0
    for name, row in found.items():
        for k, model in enumerate(family.models):
            size = (model[name].float() - family.base[name].float()).abs().flatten()
            t = size.sort(descending=True).values[int(TIE_DENSITY * size.numel()) - 1]
            assert row.n_zero[k] == int((size == 0).sum())
            assert row.n_tied[k] == int((size == t).sum())
            some_tied += row.n_tied[k] > 1
    assert some_tied > len(found)


def test_the_table_has_a_line_per_layer(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *(str(family.path(name)) for name in ("base", "ft1", "ft2", "ft3"))]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    table = shown.out.split("\n\n")[-1].splitlines()
    layers = {layer_of(name) for name in shapes()}
    assert {line.split()[0] for line in table[1:]} == layers | {"all"}
    total = tvfast.compare(family.base, family.models).total
    assert [float(cell) for cell in table[-1].split()[1:4]] == pytest.approx(total.norms, rel=1e-3)
    assert [float(cell) for cell in table[-1].split()[4:7]] == pytest.approx(
        [total.cosines[0][1], total.cosines[0][2], total.cosines[1][2]], abs=1e-4
    )


@pytest.mark.parametrize("n_models", [1, 5])
def test_any_number_of_models_has_a_table(
    family: Family, capsys: pytest.CaptureFixture[str], n_models: int
) -> None:
    members = ["base", *(f"ft{k % 3 + 1}" for k in range(n_models))]
    assert main(["inspect", *(str(family.path(name)) for name in members)]) == 0
    header = capsys.readouterr().out.split("\n\n")[-1].splitlines()[0]
    assert header.count("norm") == n_models
    assert ("mean cos" in header) == (n_models == 5)


def test_differences_of_headers(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {name: tensor.clone() for name, tensor in family.models[0].items()}
    del other["model.layers.2.mlp.down_proj.weight"]
    other["extra.weight"] = torch.ones(3)
    other["lm_head.weight"] = other["lm_head.weight"][:40].clone()
    other["model.norm.weight"] = other["model.norm.weight"].float()
    path = write_checkpoint(tmp_path / "other", other)
    found = found_by(capsys, family.path("base"), path)
    assert found["differences"] == {
        "missing": [
            {"path": str(family.path("base")), "tensors": ["extra.weight"]},
            {"path": str(path), "tensors": ["model.layers.2.mlp.down_proj.weight"]},
        ],
        "shapes": {"lm_head.weight": [[48, 16], [40, 16]]},
        "dtypes": {"model.norm.weight": ["BF16", "F32"]},
        "not_compared": {},
    }
    compared = set(found["task_vectors"]["tensors"])
    assert compared == set(family.base) - {"model.layers.2.mlp.down_proj.weight", "lm_head.weight"}
    assert main(["inspect", str(family.path("base")), str(path)]) == 0
    text = capsys.readouterr().out
    assert f"{path} lacks model.layers.2.mlp.down_proj.weight" in text
    assert "shapes differ: lm_head.weight: [48, 16], [40, 16]" in text
    assert "types differ: model.norm.weight: BF16, F32" in text


def test_integers_are_listed_and_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(4), "ids": torch.arange(4)}, tmp_path / f"{name}.safetensors")
    found = found_by(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found["differences"]["not_compared"] == {"ids": "stored as I64"}
    row = found["task_vectors"]["tensors"]["x"]
    assert row["norms"] == [0.0]
    assert row["cosines"] == [[None]]  # the angle of a zero vector, and JSON has no NaN
    assert row["sparsity"] == [1.0]


def test_nothing_in_common_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(4)}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    assert found_by(capsys, *paths)["task_vectors"]["total"] is None
    assert main(["inspect", *paths]) == 0
    assert "lacks b" in capsys.readouterr().out


def test_tensors_may_be_empty_or_scalar(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = {"none": torch.ones(0, 3), "one": torch.tensor(value)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    checkpoints = [open_checkpoint(str(tmp_path / f"{name}.safetensors")) for name in ("a", "b")]
    found = task_vectors(checkpoints, header_differences(checkpoints).common).tensors
    assert found["none"].n_elements == 0
    assert found["one"].norms == [2.0]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(family: Family, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(1000)}, tmp_path / f"{name}.safetensors")
    checkpoints = [open_checkpoint(str(tmp_path / f"{name}.safetensors")) for name in ("a", "b")]
    file = tmp_path / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"b\.safetensors: ends at byte \d+; expected \d+ bytes"):
        task_vectors(checkpoints, ["x"])


@pytest.mark.parametrize(
    "name", [*shapes(), "transformer.h.11.attn.c_attn.weight", "visual.blocks.0.norm.bias"]
)
def test_layers_are_those_of_compare(name: str) -> None:
    assert layer_of(name) == layer_of_compare(name)


def test_a_missing_checkpoint_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"tvfast: error: {tmp_path / 'none'}: ")
    assert shown.err.count("\n") == 1


def test_it_needs_no_framework(family: Family) -> None:
    code = (
        "import sys\nfrom tvfast.cli.main import main\n"
        f"main(['inspect', {str(family.path('base'))!r}, {str(family.path('ft1'))!r}])\n"
        "print([name for name in ('torch', 'numpy', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
