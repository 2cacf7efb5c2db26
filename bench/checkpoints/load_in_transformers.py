"""Load merged checkpoints with transformers and run them; in the environment of tests/parity/make_env.sh.

    PEER/bin/python bench/checkpoints/load_in_transformers.py FOLDER [FOLDER ...]

Prints one JSON object per folder. Exit status 1 if one does not load whole, has no working tokenizer, or
gives logits that are not finite.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Merging adds task vectors."


def checked(folder: str) -> dict[str, Any]:
    """What was found; `problems` is empty where all is well."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.bfloat16, output_loading_info=True
    )
    encoded = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(encoded).logits.float()
    problems = [f"{kind}: {sorted(map(str, names))[:4]}" for kind, names in info.items() if names]
    if not torch.isfinite(logits).all():
        problems.append(f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} logits are not finite")
    if tokenizer.decode(encoded[0], skip_special_tokens=True) != TEXT:
        problems.append("the tokenizer does not give the text back")
    if len(tokenizer) > model.config.vocab_size:
        problems.append(f"{len(tokenizer)} tokens, but {model.config.vocab_size} embeddings")
    return {
        "folder": folder,
        "parameters": sum(p.numel() for p in model.parameters()),
        "n_tokens": encoded.numel(),
        "logit_std": float(logits.std()),
        "problems": problems,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def main() -> int:
    failed = False
    for folder in sys.argv[1:]:
        try:
            record = checked(folder)
        except Exception as error:  # one folder's failure must not hide the others' results
            record = {"folder": folder, "problems": [f"{type(error).__name__}: {error}"]}
        failed |= bool(record["problems"])
        print(json.dumps(record))
    return int(failed or len(sys.argv) < 2)


if __name__ == "__main__":
    sys.exit(main())
