"""Storage types by their safetensors names: sizes, and the names that recipes and `config.json` use."""

from __future__ import annotations

ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits per element of every storage type of the safetensors format."""

MERGEABLE = frozenset({"F32", "BF16", "F16"})
"""Types that the kernels read and write."""

FP8 = ("F8_E4M3", "F8_E5M2")
"""8-bit codes that are merged as numbers times a factor, in the order of the kernels' enumeration."""

FACTORS = ("F32", "BF16", "F16", "F8_E8M0")
"""Types of such factors, in the order of the kernels' enumeration."""

EXACT = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
"""Integers and booleans: never merged, equal in all models, copied."""

BY_RECIPE_NAME = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What `dtype` and `out_dtype` of a recipe may say."""

RECIPE_NAMES = {name: word for word, name in BY_RECIPE_NAME.items()}
"""The inverse: also the words of `config.json`."""


def n_bytes(dtype: str, n_elements: int) -> int:
    """Bytes of packed elements; sub-byte types fill whole bytes."""
    return (n_elements * ITEM_BITS[dtype] + 7) // 8
