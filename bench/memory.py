"""Peak memory of one call on top of its inputs, measured in a fresh process.

    python -m bench.memory FUNCTION METHOD N_ELEMENTS N_THREADS

Prints one JSON object. The peak is the kernel's VmHWM, set back after the inputs exist: ru_maxrss would still
hold the peak of making them, and that of the parent process, which a child inherits.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

import tvfast
from bench.buffers import plain_inputs
from bench.registry import DELLA, TIES_DENSITY, WEIGHTS

_PARAMETERS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weights": WEIGHTS},
    "ties": {"density": TIES_DENSITY},
    "della": DELLA,
}
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}; peak memory is measured on Linux only")
    return 1024 * int(found[1])


def extra_bytes(function: str, method: str, n_elements: int, n_threads: int) -> dict[str, int]:
    """Growth of the peak resident set during one call; both figures are of this process."""
    torch.set_num_threads(1)
    merge = getattr(tvfast, function)
    parameters = _PARAMETERS[method]
    # Code that loads on first use is no memory of the merge.
    small, small_models = plain_inputs(8192)
    merge(small, small_models, method=method, n_threads=n_threads, **parameters)
    base, models = plain_inputs(n_elements)
    # Otherwise the call reuses what making the inputs freed, and seems to need less than it does.
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    _CLEAR_REFS.write_text("5")
    at_reset = status_bytes("VmHWM")
    if at_reset > before + 2**20:
        raise RuntimeError(f"{_CLEAR_REFS} did not set VmHWM back: {at_reset} bytes, {before} resident")
    merged = merge(base, models, method=method, n_threads=n_threads, **parameters)
    peak = status_bytes("VmHWM")
    return {"inputs_bytes": before, "extra_bytes": peak - before, "output_bytes": 2 * merged.numel()}


if __name__ == "__main__":
    print(json.dumps(extra_bytes(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
