"""Safetensors files as NumPy arrays, read without the code under test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


@dataclass(frozen=True)
class Saved:
    """One tensor: its type's name in the file, its shape, its bits."""

    dtype: str
    bits: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def values(self) -> Array:
        """As float32, which holds every value of the three types."""
        return to_float32(self.dtype, self.bits)


def to_float32(dtype: str, bits: Array) -> Array:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)


def to_bfloat16_bits(values: Array) -> Array:
    """float32, not NaN, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: Array = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def read(folder: Path) -> dict[str, Saved]:
    """Every tensor of a checkpoint's shards, mapped and not copied."""
    found: dict[str, Saved] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, saved in _read_file(path):
            if name in found:
                raise ValueError(f"{path}: {name} is in two files of {folder}")
            found[name] = saved
    if not found:
        raise ValueError(f"{folder}: no safetensors")
    return found


def _read_file(path: Path) -> Iterator[tuple[str, Saved]]:
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_header))
    header.pop("__metadata__", None)
    content = np.memmap(path, np.uint8, "r")
    for name, entry in header.items():
        start, end = (8 + n_header + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(content[start:end].tobytes(), _BITS[entry["dtype"]])
        yield name, Saved(entry["dtype"], bits.reshape(entry["shape"]))


def steps(dtype: str, left: Array, right: Array) -> Array:
    """How many values of the type lie between two bit patterns; -0 and +0 are one step apart."""
    n_bits = 32 if dtype == "F32" else 16
    sign = 1 << (n_bits - 1)

    def place(bits: Array) -> Array:
        wide = bits.astype(np.int64)
        return np.where(wide & sign, -1 - (wide & (sign - 1)), wide)

    apart: Array = np.abs(place(left) - place(right))
    return apart


def bfloat16_steps(left: Saved, right: Saved) -> Array:
    """The same after rounding both to bfloat16."""
    return steps("BF16", to_bfloat16_bits(left.values()), to_bfloat16_bits(right.values()))
