"""The inputs that everything here is timed on: base and models on huge pages, reproducible by seed.

Imports the standard library and torch only, so that a peer's environment regenerates the same bytes.
"""

from __future__ import annotations

import mmap
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

COLUMNS = 8192
FULL_SIZE = 64 * 2**20
N_MODELS = 3
BASE_STD = 0.02
DELTA_STD = 1e-3
SEED = 20240229

_HUGE_PAGE = 2 * 2**20
_CHUNK = 2**20
_MADV_HUGEPAGE = 14


@dataclass(slots=True)
class HugePages:
    """An anonymous mapping of whole huge pages, as far as the kernel grants them."""

    n_bytes: int
    mapping: mmap.mmap = field(init=False, repr=False)
    offset: int = field(init=False)

    def __post_init__(self) -> None:
        whole = -(-self.n_bytes // _HUGE_PAGE) * _HUGE_PAGE
        # Private: the default of Python is shared memory, which gets no huge pages on most systems.
        self.mapping = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.mapping.madvise(_MADV_HUGEPAGE)
        start = torch.frombuffer(self.mapping, dtype=torch.uint8, count=1).data_ptr()
        self.offset = -start % _HUGE_PAGE

    def tensor(self, n_elements: int) -> Tensor:
        """bfloat16 [n_elements / COLUMNS, COLUMNS] over the mapping, which it keeps alive; zeros."""
        flat = torch.frombuffer(self.mapping, dtype=torch.bfloat16, count=n_elements, offset=self.offset)
        return flat.view(-1, COLUMNS).zero_()


@dataclass(slots=True)
class Buffers:
    """base, models, a pristine copy of the base, and an output; all bfloat16 [n / COLUMNS, COLUMNS].

    Raises:
        ValueError: `n_elements` is not a positive multiple of `COLUMNS`.
    """

    n_elements: int
    seed: int = SEED
    base: Tensor = field(init=False, repr=False)
    models: list[Tensor] = field(init=False, repr=False)
    pristine: Tensor = field(init=False, repr=False)
    out: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_size(self.n_elements)
        n_bytes = 2 * self.n_elements
        tensors = [HugePages(n_bytes).tensor(self.n_elements) for _ in range(N_MODELS + 3)]
        self.base, self.pristine, self.out, *self.models = tensors
        fill(self.base, self.models, self.seed)
        self.pristine.copy_(self.base)

    @property
    def n_bytes(self) -> int:
        """Of one tensor."""
        return 2 * self.n_elements

    def restore(self) -> None:
        """Undo an in-place merge."""
        self.base.copy_(self.pristine)


def check_size(n_elements: int) -> None:
    """Raise unless the size is a positive multiple of `COLUMNS`.

    Raises:
        ValueError: it is not.
    """
    if n_elements < COLUMNS or n_elements % COLUMNS:
        raise ValueError(f"n_elements is {n_elements}; expected a positive multiple of {COLUMNS}.")


def fill(base: Tensor, models: list[Tensor], seed: int = SEED) -> None:
    """Write θ₀ ~ N(0, 0.02²) and θ_k = θ₀ + N(0, 0.001²), rounded to bfloat16; a chunk at a time.

    Each chunk has its own generator, so that a value depends on the seed and its place only.
    """
    flat = [tensor.view(-1) for tensor in (base, *models)]
    generator = torch.Generator(base.device)
    for chunk, begin in enumerate(range(0, base.numel(), _CHUNK)):
        place = slice(begin, min(begin + _CHUNK, base.numel()))
        n = place.stop - place.start
        generator.manual_seed(seed + chunk)
        flat[0][place] = torch.randn(n, generator=generator, device=base.device).mul_(BASE_STD)
        centre = flat[0][place].float()
        for model in flat[1:]:
            noise = torch.randn(n, generator=generator, device=base.device)
            model[place] = noise.mul_(DELTA_STD).add_(centre)


def plain_inputs(n_elements: int, seed: int = SEED) -> tuple[Tensor, list[Tensor]]:
    """The values of `Buffers` in ordinary memory: (base, models)."""
    check_size(n_elements)
    base, *models = (
        torch.empty(n_elements // COLUMNS, COLUMNS, dtype=torch.bfloat16) for _ in range(N_MODELS + 1)
    )
    fill(base, models, seed)
    return base, models


def checksum(base: Tensor, models: list[Tensor]) -> int:
    """CRC-32 of all bytes: two processes that print the same one timed the same inputs."""
    crc = 0
    for tensor in (base, *models):
        crc = zlib.crc32(tensor.view(torch.int16).numpy().data, crc)
    return crc


def huge_page_share(tensors: list[Tensor]) -> float | None:
    """Share of the tensors' memory that is on huge pages, from /proc/self/smaps; None where there is none."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return None
    spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    huge = resident = 0
    inside = False
    for line in smaps.read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            begin, end = int(head[1], 16), int(head[2], 16)
            inside = any(begin < last and first < end for first, last in spans)
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1])
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1])
    return huge / resident if resident else None
