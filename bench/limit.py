"""The memory limit of this machine: read streams and write one, in limit.cpp, compiled for this processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
MAX_STREAMS = 9
_LINE = 64


class LimitError(RuntimeError):
    """The limit cannot be measured here."""


def compiler() -> str:
    """The path of `$CXX`, or of g++.

    Raises:
        LimitError: it is not on PATH.
    """
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise LimitError(f"{name!r} is not on PATH; bench/limit.cpp needs a C++20 compiler. Set CXX.")
    return path


@cache
def library() -> ctypes.CDLL:
    """limit.cpp, compiled on first use into build/bench, by source, compiler, flags and processor.

    Raises:
        LimitError: there is no compiler, or it failed; with its message.
    """
    cxx = compiler()
    target = subprocess.run([cxx, "-march=native", "-Q", "--help=target"], capture_output=True, check=False)
    version = subprocess.run([cxx, "--version"], capture_output=True, check=False)
    made_of = [SOURCE.read_bytes(), version.stdout, target.stdout, " ".join(FLAGS).encode()]
    key = hashlib.blake2b(b"\0".join(made_of), digest_size=8).hexdigest()
    built = ROOT / "build" / "bench" / f"limit-{key}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        partial = built.with_suffix(f".{os.getpid()}")
        command = [cxx, *FLAGS, str(SOURCE), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LimitError(f"{' '.join(command)} failed:\n{done.stderr}")
        partial.replace(built)
    loaded = ctypes.CDLL(str(built))
    loaded.stream_pass.restype = ctypes.c_uint64
    loaded.stream_pass.argtypes = [
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
    ]
    return loaded


def stream_pass(inputs: Sequence[Tensor], out: Tensor | None, n_threads: int) -> int:
    """Read every input once and write `out`, if given, with non-temporal stores.

    Args:
        inputs: 1 to 9 tensors of the same number of bytes, a multiple of 64; contiguous, on the CPU.
        out: as large as an input and aligned to 64 bytes, as non-temporal stores need; overwritten with the
            exclusive or of the inputs.

    Returns:
        An exclusive or over what was read, so that no read can be left out.

    Raises:
        ValueError: sizes, alignment or the number of inputs do not fit.
        LimitError: see `library`.
    """
    sizes = {t.numel() * t.element_size() for t in (*inputs, *([out] if out is not None else []))}
    if not 1 <= len(inputs) <= MAX_STREAMS or len(sizes) != 1 or next(iter(sizes)) % _LINE or n_threads < 1:
        raise ValueError(
            f"{len(inputs)} inputs of {sorted(sizes)} bytes on {n_threads} threads; expected 1 to "
            f"{MAX_STREAMS} inputs of one size, a multiple of {_LINE} bytes, and at least one thread."
        )
    if out is not None and out.data_ptr() % _LINE:
        raise ValueError(f"out is at {out.data_ptr():#x}; expected an address that {_LINE} divides.")
    addresses = (ctypes.c_void_p * len(inputs))(*(t.data_ptr() for t in inputs))
    target = None if out is None else out.data_ptr()
    return int(library().stream_pass(addresses, len(inputs), target, sizes.pop(), n_threads))
