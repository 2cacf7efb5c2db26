"""Layers from names."""

from __future__ import annotations

from typing import Any

import pytest

from tvfast.engine.layers import (
    Placed,
    gradient_stacks,
    is_first,
    layer_count,
    place,
    position,
    share,
    stacks,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7.mlp.up_proj.weight", Placed("model.layers.", 7, "mlp.up_proj.weight")),
        ("h.11.attn.bias", Placed("h.", 11, "attn.bias")),
        ("0.weight", Placed("", 0, "weight")),
        ("model.layers.3.mlp.experts.12.w1.weight", Placed("model.layers.", 3, "mlp.experts.12.w1.weight")),
        (
            "encoder.block.0.layer.1.DenseReluDense.wi.weight",
            Placed("encoder.block.", 0, "layer.1.DenseReluDense.wi.weight"),
        ),
        ("model.norm.weight", None),
        ("layer1.conv2.weight", None),
        ("scalars.3", None),
        ("model.layers.7", None),
        ("model.layers.7x.weight", None),
        ("model.layers.07.weight", None),
        (f"model.layers.{'7' * 5000}.weight", None),
        ("model.layers.\u0667.weight", None),
    ],
)
def test_where_a_tensor_is(name: str, expected: Placed | None) -> None:
    assert place(name) == expected


def test_stacks_have_no_gaps() -> None:
    names = [*(f"a.{k}.w" for k in range(3)), "b.0.w", "b.2.w", "c.1.w", "d.w", "a.0.v"]
    assert stacks(names) == {"a.": 3}


def test_positions() -> None:
    assert [share(k, 5) for k in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert share(0, 1) == 1.0
    assert position("a.2.w", {"a.": 5}) == 0.5
    assert position("b.2.w", {"a.": 5}) == 0.0
    assert position("norm.w", {"a.": 5}) == 0.0


def test_gradients_run_over_declared_stacks() -> None:
    """A projector of two numbered modules is no stack of layers where the configuration knows the others."""
    names = [
        *(f"text.{k}.w" for k in range(4)),
        *(f"vision.{k}.w" for k in range(3)),
        "projector.0.w",
        "projector.1.w",
    ]
    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 3}}
    assert gradient_stacks(names, config) == {"text.": 4, "vision.": 3}
    every = {"text.": 4, "vision.": 3, "projector.": 2}
    assert gradient_stacks(names, None) == every
    assert gradient_stacks(names, {"num_hidden_layers": 7}) == every


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        ({}, None),
        ({"num_hidden_layers": 32}, (("num_hidden_layers",), 32)),
        ({"n_layer": 12}, (("n_layer",), 12)),
        ({"num_layers": 6, "num_decoder_layers": 6}, (("num_layers",), 6)),
        (
            {"vision_config": {"num_hidden_layers": 24}, "text_config": {"num_hidden_layers": 32}},
            (("text_config", "num_hidden_layers"), 32),
        ),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": "32"}, None),
    ],
)
def test_declared_layers(config: dict[str, Any] | None, expected: tuple[tuple[str, ...], int] | None) -> None:
    found = layer_count(config)
    assert (found and (found.keys, found.n_layers)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("embeddings.LayerNorm.weight", True),
        ("vision.blocks.0.attn.weight", True),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
        ("embed_out.weight", False),
        ("transformer.ln_f.weight", False),
        ("output.weight", False),
    ],
)
def test_what_comes_before_the_layers(name: str, expected: bool) -> None:
    assert is_first(name, "model.layers.", {"model.layers.": 4, "vision.blocks.": 2}) == expected
