"""Run FusionBench's TIES on a family of checkpoints. Runs in its own environment (make_fusion_bench_env.sh).

    PEER/bin/python generate_fusion_bench.py FAMILY OUT_FOLDER [--golden]

Writes record.json, and base + scale * merged as one float32 vector per merge function, tensors in order of
name: vector-sum.npy, ... With --golden it is one file, fusion_bench.npz: thresholds, counts, checksums and a
sample. Checkpoints are widened to float32 first, since FusionBench computes in the type that it is given.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import zlib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shards import read

FUNCTIONS = ("sum", "mean", "max")
PERCENT, SCALE = 20, 0.3
N_SAMPLE = 2048


def ties_file() -> Any:
    """fusion_bench's ties_merging_utils.py, without the package, which imports all of its methods."""
    stub = types.ModuleType("fusion_bench.utils.type")
    stub.StateDictType = dict  # type: ignore[attr-defined]
    sys.modules["fusion_bench.utils.type"] = stub
    path = distribution("fusion_bench").locate_file("fusion_bench/method/ties_merging/ties_merging_utils.py")
    spec = importlib.util.spec_from_file_location("ties_merging_utils", str(path))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vector(folder: Path) -> torch.Tensor:
    """All tensors of a checkpoint, in order of name, as float32."""
    tensors = read(folder)
    return torch.cat([torch.from_numpy(tensors[name].values().reshape(-1)) for name in sorted(tensors)])


def main() -> None:
    family, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    peer = ties_file()
    base = vector(family / "base")
    members = sorted(path.name for path in family.glob("ft*"))
    deltas = torch.vstack([vector(family / member) - base for member in members])
    trimmed, _, mask = peer.topk_values_mask(deltas.clone(), K=PERCENT, return_mask=True)
    record: dict[str, Any] = {
        "peer": "fusion_bench",
        "version": distribution("fusion_bench").version,
        "torch": torch.__version__,
        "family": json.loads((family / "family.json").read_text()),
        "members": members,
        "percent": PERCENT,
        "scale": SCALE,
        "kept": mask.sum(dim=1).tolist(),
        "thresholds": [float(row[kept].abs().min()) for row, kept in zip(deltas, mask, strict=True)],
        "checksums": {},
    }
    signs = peer.resolve_sign(trimmed)
    record["signs"] = {"plus": int((signs > 0).sum()), "minus": int((signs < 0).sum())}
    del mask
    merged = {}
    for function in FUNCTIONS:
        vectors = peer.ties_merging(deltas.clone(), reset_thresh=PERCENT, merge_func=function)
        merged[function] = (base + SCALE * vectors).numpy()
        record["checksums"][function] = zlib.crc32(memoryview(merged[function]).cast("B"))
    record["checksums"]["signs"] = zlib.crc32(memoryview(signs.to(torch.int8).numpy()).cast("B"))
    if "--golden" in sys.argv:
        places = np.sort(np.random.default_rng(7).choice(base.numel(), N_SAMPLE, replace=False))
        arrays = {function: values[places] for function, values in merged.items()}
        text = np.frombuffer(json.dumps(record).encode(), np.uint8)
        np.savez_compressed(out / "fusion_bench.npz", record=text, places=places, **arrays)
        return
    np.save(out / "signs.npy", signs.to(torch.int8).numpy())
    for function, values in merged.items():
        np.save(out / f"vector-{function}.npy", values)
    (out / "record.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
