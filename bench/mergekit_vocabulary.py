"""Time mergekit's alignment of vocabularies; runs in the peer's environment.

    PEER/bin/python bench/mergekit_vocabulary.py FOLDER REPEATS

FOLDER has the models `base` and `other` (bench/checkpoints/vocabulary.py). Prints one JSON object: processor
seconds of the embedding part alone, tensors in memory and tokenizers built, and those of building them.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from safetensors.torch import load_file


def main() -> None:
    folder, repeats = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    models = [ModelReference.parse(str(folder / name)) for name in ("base", "other")]
    build = BuildTokenizer(
        base_model=models[0], referenced_models=tuple(models), tokenizer_source="union", add_tokens=()
    )
    start = time.process_time()
    tokenizer = build.execute()
    built = time.process_time() - start
    files = {model: load_file(Path(model.model.path) / "model.safetensors") for model in models}
    align = PermutedVocabulary(
        gather_tensors=GatherTensors(weight_info=ImmutableMap({})),
        tokenizer_task=build,
        tokens=None,
        pad_to_multiple_of=None,
        base_model=models[0],
        vocabulary_axis=0,
    )
    seconds, n_rows = [], 0
    for _ in range(repeats):
        start = time.process_time()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            aligned = align.execute(
                tokenizer_info=tokenizer, tensors={model: files[model][name] for model in models}
            )
            n_rows = aligned[models[0]].shape[0]
        seconds.append(time.process_time() - start)
    record = {
        "version": version("mergekit"),
        "torch": torch.__version__,
        "n_rows": n_rows,
        "tokenizer_s": built,
        "seconds": seconds,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
