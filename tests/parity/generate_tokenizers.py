"""Write golden/tokenizers.npz: rows by token of what mergekit-yaml makes of models of different vocabularies.

    TVFAST_MERGEKIT_PYTHON=PEER/bin/python python -m tests.parity.generate_tokenizers

The models are made again from their seeds wherever the file is used, so it holds outputs only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.parity.comparison import GOLDEN
from tests.parity.recipe_runs import VARIABLE
from tests.parity.tokenizer_cases import CASES, tokens_and_rows, write_members
from tests.vocabularies import EMBEDDINGS, HEAD


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_members(work)
        jobs = []
        for name, recipe in CASES.items():
            path = work / f"{name}.yml"
            path.write_text(yaml.safe_dump(_with_paths(recipe, work), sort_keys=False))
            jobs.append({"recipe": str(path), "out": str(work / "out" / name), "cwd": str(work)})
        (work / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).with_name("run_mergekit.py")
        done = subprocess.run(
            [os.environ[VARIABLE], str(script), str(work / "jobs.json")],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])
        peer = json.loads(done.stdout.splitlines()[-1])
        record: dict[str, object] = {"version": peer["version"], "torch": peer["torch"]}
        tokens: dict[str, list[str]] = {}
        crashes: dict[str, str] = {}
        arrays = {}
        for (name, recipe), run in zip(CASES.items(), peer["runs"], strict=True):
            if "error" in run:
                crashes[name] = run["error"]
                continue
            out = work / "out" / name
            tokens[name], rows = tokens_and_rows(out)
            config = json.loads((out / "config.json").read_text())
            assert config["vocab_size"] == len(rows[HEAD]), recipe
            arrays |= {f"{name}-{kind}": rows[tensor] for kind, tensor in KINDS.items()}
    print(json.dumps(crashes, indent=1))
    record |= {"tokens": tokens, "crashes": crashes}
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    np.savez_compressed(GOLDEN / "tokenizers.npz", record=text, **arrays)
    return 0


def _with_paths(value: Any, folder: Path, key: str = "") -> Any:
    """The same with paths of members: mergekit asks the hub about names, even of folders that are there."""
    if isinstance(value, dict):
        return {name: _with_paths(item, folder, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_paths(item, folder) for item in value]
    is_member = isinstance(value, str) and (folder / value).is_dir() and bool(value)
    return str(folder / value) if is_member and (value != "base" or key in ("model", "base_model")) else value


KINDS = {"embeddings": EMBEDDINGS, "head": HEAD}

if __name__ == "__main__":
    sys.exit(main())
