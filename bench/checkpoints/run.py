"""Time whole merges: `python bench/checkpoints/run.py --help`. All of it is in suite.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's files are no top-level modules
    runpy.run_module("bench.checkpoints.suite", run_name="__main__")
