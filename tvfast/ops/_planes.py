"""Bit planes: bools [n] as 64-bit words, lowest bit first."""

from __future__ import annotations

import torch
from torch import Tensor

from tvfast.program import DType, View

CHUNK = 1 << 18  # elements at a time: at most 4 MiB of scratch, so that it stays in cache


def plane_view(words: Tensor, n_bits: int) -> View:
    return View(words.data_ptr(), n_bits, DType.F32, words)


def pack(mask: Tensor) -> Tensor:
    """Bool [n] as ceil(n / 64) int64 words, lowest bit first."""
    bits = mask.view(-1)
    n = bits.numel()
    words = torch.zeros(-(-n // 64), dtype=torch.int64, device=mask.device)
    octets = words.view(torch.uint8)
    for start in range(0, n, CHUNK):
        part = bits[start : start + CHUNK]
        padded = torch.zeros(-(-part.numel() // 8) * 8, dtype=torch.bool, device=mask.device)
        padded[: part.numel()] = part
        # byte i of eight holds b_i; the factor puts b_i at bit 56 + i, and nothing else reaches the top byte
        packed = (padded.view(torch.int64) * 0x0102040810204080) >> 56
        octets[start // 8 : start // 8 + packed.numel()] = packed.to(torch.uint8)
    return words


def unpack(words: Tensor, bits: Tensor) -> None:
    """The first n bits of a plane into bool [n]."""
    octets = words.view(torch.uint8)
    shifts = torch.arange(8, device=words.device)
    flags = (torch.arange(256, device=words.device).unsqueeze(1) >> shifts) & 1
    eight = flags.to(torch.uint8).view(torch.int64).view(-1)  # [256] the eight bools of a byte as one word
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK]
        some = octets[start // 8 : start // 8 - (-part.numel() // 8)]
        part.copy_(eight[some.to(torch.int64)].view(torch.bool)[: part.numel()])
