"""Commands as measured processes, and what they are run on: files in or out of the page cache."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHER = Path(__file__).with_name("process.py")
_CHUNK = 1 << 24


class RunError(RuntimeError):
    """A command that was to be measured failed."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One run: wall seconds from start to exit, peak resident bytes, processor seconds, what it printed."""

    seconds: float
    peak_bytes: int
    cpu_s: float
    stdout: str


def run(
    command: Sequence[str], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command to its end.

    Raises:
        RunError: it exits with another status than 0.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(_LAUNCHER), *command],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RunError(f"{' '.join(command)} could not be started: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    if found["status"] != 0:
        raise RunError(
            f"{' '.join(command)} ended with status {found['status']}: {found['stderr'].strip()[-2000:]}"
        )
    return Finished(found["seconds"], found["peak_bytes"], found["cpu_s"], found["stdout"])


def tvfast(*arguments: str, cwd: Path | None = None) -> Finished:
    """`tvfast ARGUMENTS` of this tree, with this interpreter."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return run([sys.executable, "-m", "tvfast", *arguments], cwd=cwd, environment={"PYTHONPATH": path})


def remove(path: Path) -> None:
    """A directory or file of an earlier run, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def shards(folder: Path) -> list[Path]:
    """The files with tensors of one checkpoint, in order of name."""
    return sorted(folder.glob("*.safetensors"))


def total_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def warm(files: Iterable[Path]) -> None:
    """Read files into the page cache."""
    buffer = bytearray(_CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def back_memory(n_bytes: int) -> None:
    """Write to so much memory and give it back to the system, as far as it has that much.

    A virtual machine's host takes free memory away within seconds and gives it anew page by page, when it is
    touched: 0.9 GB of writes took 2.0 to 4.4 s after some rest, and 0.2 s when as much had just been freed.
    """
    with open("/proc/meminfo") as lines:
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    n_bytes = min(n_bytes, found["MemAvailable"] // 2)
    with mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        blank = bytes(_CHUNK)
        for place in range(0, n_bytes, _CHUNK):
            memory[place : place + _CHUNK] = blank[: n_bytes - place]


def evict(files: Iterable[Path]) -> None:
    """Write files back and drop them from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
