"""Time the embedding part of a merge of two vocabularies, beside mergekit's; print a table and write JSON.

    python -m bench.checkpoints.vocabulary FOLDER [--tokens 128000] [--width 1024] [--rounds 5]

FOLDER gets two models of that many tokens, 63 of 64 of them shared in another order, as bfloat16 embeddings
and heads around one layer. Timed is processor time of one thread, from files in the page cache to the aligned
rows of both models; mergekit starts with the tensors in memory. It needs `TVFAST_MERGEKIT_PYTHON`
(tests/parity/make_env.sh). Also timed: the whole merge by `tvfast merge`, start-up and tokenizers included.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.checkpoints.peer import VARIABLE
from bench.checkpoints.running import ROOT, RunError, remove, tvfast, warm
from bench.environment import environment, load_average
from bench.suite import write
from bench.timing import Summary
from tests.vocabularies import EMBEDDINGS, HEAD, tokenizer, write_model

GOAL = 20.0
"""How many times mergekit's seconds the embedding part has to be worth."""

_UNSHARED = 64  # one token in so many is in one model only


def write_models(folder: Path, n_tokens: int, width: int) -> None:
    """Models `base` and `other`, unless they are there."""
    facts = folder / "vocabulary.json"
    wanted = {"tokens": n_tokens, "width": width}
    if facts.exists() and json.loads(facts.read_text()) == wanted:
        return
    shared = [f"w{k}" for k in range(n_tokens - n_tokens // _UNSHARED)]
    own = [f"u{k}" for k in range(n_tokens // _UNSHARED)]
    order = np.random.default_rng(1).permutation(n_tokens)
    others = [[*shared, *own][k] for k in order]
    base = [*shared, *(f"b{k}" for k in range(len(own)))]
    for seed, (name, words) in enumerate((("base", base), ("other", others))):
        remove(folder / name)
        document = tokenizer(words)
        write_model(
            folder / name, document, n_tokens, seed=seed, dtype=torch.bfloat16, width=width, n_layers=1
        )
    facts.write_text(json.dumps(wanted))


def recipe(folder: Path) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("base", "other")]
    return {
        "merge_method": "linear",
        "base_model": str(folder / "base"),
        "models": models,
        "tokenizer": {"source": "union"},
        "dtype": "bfloat16",
    }


class Aligner:
    """Gathers the rows of both matrices by token, window after window, into memory that is used again."""

    def __init__(self, folder: Path) -> None:
        from tvfast.checkpoint.reading import open_checkpoint
        from tvfast.engine.binding import bind
        from tvfast.engine.gather import Window
        from tvfast.engine.gathering import Gatherer
        from tvfast.engine.plan import SHOWN_BYTES
        from tvfast.engine.shown import Allowance
        from tvfast.recipe import load_recipe

        found = load_recipe(recipe(folder))
        binding = bind(found, {path: open_checkpoint(path) for path in found.model_paths()})
        gathers = [task.gather for task in binding.tasks if task.gather is not None]
        assert [task.name for task in binding.tasks if task.gather] in (
            [EMBEDDINGS, HEAD],
            [HEAD, EMBEDDINGS],
        )
        self.n_rows = gathers[0].map.n_rows
        self._files: dict[str, int] = {}
        self._work = []
        allowance = Allowance(SHOWN_BYTES)
        for gather in gathers:
            n = self.n_rows * gather.row
            whole = Window(gather, 0, n, (0,) * len(gather.sources))
            gatherer = Gatherer(gather, self._borrowed, ahead=False, allowance=allowance)
            self._work += [(gatherer, window) for window in whole.pieces()]
        size = max(window.n_bytes for _, window in self._work)
        self._memory = ctypes.create_string_buffer(size)

    @contextlib.contextmanager
    def _borrowed(self, path: str) -> Iterator[int]:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        yield self._files[path]

    def run(self) -> float:
        """Processor seconds of gathering everything once."""
        from tvfast.engine.gather import Window

        address = ctypes.addressof(self._memory)
        start = time.process_time()
        for gatherer, window in self._work:
            one = window.n_bytes // len(window.at)
            places = tuple(k * one for k in range(len(window.at)))
            gatherer.fill(Window(window.gather, window.start, window.n, places), address)
        return time.process_time() - start


def peer_record(folder: Path, repeats: int) -> dict[str, Any]:
    python = os.environ.get(VARIABLE)
    if not python:
        return {
            "error": f"not measured: {VARIABLE} is not set; tests/parity/make_env.sh makes an environment"
        }
    done = subprocess.run(
        [python, str(ROOT / "bench" / "mergekit_vocabulary.py"), str(folder), str(repeats)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"error": f"ended with {done.returncode}: {done.stderr.strip()[-500:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"cpu_s": Summary(tuple(found.pop("seconds"))).median}


def whole_merge(folder: Path, rounds: int) -> dict[str, Any]:
    """`tvfast merge` as a process."""
    out, path = folder / "out", folder / "recipe.yml"
    path.write_text(json.dumps(recipe(folder)))
    runs = []
    try:
        for _ in range(rounds):
            remove(out)
            runs.append(tvfast("merge", str(path), str(out), "--threads", "1", "--device", "cpu"))
    except RunError as error:
        return {"error": str(error)}
    finally:
        remove(out)
    return {
        "seconds": Summary(tuple(run.seconds for run in runs)).median,
        "cpu_s": Summary(tuple(run.cpu_s for run in runs)).median,
        "peak_bytes": max(run.peak_bytes for run in runs),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it is written to the result file."""
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_models(folder, options.tokens, options.width)
    files = [folder / name / "model.safetensors" for name in ("base", "other")]
    before = load_average()
    peer = peer_record(folder, options.peer_repeats)
    warm(files)
    aligner = Aligner(folder)
    aligner.run()
    ours = Summary(tuple(aligner.run() for _ in range(options.rounds))).median
    result: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "what": "vocabularies joined",
        "environment": environment(),
        "tokens": options.tokens,
        "width": options.width,
        "rows": [
            {"row": "rows by token", "cpu_s": ours, "n_rows": aligner.n_rows},
            {"row": "mergekit rows by token", **peer},
            {"row": "tvfast merge", **whole_merge(folder, options.rounds)},
        ],
        "load_before": before,
        "load_after": load_average(),
    }
    if "cpu_s" in peer:
        result["ratio"] = peer["cpu_s"] / ours
        result["goal"] = {"at_least": GOAL, "met": peer["cpu_s"] / ours >= GOAL}
    return result


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['tokens']} tokens a model, rows of {result['width']} bfloat16"]
    for row in result["rows"]:
        found = f"{row['cpu_s']:8.3f} s" if "cpu_s" in row else row["error"]
        lines.append(f"{row['row']:<24} {found}")
    if "ratio" in result:
        lines.append(f"{result['ratio']:.1f} times as fast as mergekit; at least {GOAL:g} is the goal")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, whatever the figures; 1 a merge failed; 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="bench.checkpoints.vocabulary", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=128_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    if options.tokens < _UNSHARED or options.width < 1 or options.rounds < 1:
        parser.error(f"expected at least {_UNSHARED} tokens, a width and a round of at least 1")
    result = measure(options)
    print(table(result))
    print(write(result, options.out))
    return 1 if "error" in result["rows"][2] else 0


if __name__ == "__main__":
    sys.exit(main())
