"""Test, then time, then print a table and write it as JSON.

    python bench/run.py [--op combine] [--elements 67108864] [--threads 1 2] [--out bench/results]

Nothing is timed unless the tests of what is timed pass. Rows of mergekit need `TVFAST_MERGEKIT_PYTHON`, a
Python that has mergekit (tests/parity/make_env.sh makes one).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.buffers import FULL_SIZE, check_size
from bench.environment import environment, load_average
from bench.limit import ROOT
from bench.registry import GATES, LEFT_TO_MAKE_TEST, MEMORY_ROWS, OPS, SLACK_BYTES, peers_of
from bench.table import judged, table
from bench.timing import Summary

MERGEKIT = "TVFAST_MERGEKIT_PYTHON"
_PEER_REPEATS = 1  # tens of seconds each, and ratios of tens to hundreds


class GateError(RuntimeError):
    """Tests of what was to be timed did not pass."""


def gate(tests: Sequence[str]) -> None:
    """Run tests; return only if they pass.

    Raises:
        GateError: one failed, or none ran.
    """
    arguments = ["-q", "--benchmark-disable", *(f"--deselect={name}" for name in LEFT_TO_MAKE_TEST)]
    done = _pytest([*arguments, *tests], capture=False)
    if done.returncode != 0:
        raise GateError(
            f"pytest {' '.join(tests)} ended with status {done.returncode}; expected 0. Nothing was timed: "
            "make the tests pass first."
        )


def timed_rows(ops: Sequence[str], n_elements: int, threads: Sequence[int]) -> dict[str, Any]:
    """Rows, one record each, and facts about the inputs; from one pytest-benchmark process.

    Raises:
        RuntimeError: the process itself broke. A row that fails is a record with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.json"
        arguments = ["bench", "-q", "--benchmark-enable", "--benchmark-disable-gc", "--benchmark-quiet"]
        arguments += [f"--elements={n_elements}", f"--records={records}", *(f"--op={op}" for op in ops)]
        arguments += ["--threads", *map(str, threads)]
        done = _pytest(arguments, capture=True)
        if done.returncode not in (0, 1):  # 1: rows failed
            raise RuntimeError(
                f"pytest {' '.join(arguments)} ended with status {done.returncode}; expected 0 or 1:\n"
                f"{done.stdout}{done.stderr}"
            )
        found: dict[str, Any] = json.loads(records.read_text())
    return found


def peer_rows(ops: Sequence[str], n_elements: int, checksum: int | None) -> list[dict[str, Any]]:
    """mergekit's own merges of the same inputs; a row that cannot run says why."""
    records = []
    for row in peers_of(ops):
        record: dict[str, Any] = {"row": row.name, "op": "baseline", "threads": 1}
        python = os.environ.get(MERGEKIT)
        if not python:
            record["error"] = f"not measured: {MERGEKIT} is not set"
        else:
            command = [python, str(ROOT / "bench" / "mergekit_run.py"), row.method]
            found = _json_of([*command, str(n_elements), str(_PEER_REPEATS)])
            if "error" not in found and found["checksum"] != checksum:
                found = {
                    "error": f"{python} made other inputs: checksum {found['checksum']}, here {checksum}"
                }
            if "error" not in found:
                record |= Summary(tuple(found["seconds"])).record()
            record |= {key: found[key] for key in ("error", "version", "torch") if key in found}
        records.append(record)
    return records


def memory_rows(n_elements: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of merges, each in its own process."""
    records = []
    for row in MEMORY_ROWS:
        for n_threads in threads:
            command = [sys.executable, "-m", "bench.memory", row.function, row.method]
            found = _json_of([*command, str(n_elements), str(n_threads)])
            record: dict[str, Any] = {"row": row.name, "threads": n_threads, **found}
            if "error" not in found:
                allowed = row.new_tensors * found["output_bytes"] + SLACK_BYTES
                record |= {"allowed_bytes": allowed, "met": found["extra_bytes"] <= allowed}
            records.append(record)
    return records


def measure(ops: Sequence[str], n_elements: int, threads: Sequence[int]) -> dict[str, Any]:
    """Everything, as it is written to the result file."""
    result: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ops": list(ops),
        "full_size": n_elements >= FULL_SIZE,
        "environment": environment(),
        "load_before": load_average(),
        "memory": memory_rows(n_elements, threads) if "memory" in ops else [],
        "inputs": None,
        "rows": [],
    }
    if set(ops) - {"memory"}:
        found = timed_rows(ops, n_elements, threads)
        result["inputs"] = found.get("inputs")
        checksum = (found.get("inputs") or {}).get("checksum")
        rows = found["rows"] + peer_rows(ops, n_elements, checksum)
        result["rows"] = judged(rows)
    result["load_after"] = load_average()
    return result


def write(result: dict[str, Any], folder: Path) -> Path:
    """One file per run, named after its time and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = (result["environment"]["commit"] or "uncommitted")[:12]
    stamp = "".join(c for c in result["time"] if c.isdigit() or c == "T")[:15]
    path = folder / f"{stamp}-{commit}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _pytest(arguments: Sequence[str], *, capture: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=_one_thread(), capture_output=capture, text=True, check=False
    )


def _json_of(command: Sequence[str]) -> dict[str, Any]:
    """What a command prints last; {"error": ...} if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=_one_thread(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"status {done.returncode}: {last}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _one_thread() -> dict[str, str]:
    """An environment in which torch and NumPy start no threads beside the ones asked for.

    A worker of pytest-xdist that runs this must not seem to be one: pytest-benchmark would time nothing.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {**inherited, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, whatever the figures; 1 tests failed; 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="repeatable; all if none is given")
    parser.add_argument("--elements", type=int, default=FULL_SIZE, help="per tensor; a multiple of 8192")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    try:
        check_size(options.elements)
    except ValueError as error:
        parser.error(str(error))
    if min(options.threads) < 1:
        parser.error(f"--threads {options.threads}: expected positive numbers")
    ops = options.op or list(OPS)
    try:
        gate(list(dict.fromkeys(test for op in ops for test in GATES[op])))
    except GateError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    result = measure(ops, options.elements, options.threads)
    print(table(result))
    print(write(result, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
