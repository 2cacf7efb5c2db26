"""TIES over a whole model by tvfast, beside what FusionBench gave (generate_fusion_bench.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import tvfast
from tests.parity.shards import Array, read


def recipe(family: Path, members: list[str], record: Mapping[str, Any], function: str, scale: float) -> str:
    """TIES over the whole model, in float32."""
    parameters = {"density": record["percent"] / 100, "weight": 1.0}
    found: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / member), "parameters": parameters} for member in members],
        "parameters": {"lambda": scale},
        "dtype": "float32",
        "tvfast": {"dialect": f"fusion_bench_{function}"},
    }
    return yaml.safe_dump(found)


def vector(folder: Path) -> Array:
    """All tensors in order of name, as float32."""
    tensors = read(folder)
    return np.concatenate([tensors[name].values().reshape(-1) for name in sorted(tensors)])


def merged(
    family: Path, work: Path, members: list[str], record: Mapping[str, Any], function: str, scale: float
) -> Array:
    """One merge from files to files."""
    path = work / f"{function}-{len(members)}-{members[0]}.yml"
    path.write_text(recipe(family, members, record, function, scale))
    tvfast.merge_checkpoints(path, path.with_suffix(""))
    return vector(path.with_suffix(""))


def check_trim(family: Path, work: Path, record: Mapping[str, Any]) -> None:
    """Threshold and number of entries kept, as a merge of one model shows them: it changes what it keeps."""
    base = vector(family / "base")
    for member, threshold, n_kept in zip(
        record["members"], record["thresholds"], record["kept"], strict=True
    ):
        kept = merged(family, work, [member], record, "sum", 1.0) != base
        magnitudes = np.abs(vector(family / member) - base)
        assert int(kept.sum()) == n_kept, f"{member}: {kept.sum()} entries kept, FusionBench keeps {n_kept}"
        assert magnitudes[kept].min() == threshold, f"{member}: threshold {magnitudes[kept].min()!r}"
        assert magnitudes[~kept].max() < threshold, f"{member}: an entry at the threshold was dropped"
