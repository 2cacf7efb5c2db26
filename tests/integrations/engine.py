"""mergekit's run_merge with and without `engine=True`, in mergekit's interpreter: engine.py FAMILY OUT."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def main() -> None:
    family, out = Path(sys.argv[1]), Path(sys.argv[2])
    members = sorted(path for path in family.glob("ft*"))
    merge = importlib.import_module("mergekit.merge")
    config = importlib.import_module("mergekit.config").MergeConfiguration.model_validate(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(family / "base"),
            "models": [{"model": str(path), "parameters": {"weight": 0.4}} for path in members],
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    )
    options = importlib.import_module("mergekit.options").MergeOptions(quiet=True, write_model_card=False)
    merge.run_merge(config, str(out / "plain"), options)
    integration = importlib.import_module("tvfast.integrations.mergekit")
    with integration.install(engine=True):
        merge.run_merge(config, str(out / "engine"), options)
        stats, left = integration.stats(), integration.fallbacks()
    wanted, found = tensors(out / "plain"), tensors(out / "engine")
    different = [name for name in wanted if not torch.equal(wanted[name], found.get(name, torch.empty(0)))]
    record = {"names": sorted(wanted) == sorted(found), "different": different, "stats": stats, "left": left}
    (out / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
