"""How numbers of a method become the scalars of a kernel: keys, limits of draws, float32, counts."""

from __future__ import annotations

import hashlib
import math
import struct

from tvfast.program import ALWAYS


def model_key(seed: int, name: str, model: int) -> int:
    """The 64-bit key of one model's draws and tie hashes in one tensor; see docs/numerics.md, Keys."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw_limit(probability: float) -> int:
    """The 32-bit draws below it are a share `probability` of all."""
    return min(ALWAYS, max(0, round(probability * ALWAYS)))


def float32(value: float) -> float:
    """Rounded once to float32; infinity where it does not fit."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def next_float32(value: float) -> float:
    """The least float32 above one of 0 or more."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return float(struct.unpack("<f", struct.pack("<I", bits + 1))[0])


def top_count(density: float, n: int) -> int:
    """Entries kept at a density: truncated, in float64."""
    return int(density * n)
