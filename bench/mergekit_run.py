"""Time mergekit's own merge of the benchmark's inputs; runs in the peer's environment.

    PEER/bin/python bench/mergekit_run.py METHOD N_ELEMENTS REPEATS

Prints one JSON object: version, seconds of every repeat, checksum of the inputs.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from buffers import checksum, plain_inputs
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup

DENSITIES = {"ties": 0.2, "della": 0.5}


def main() -> None:
    method, n_elements, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    base, models = plain_inputs(n_elements)
    group = TensorGroup.from_tensors([base, *models], base_index=0)
    parameters: dict[str, Any] = {"density": DENSITIES[method], "weight": [1.0] * len(models)}
    if method == "della":
        parameters["epsilon"] = 0.1
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        (merged,) = registry.get(method)((group,), parameters=parameters)
        seconds.append(time.perf_counter() - start)
    if merged.shape != base.shape:
        raise RuntimeError(f"mergekit returned shape {tuple(merged.shape)} for {tuple(base.shape)}")
    record = {
        "version": version("mergekit"),
        "torch": torch.__version__,
        "seconds": seconds,
        "checksum": checksum(base, models),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
