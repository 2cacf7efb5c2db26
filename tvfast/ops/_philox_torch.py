"""Random bits in torch: Philox4x32-10 and the tie hash, as `docs/numerics.md` writes them.

32-bit words live in int64 tensors; int64 products wrap modulo 2^64, so their bits are those of uint64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _high_low(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    product = constant * word
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four 32-bit counter words [n] under a 64-bit key, low word first.

    Source: Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def draws(key: int, start: int, n: int, device: torch.device) -> Tensor:
    """The 32-bit draws of elements start .. start + n - 1; int64 [n] in [0, 2^32)."""
    if n == 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    first, last = start >> 2, (start + n - 1) >> 2
    block = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    words = philox((block & _WORD, (block >> 32) & _WORD, zero, zero), key)
    begin = start - 4 * first
    return torch.stack(words, dim=1).reshape(-1)[begin : begin + n]


def tie_hash(key: int, index: Tensor) -> Tensor:
    """The 32-bit tie hash of global element indices, int64 [n] -> int64 [n] in [0, 2^32).

    The index is mixed by the inner steps of Wellons' "lowbias32"; the key is an odd multiplier.
    """
    low, high = index & _WORD, (index >> 32) & _WORD
    folded_key = (key & _WORD) ^ (((key >> 32) * 0x85EBCA6B) & _WORD)
    x = (((low + high * 0x9E3779B9) & _WORD) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return ((x ^ (x >> 16)) * (folded_key | 1)) & _WORD
