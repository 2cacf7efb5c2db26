"""Peak memory of one call, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_PROGRAM = """
import ctypes, pathlib, re
import torch
from tvfast import ops

def status(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", text)[1])

torch.set_num_threads(1)
{setup}
def call():
    return {call}
for _ in range(8):  # code that loads on first use, and what a thread keeps from its first task, are no memory
    call()          # of the call; a thread may find no task left in one of them
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
kept = call()
print(status("VmHWM") - before)
"""


def peak_growth(setup: str, call: str, **environment: str) -> int:
    """Bytes by which the resident set grows during one more run of an expression, its result included."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(setup=setup, call=call)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)
