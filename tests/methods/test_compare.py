"""`compare`: against torch in float64, by layer, and its edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tvfast
from tvfast.comparing import layer_of
from tvfast.errors import ArgumentError, ShapeError, StateDictError


def checkpoint(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed.weight": (11, 4),
        "model.layers.0.q.weight": (4, 4),
        "model.layers.0.norm.weight": (4,),
        "model.layers.10.q.weight": (4, 4),
        "lm_head.weight": (11, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def taus(base: dict[str, Tensor], models: list[dict[str, Tensor]], names: list[str]) -> Tensor:
    """[K, n] task vectors of some tensors side by side, in float64 from their float32 values."""
    return torch.stack([torch.cat([(m[k] - base[k]).view(-1) for k in names]).double() for m in models])


def check(row: tvfast.comparing.TensorComparison, vectors: Tensor) -> None:
    gram = vectors @ vectors.T
    norms = gram.diagonal().sqrt()
    assert torch.allclose(torch.tensor(row.gram, dtype=torch.float64), gram, rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.tensor(row.norms, dtype=torch.float64), norms, rtol=1e-12)
    cosines = gram / norms.view(-1, 1) / norms
    assert torch.allclose(torch.tensor(row.cosines, dtype=torch.float64), cosines, rtol=1e-12, atol=1e-12)
    conflict = (vectors > 0).any(0) & (vectors < 0).any(0)
    assert row.sign_conflict == int(conflict.sum()) / vectors.shape[1]
    assert row.n_elements == vectors.shape[1]


def test_tensors_layers_and_total() -> None:
    base, models = checkpoint(0), [checkpoint(k + 1) for k in range(3)]
    found = tvfast.compare(base, models)
    assert list(found.tensors) == list(base)
    for name in base:
        check(found.tensors[name], taus(base, models, [name]))
    assert list(found.layers) == ["model", "model.layers.0", "model.layers.10", "lm_head"]
    layer = ["model.layers.0.q.weight", "model.layers.0.norm.weight"]
    check(found.layers["model.layers.0"], taus(base, models, layer))
    check(found.total, taus(base, models, list(base)))


def test_quantities_are_also_dicts_by_name() -> None:
    base, models = checkpoint(0), [checkpoint(1), checkpoint(2)]
    found = tvfast.compare(base, models)
    for quantity in ("gram", "norms", "cosines", "sign_conflict"):
        by_tensor, by_layer = getattr(found, quantity), getattr(found.layers, quantity)
        assert list(by_tensor) == list(base)
        assert by_tensor["lm_head.weight"] == getattr(found.tensors["lm_head.weight"], quantity)
        assert by_layer["model.layers.10"] == getattr(found.layers["model.layers.10"], quantity)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("transformer.h.3.attn.c_attn.weight", "transformer.h.3"),
        ("vision.blocks.0.norm1.bias", "vision.blocks.0"),
        ("encoder.layer.7.output.dense.weight", "encoder.layer.7"),
        ("decoder.block.1.layer.0.SelfAttention.q.weight", "decoder.block.1"),
        ("layers.2.weight", "layers.2"),
        ("h.5", "h.5"),
        ("model.norm.weight", "model"),
        ("lm_head.weight", "lm_head"),
        ("tensor", "tensor"),
        ("3", "3"),
        ("mylayers.2x.weight", "mylayers"),
    ],
)
def test_layer_names(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_zero_vectors_have_no_angle() -> None:
    base = torch.ones(6)
    found = tvfast.compare(base, [base, 2 * base, 3 * base]).total
    assert found.norms[0] == 0.0
    assert all(math.isnan(c) for c in found.cosines[0])
    assert math.isnan(found.cosines[1][0])
    assert found.cosines[1][2] == pytest.approx(1.0, abs=1e-15)
    assert found.cosines[1][1] == 1.0


@pytest.mark.parametrize("size", [1e100, 1e-100])
def test_angles_of_very_long_and_very_short_vectors(size: float) -> None:
    base = torch.zeros(2, dtype=torch.float64)
    first, second = torch.tensor([3.0, 4.0]).double() * size, torch.tensor([4.0, 3.0]).double() * size
    cosines = torch.tensor(tvfast.compare(base, [first, second]).total.cosines, dtype=torch.float64)
    assert torch.allclose(cosines, torch.tensor([[1, 0.96], [0.96, 1]], dtype=torch.float64), rtol=1e-12)


def test_signs_conflict_where_both_occur() -> None:
    base = torch.zeros(5)
    models = [torch.tensor([1.0, -1.0, 0.0, 1.0, 2.0]), torch.tensor([-1.0, -1.0, 1.0, 0.0, -3.0])]
    assert tvfast.compare(base, models).total.sign_conflict == 2 / 5
    assert tvfast.compare(base, models[:1]).total.sign_conflict == 0.0


def test_nothing_is_modified_and_nothing_depends_on_threads() -> None:
    base, models = checkpoint(0), [checkpoint(1), checkpoint(2)]
    found = [tvfast.compare(base, models, n_threads=n) for n in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    again = checkpoint(0)
    assert all(base[name].equal(again[name]) for name in base)


def test_modules_mixed_dtypes_ties_and_integers() -> None:
    torch.manual_seed(0)
    base, model = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    model.weight.data += 1
    found = tvfast.compare(base, [model])
    assert "num_batches_tracked" not in found.tensors
    assert found.norms["weight"] == [2.0]
    shared = torch.zeros(4, dtype=torch.bfloat16)
    other = torch.ones(4, dtype=torch.float64)
    tied = tvfast.compare({"a": shared, "b": shared}, [{"a": other, "b": other}])
    assert (list(tied.tensors), tied.total.gram, tied.total.n_elements) == (["a"], [[4.0]], 4)


def test_nan_and_emptiness() -> None:
    base = {"a": torch.zeros(3), "b": torch.zeros(0), "c": torch.zeros(2)}
    model = {"a": torch.tensor([1.0, math.nan, 0.0]), "b": torch.zeros(0), "c": torch.ones(2)}
    found = tvfast.compare(base, [model])
    assert math.isnan(found.norms["a"][0])
    assert math.isnan(found.total.gram[0][0])
    assert found.norms["b"] == [0.0]
    assert found.sign_conflict["b"] == 0.0
    assert found.gram["c"] == [[2.0]]
    assert tvfast.compare({}, [{}]).total.n_elements == 0


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="models is empty"):
        tvfast.compare(torch.zeros(2), [])
    with pytest.raises(ArgumentError, match="expected a list of models"):
        tvfast.compare(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ShapeError, match=r"\[3\].*\[2\]"):
        tvfast.compare(torch.zeros(2), [torch.zeros(3)])
    with pytest.raises(StateDictError, match="lacks"):
        tvfast.compare({"a": torch.zeros(2)}, [{}])
    with pytest.raises(ArgumentError, match="n_threads"):
        tvfast.compare(torch.zeros(2), [torch.zeros(2)], n_threads=-2)
