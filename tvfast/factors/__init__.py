"""Factors of curvature: how a symmetric matrix is held, products with it, and the solves that merges need.

Imports torch. Everything here takes and returns tensors; nothing knows of models or files.
"""

from __future__ import annotations

from tvfast.factors.forms import Blocks, Dense, Diagonal, Factor, Root, pack, unpack
from tvfast.factors.products import add_kron, inner, kron_value

__all__ = [
    "Blocks",
    "Dense",
    "Diagonal",
    "Factor",
    "Root",
    "add_kron",
    "inner",
    "kron_value",
    "pack",
    "unpack",
]
