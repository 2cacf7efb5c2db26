"""A family whose large tensors are cut between ranks; no test changes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.families import Family, write_checkpoint

WIDTH = 256
SHAPES = {
    "model.embed_tokens.weight": (1400, WIDTH),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(3)
        for name, shape in (
            ("input_layernorm.weight", (WIDTH,)),
            ("mlp.down_proj.weight", (WIDTH, 2 * WIDTH)),
            ("mlp.up_proj.weight", (2 * WIDTH, WIDTH)),
            ("self_attn.q_proj.weight", (WIDTH, WIDTH)),
        )
    },
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (1400, WIDTH),
}


def write_family(root: Path) -> Family:
    generator = torch.Generator().manual_seed(3)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors = {"base": {name: tensor.bfloat16() for name, tensor in base.items()}}
    for k in (1, 2, 3):
        tensors[f"ft{k}"] = {
            name: (t + 1e-3 * torch.randn(t.shape, generator=generator)).bfloat16()
            for name, t in base.items()
        }
    for member, state in tensors.items():
        write_checkpoint(root / member, state)
    return Family(root, tensors)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """bfloat16, two shards each."""
    return write_family(tmp_path_factory.mktemp("family"))
