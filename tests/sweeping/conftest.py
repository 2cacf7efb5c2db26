"""A family of checkpoints and a folder to sweep in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli.families import Family, make_family
from tests.threads import one_torch_thread

__all__ = ["one_torch_thread"]

FUNCTIONS = '''
"""What the tests ask of a merge."""

CALLS = []

def norm(tensors):
    CALLS.append(tensors)
    return {"norm": sum(float(t.float().square().sum()) for t in tensors.values()), "first": first(tensors)}

def first(tensors):
    return float(tensors["model.norm.weight"].float()[0])

def digest(tensors):
    import torch, zlib
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total

def of_module(model):
    assert not model.training
    return digest(model.state_dict())

def of_folder(path):
    from safetensors.torch import load_file
    import glob
    tensors = {}
    for file in glob.glob(path + "/*.safetensors"):
        tensors |= load_file(file)
    return digest(tensors)

def fails(tensors):
    if len(CALLS) == 2:
        raise KeyError("mine")
    CALLS.append(tensors)
    return 1.0

def nothing(tensors):
    return None

def words(tensors):
    return {"good": "very"}

def changing(tensors):
    CALLS.append(tensors)
    return {f"metric {len(CALLS)}": 1.0}

def exits(tensors):
    import sys
    sys.exit(0)

def odd(tensors):
    return {"good": 1.0, "bad": float("nan"), "large": float("inf")}

def taken(tensors):
    return {"lambda": 1.0}
'''


@pytest.fixture(scope="package")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """bfloat16, two shards each; no test changes it."""
    return make_family(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def configured(family: Family, functions: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The mapping of a sweep of three models by TIES."""

    def make(axes: Mapping[str, Any], function: str = "norm", **keys: Any) -> dict[str, Any]:
        recipe = {
            "merge_method": "ties",
            "base_model": str(family.path("base")),
            "models": [
                {"model": str(family.path(f"ft{k}")), "parameters": {"weight": 1.0}} for k in (1, 2, 3)
            ],
            "parameters": {"density": 0.4},
            "dtype": "bfloat16",
            **keys.pop("recipe", {}),
        }
        found = {
            "recipe": recipe, "axes": dict(axes), "evaluate": f"{functions}:{function}",
            "receives": "state_dict", **keys,
        }  # fmt: skip
        json.dumps(found)
        return {key: value for key, value in found.items() if value is not None}

    return make
