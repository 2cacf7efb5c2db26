"""Run the peers' own test suites with and without the integrations: the same passes are asked for.

    python -m tests.integrations.run_peer_suites --python peft=ENV/bin/python [--sources DIR] [--out FILE]

Each peer needs an environment of its own with the peer, pytest and this tvfast; `make_env.sh` makes one. The
source distributions, which hold the tests, are fetched with pip unless DIR has them unpacked. Tests run
offline, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Suite:
    """What of a peer's tests is run, and how many calls of it must have gone through tvfast.

    `is_package`: its tests import each other relatively, and the distribution lacks their `__init__.py`.
    """

    integration: str
    requirement: str
    arguments: tuple[str, ...]
    fewest_calls: int
    is_package: bool = False

    @property
    def folder(self) -> str:
        return self.requirement.replace("==", "-").replace("sd-mecha", "sd_mecha")


SUITES = {
    # Its other files load models from the hub.
    "peft": Suite(
        "peft", "peft==0.21.2", ("tests/test_custom_models.py", "-k", "weighted"), 101, is_package=True
    ),
    "mergekit": Suite("mergekit", "mergekit==0.1.5", ("tests",), 101),
    "mergekit-0.1.4": Suite("mergekit", "mergekit==0.1.4", ("tests",), 101),
    "fusion_bench": Suite("fusion_bench", "fusion_bench==0.2.33", ("tests",), 1),
    # What it distributes of its tests merges nothing.
    "sd_mecha": Suite("sd_mecha", "sd-mecha==1.1.8", ("tests",), 0),
}


def source(suite: Suite, sources: Path) -> Path:
    """The unpacked source distribution."""
    folder = sources / suite.folder
    if not folder.exists():
        name = suite.requirement.partition("==")[0]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        subprocess.run([*pip, "--dest", str(sources), suite.requirement], check=True)
        (archive,) = sources.glob(f"{suite.folder}.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(sources, filter="data")
    if suite.is_package:
        (folder / "tests" / "__init__.py").touch()
    return folder


def run(suite: Suite, python: str, folder: Path, integration: str) -> dict[str, Any]:
    """Outcome of every test, and what the integration counted."""
    with tempfile.TemporaryDirectory() as work:
        record = Path(work) / "record.json"
        environment = {
            **os.environ,
            "TVFAST_PEER": integration,
            "TVFAST_RECORD": str(record),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # The plugin by a name of its own: a peer's tests are a package `tests` too.
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "integrations"), str(ROOT)]),
        }
        options = ["-q", "-p", "peer_plugin", "-p", "no:cacheprovider"]
        quiet = ["--tb=line", "--continue-on-collection-errors", "--override-ini=addopts="]
        done = subprocess.run(
            [python, "-m", "pytest", *options, *quiet, *suite.arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not record.exists():
            raise RuntimeError(f"{suite.requirement}: pytest did not finish\n{done.stdout}\n{done.stderr}")
        found: dict[str, Any] = json.loads(record.read_text())
        found["summary"] = done.stdout.strip().splitlines()[-1]
        return found


def compared(suite: Suite, python: str, sources: Path) -> dict[str, Any]:
    """Both runs of a suite, and the tests that end differently."""
    folder = source(suite, sources)
    plain = run(suite, python, folder, "")
    ours = run(suite, python, folder, suite.integration)
    tests = plain["outcomes"].keys() | ours["outcomes"].keys()
    different = {
        test: [plain["outcomes"].get(test), ours["outcomes"].get(test)]
        for test in sorted(tests)
        if plain["outcomes"].get(test) != ours["outcomes"].get(test)
    }
    calls = sum(ours["stats"].values())
    return {
        "requirement": suite.requirement,
        "passed": [list(one["outcomes"].values()).count("passed") for one in (plain, ours)],
        "summary": [plain["summary"], ours["summary"]],
        "different": different,
        "calls": calls,
        "stats": ours["stats"],
        "fallbacks": ours["fallbacks"],
        "met": not different and calls >= suite.fewest_calls,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", action="append", required=True, metavar="SUITE=PATH")
    parser.add_argument("--sources", type=Path, default=Path("build/peer_sources"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.sources.mkdir(parents=True, exist_ok=True)
    results = {}
    for pair in options.python:
        name, _, python = pair.partition("=")
        results[name] = compared(SUITES[name], python, options.sources.resolve())
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["met"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
