"""mergekit-yaml timed as a process, with results kept: a run of it takes from seconds to minutes.

A kept result is used again only if everything that could change it is the same: recipe, inputs, versions,
processor and number of cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoints.running import RunError, back_memory, remove, run, total_bytes, warm
from bench.environment import load_average
from bench.timing import Summary

VARIABLE = "TVFAST_MERGEKIT_PYTHON"
_VERSIONS = "import json, torch; from importlib.metadata import version as v; " + (
    "print(json.dumps({'mergekit': v('mergekit'), 'torch': v('torch'), 'threads': torch.get_num_threads()}))"
)


@dataclass(frozen=True)
class Peer:
    """mergekit of one environment, on this machine."""

    python: Path
    facts: Mapping[str, Any]  # versions, threads, processor, cores
    cache: Path

    def key(self, recipe: str, family: Mapping[str, Any]) -> str:
        text = json.dumps([recipe, dict(family), dict(self.facts)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def kept(self, key: str) -> dict[str, Any] | None:
        return _load(self.cache).get(key)

    def measure(
        self, recipe: Path, out: Path, inputs: Sequence[Path], key: str, method: str, repeats: int
    ) -> dict[str, Any]:
        """Time `mergekit-yaml RECIPE OUT`, inputs in the page cache; the result is kept."""
        command = [str(self.python.with_name("mergekit-yaml")), str(recipe), str(out), "--quiet"]
        environment = {"HF_HUB_OFFLINE": "1"}
        samples, peaks = [], []
        before = load_average()
        for _ in range(repeats):
            remove(out)
            back_memory(total_bytes(inputs))
            warm(inputs)
            done = run(command, environment=environment)
            samples.append(done.seconds)
            peaks.append(done.peak_bytes)
        remove(out)
        record = {
            "method": method,
            **self.facts,
            **Summary(tuple(samples)).record(),
            "peak_bytes": max(peaks),
            "load_before": before,
        }
        kept = _load(self.cache)
        kept[key] = record
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        self.cache.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        return record


def find_peer(cache: Path, machine: Mapping[str, Any]) -> Peer | str:
    """mergekit in the environment that the variable names, or why there is none.

    Args:
        machine: what is recorded about this machine; its processor and cores are part of a result's key.
    """
    python = os.environ.get(VARIABLE)
    if not python:
        return f"not measured: {VARIABLE} is not set; tests/parity/make_env.sh makes an environment"
    try:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"not measured: {python}: {error.strerror}"
    if done.returncode != 0:
        return f"not measured: {python}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    facts = {**json.loads(done.stdout), "cpu": machine["cpu"], "cores": machine["cores"]}
    return Peer(Path(python), facts, cache)


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: no JSON ({error}); remove the file to measure anew") from None
    return found
