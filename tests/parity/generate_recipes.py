"""Write golden/recipes.npz: some entries of every tensor that mergekit-yaml makes of deterministic recipes.

    TVFAST_MERGEKIT_PYTHON=PEER/bin/python python -m tests.parity.generate_recipes

The families are made again from their seeds wherever the file is used, so it holds outputs only.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.parity.comparison import GOLDEN
from tests.parity.recipe_runs import DISTINCT, VARIABLE, Run, planned, run_mergekit
from tests.parity.recipe_sources import RANDOM, SOURCES, Source
from tests.parity.shards import Array, Saved, read

N_SAMPLES = 14


def deterministic() -> list[Source]:
    """The recipes in the golden file."""
    return [
        s for s in SOURCES if s.portable and yaml.safe_load(s.file.read_text())["merge_method"] not in RANDOM
    ]


def sampled(name: str, n_elements: int) -> Array:
    """The entries of a tensor that are kept, in order."""
    stream = np.random.default_rng(zlib.crc32(name.encode()))
    return np.sort(stream.choice(n_elements, min(N_SAMPLES, n_elements), replace=False))


def samples(tensors: dict[str, Saved]) -> Array:
    """Bits of the sampled entries, tensors in order of name."""
    parts = [
        tensors[name].bits.reshape(-1)[sampled(name, tensors[name].bits.size)] for name in sorted(tensors)
    ]
    return np.concatenate(parts)


def _n_positions(run: Run) -> int:
    """Whose config.json the output has. Without a base mergekit chooses arbitrarily, we the first model's."""
    recipe = yaml.safe_load(run.source.file.read_text())
    if "base_model" in recipe:
        return int(config_of(run)["max_position_embeddings"])
    first = (recipe.get("models") or recipe["slices"][0]["sources"])[0]["model"]
    config = json.loads((run.family / first / "config.json").read_text())
    return int(config["max_position_embeddings"])


def config_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.theirs / "config.json").read_text())
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        runs = planned(deterministic(), DISTINCT, work / "families", work / "out")
        peer = run_mergekit(os.environ[VARIABLE], runs, work)
        arrays: dict[str, Array] = {}
        recipes = {}
        for run, done in zip(runs, peer["runs"], strict=True):
            if "error" in done:
                raise RuntimeError(f"{run.source.name}: {done['error']}")
            tensors = read(run.theirs)
            arrays[run.source.name] = samples(tensors)
            recipes[run.source.name] = {
                "dtype": next(iter(tensors.values())).dtype,
                "tensors": {name: list(saved.shape) for name, saved in sorted(tensors.items())},
                "n_layers": config_of(run)["num_hidden_layers"],
                "n_positions": _n_positions(run),
                "recipe": zlib.crc32(run.source.file.read_bytes()),
            }
            shutil.rmtree(run.theirs.parent)
    record = {"peer": "mergekit", "version": peer["version"], "torch": peer["torch"], "recipes": recipes}
    text = np.frombuffer(zlib.compress(json.dumps(record).encode(), 9), np.uint8)
    np.savez_compressed(GOLDEN / "recipes.npz", record=text, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
